"""Hooks: which may be added, and what becomes of those that misbehave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from asrfs.consistency import shipped_hooks
from asrfs.consistency.hook_run import adopt_orphans, clean_environment, failure_of, run_hook
from asrfs.consistency.hooks import (
    HOOKS_MAX,
    Hook,
    HookFiles,
    Phase,
    after,
    before,
    check_nobody_else_writes,
    make_hook,
)
from asrfs.errors import BadInputError, FormatError, NotFoundError, RefusedError
from asrfs.model.marker import HookResult, MarkerRecord, decode_marker, encode_marker
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.system_clock import SystemClock
from tests.waiting import wait_until

ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def files(scratch: Path) -> HookFiles:
    (scratch / "hooks").mkdir(mode=0o700)
    return HookFiles(DirectoryStorage(str(scratch / "hooks")), str(scratch / "hooks"))


@pytest.fixture
def script(scratch: Path) -> Callable[[str], str]:
    def write(text: str, name: str = "quiet.sh", mode: int = 0o755) -> str:
        path = scratch / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(mode)
        return str(path)

    return write


def add(files: HookFiles, command: str, phase: Phase = "pre", order: int = 10, name: str | None = None) -> Hook:
    hook = make_hook(phase, command, order, 5.0, name)
    files.add(hook)
    return hook


def run(script: str, timeout_s: float = 20.0) -> HookResult:
    hook = Hook(name="h", phase="pre", argv=(script, "one two"), timeout_s=timeout_s)
    result = run_hook(hook, "pre", clean_environment({"MACHINE": "web1", "PHASE": "pre"}), SystemClock())
    decode_marker(encode_marker(MarkerRecord(id=ID, hooks=(result,))))  # what came of it fits into a marker
    return result


# ---- which --------------------------------------------------------------------------------------------------------


def test_hooks_are_kept_and_run_in_order_and_backwards(files: HookFiles, script: Callable[[str], str]) -> None:
    path = script("true")
    for phase, order in (("post", 5), ("pre", 20), ("hold", 10), ("pre", 3), ("post", 30)):
        add(files, f"{path} -x 'a b'", phase, order)  # type: ignore[arg-type]
    hooks = files.load()
    assert [(h.phase, h.order) for h in before(hooks)] == [("pre", 3), ("hold", 10), ("pre", 20)]
    assert [(h.phase, h.order) for h in after(hooks)] == [("post", 30), ("hold", 10), ("post", 5)]
    assert hooks[0].argv == (path, "-x", "a b") and hooks[0].name == "pre-03-quiet.sh"
    with pytest.raises(RefusedError, match=r"pre-03-quiet\.sh already"):
        add(files, path, order=3)
    files.remove("pre-03-quiet.sh")
    with pytest.raises(NotFoundError, match="hooks list"):
        files.remove("pre-03-quiet.sh")
    assert len(files.load()) == 4


@pytest.mark.parametrize(
    ("command", "order", "timeout_s", "name", "why"),
    [
        ("", 1, 5, None, "path"),
        ("psql -c CHECKPOINT", 1, 5, None, "absolute path"),
        ("/bin/sh 'x", 1, 5, None, "not a command"),
        ("/bin/true", -1, 5, None, "order"),
        ("/bin/true", 10_000, 5, None, "order"),
        ("/bin/true", 1, 0, None, "timeout"),
        ("/bin/true", 1, 1e9, None, "timeout"),
        ("/bin/true", 1, 5, "../x", "name"),
        ("/bin/true " + "x " * 64, 1, 5, None, "64 words"),
        ("/bin/true " + "x" * 5000, 1, 5, None, "4096"),
    ],
)
def test_hooks_that_cannot_be(command: str, order: int, timeout_s: float, name: str | None, why: str) -> None:
    with pytest.raises(BadInputError, match=why):
        make_hook("pre", command, order, timeout_s, name)


def test_a_machine_has_a_bounded_number_of_hooks(files: HookFiles) -> None:
    for number in range(HOOKS_MAX):
        add(files, "/bin/true", order=number)
    with pytest.raises(RefusedError, match="at most"):
        add(files, "/bin/true", order=99)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_hook_that_others_can_write_is_refused_when_added_and_when_run(
    files: HookFiles, script: Callable[..., str], mode: int
) -> None:
    path = script("echo ran > $0.ran", mode=0o755)
    add(files, path)
    os.chmod(path, mode)
    with pytest.raises(RefusedError, match=r"quiet\.sh can be written by others"):
        add(files, path, order=11)
    result = run(path)
    assert result.exit_code is None and "can be written by others" in str(failure_of(result))
    assert not os.path.exists(f"{path}.ran")


def test_a_directory_that_others_can_write_is_refused_and_a_foreign_owner_too(
    files: HookFiles, script: Callable[[str], str], scratch: Path
) -> None:
    path = script("true")
    scratch.chmod(0o777)
    with pytest.raises(RefusedError, match="can be written by others"):
        add(files, path)
    scratch.chmod(0o700)
    os.chown(path, 12345, 0)
    with pytest.raises(RefusedError, match="belongs to user 12345"):
        add(files, path)


def test_a_link_is_as_safe_as_what_it_leads_to(files: HookFiles, script: Callable[..., str], scratch: Path) -> None:
    path = script("true", mode=0o777)
    (scratch / "link").symlink_to(path)
    with pytest.raises(RefusedError, match=r"quiet\.sh can be written"):
        add(files, str(scratch / "link"))
    os.chmod(path, 0o755)
    assert add(files, str(scratch / "link")).argv[0].endswith("/link"), "programs look at the name they are called by"


@pytest.mark.parametrize("way", ["link", "directory/quiet.sh", "second"])
def test_a_link_that_somebody_else_can_point_elsewhere_is_refused(
    files: HookFiles, script: Callable[[str], str], scratch: Path, way: str
) -> None:
    """In a directory such as /tmp everybody can make a link, and change that one at any time."""
    path = script("true")
    shared = scratch / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "link").symlink_to(path)
    (shared / "directory").symlink_to(os.path.dirname(path))
    (scratch / "second").symlink_to("shared/../shared/link")
    place = scratch / way if way == "second" else shared / way
    add(files, str(place))
    for each in ("link", "directory"):
        os.lchown(shared / each, 12345, 12345)
    with pytest.raises(RefusedError, match="belongs to user 12345"):
        add(files, str(place), order=11)
    assert "belongs to user 12345" in str(failure_of(run(str(place))))
    assert failure_of(run(path)) is None


def test_a_link_that_leads_to_itself_ends(files: HookFiles, scratch: Path) -> None:
    (scratch / "round").symlink_to("round")
    with pytest.raises(RefusedError, match="not a program"):
        add(files, str(scratch / "round"))
    with pytest.raises(RefusedError, match="more than 40 links"):
        check_nobody_else_writes(str(scratch / "round"))


@pytest.mark.parametrize("command", ["/nonexistent", "/etc", "/etc/passwd"])
def test_what_is_no_program_is_refused(files: HookFiles, command: str) -> None:
    with pytest.raises(RefusedError, match="not a program"):
        add(files, command)


def test_hook_files_of_others_or_of_junk_are_refused(files: HookFiles, scratch: Path) -> None:
    add(files, "/bin/true")
    path = scratch / "hooks/pre-10-true.json"
    path.chmod(0o666)
    with pytest.raises(RefusedError, match="written by others"):
        files.load()
    path.chmod(0o600)
    good = path.read_text()
    for junk in ("", "{}", good.replace("pre-10", "pre-11"), good.replace("/bin/true", "true"), "[" * 100_000):
        path.write_text(junk)
        with pytest.raises(FormatError, match=r"pre-10-true\.json"):
            files.load()


# ---- how they run -------------------------------------------------------------------------------------------------


def test_a_hook_has_fixed_arguments_and_a_clean_environment(script: Callable[[str], str]) -> None:
    os.environ["ASRFS_SECRET"] = "secret"
    try:
        result = run(
            script(
                'echo "$#:$1:$ASRFS_MACHINE:$ASRFS_PHASE:$(pwd):$(umask)"; env | grep -c . ; cat; echo $ASRFS_SECRET'
            )
        )
    finally:
        del os.environ["ASRFS_SECRET"]
    assert result.output.startswith("1:one two:web1:pre:/:0077") and "secret" not in result.output
    assert result.exit_code == 0 and failure_of(result) is None


def test_an_exit_code_and_a_signal_are_failures(script: Callable[[str], str]) -> None:
    assert failure_of(run(script("echo broken; exit 9"))) == "hook h: exit code 9: broken"
    assert failure_of(run(script("kill -SEGV $$"))) == "hook h: ended by SIGSEGV"


def test_a_hook_that_hangs_is_killed_with_its_group(script: Callable[[str], str], scratch: Path) -> None:
    path = script(f"sleep 1000 & echo $! > {scratch}/child; trap '' TERM; wait")
    result = run(path, timeout_s=0.5)
    assert failure_of(result) == "hook h: killed: it had not ended after 0.5 s" and result.seconds < 5
    wait_until(lambda: not Path(f"/proc/{(scratch / 'child').read_text().strip()}").exists(), what="the child's end")


def test_a_gigabyte_of_output_hurts_nobody(script: Callable[[str], str]) -> None:
    result = run(script("echo first; head -c 1073741824 /dev/zero"), timeout_s=60)
    assert result.exit_code == 0 and result.output.startswith("first") and len(result.output) <= 200


def test_endless_output_and_a_silent_hook_end_by_their_time(script: Callable[[str], str]) -> None:
    for text in ("yes", "exec >&-; exec sleep 1000"):
        result = run(script(text), timeout_s=0.5)
        assert "not ended after 0.5 s" in str(result.happened) and result.seconds < 5


def test_children_left_behind_are_killed_even_those_that_left_the_group(scratch: Path) -> None:
    """In a process of its own: it adopts orphans, and the tests' own process must not."""
    child = scratch / "child"
    script = scratch / "leaver.sh"
    script.write_text(
        f"#!/bin/sh\nsetsid sh -c 'echo $$ > {child}; exec sleep 1000' &\nwhile [ ! -s {child} ]; do :; done\n"
    )
    script.chmod(0o755)
    program = (
        "from tests.t1_unit.test_hooks import *; adopt_orphans();"
        "bystander = subprocess.Popen(['sleep', '1000']);"
        f"print(run({str(script)!r})); print(bystander.poll()); bystander.kill(); bystander.wait()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert "left 1 processes behind: killed" in done.stdout and "exit_code=0" in done.stdout, done.stdout
    assert done.stdout.endswith("None\n"), "what was there before the hook is not its"
    assert not Path(f"/proc/{child.read_text().strip()}").exists()
    assert adopt_orphans is not None


# ---- shipped ------------------------------------------------------------------------------------------------------


def fake_client(directory: Path, name: str, text: str) -> dict[str, str]:
    """A client program of a database that notes what it is told."""
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)
    return {"PATH": f"{directory}:/usr/bin:/bin", "ASRFS_PHASE": "pre"}


def installed(scratch: Path, name: str) -> str:
    (scratch / "hooks").mkdir(mode=0o700, exist_ok=True)
    return shipped_hooks.install(name, str(scratch / "hooks"))


def test_mysql_holds_its_lock_until_the_input_ends(scratch: Path) -> None:
    said = scratch / "said"
    loop = f'while read -r line; do echo "$line" >> {said}; case $line in SELECT*) echo holding;; esac; done'
    environment = fake_client(scratch, "mariadb", f'echo "$@" >> {said}; {loop}')
    with subprocess.Popen(
        [installed(scratch, "mysql"), "-u", "me"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as hook:
        assert hook.stdin is not None and hook.stdout is not None
        assert hook.stdout.readline() == "holding\n"
        assert "UNLOCK" not in said.read_text() and hook.poll() is None
        hook.stdin.close()
        assert hook.wait(10) == 0
    words, *statements = said.read_text().splitlines()
    assert words.startswith("-u me ")
    assert statements == ["FLUSH TABLES WITH READ LOCK;", "SELECT 'holding';", "UNLOCK TABLES;"]


def test_mysql_ends_when_its_connection_is_lost(scratch: Path) -> None:
    environment = fake_client(scratch, "mariadb", "read -r a; read -r b; echo holding; exit 5")
    with subprocess.Popen(
        [installed(scratch, "mysql")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as hook:
        assert hook.wait(10) == 5, "a lock that is lost must be noticed"


def test_generic_and_postgresql_say_what_they_are_for(scratch: Path) -> None:
    said = scratch / "said"
    environment = fake_client(scratch, "systemctl", f'echo "$@" >> {said}')
    fake_client(scratch, "psql", f'echo "$@" >> {said}')
    for phase in ("pre", "post"):
        subprocess.run(
            [installed(scratch, "generic"), "app.service"], env={**environment, "ASRFS_PHASE": phase}, check=True
        )
    subprocess.run([installed(scratch, "postgresql"), "-h", "/run/x"], env=environment, check=True)
    assert said.read_text().splitlines() == [
        *("stop app.service", "start app.service"),
        "-XqAt -v ON_ERROR_STOP=1 -h /run/x -d postgres -c CHECKPOINT",
    ]
    done = subprocess.run([installed(scratch, "generic")], env=environment, capture_output=True, check=False)
    assert done.returncode != 0


RECIPES = (Path(__file__).parents[2] / "docs/points.md").read_text()


@pytest.mark.parametrize(
    ("program", "client"),
    [
        ("freeze-guest", ("virsh", 'echo "$@" >> {said}')),
        ("freeze-guest-socket", ("socat", "cat >> {said}; echo '{{\"return\": 1}}'")),
    ],
)
def test_the_recipes_for_virtual_machines_freeze_and_thaw(scratch: Path, program: str, client: tuple[str, str]) -> None:
    """As they stand in the documentation, with a program in the place of the one that talks to the guest."""
    blocks = [
        block for block in RECIPES.split("\n\n") if f"/usr/local/sbin/{program} " in block and "#!/bin/sh" in block
    ]
    path = scratch / program
    path.write_text("\n".join(line.removeprefix("    ") for line in blocks[0].splitlines()) + "\n")
    path.chmod(0o755)
    said = scratch / "said"
    said.touch()
    environment = fake_client(scratch, client[0], client[1].format(said=said))
    with subprocess.Popen(
        [path, "vm7"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as hook:
        assert hook.stdin is not None and hook.stdout is not None
        assert hook.stdout.readline() == "frozen\n"
        assert "guest-fsfreeze-freeze" in said.read_text() and "thaw" not in said.read_text()
        hook.stdin.close()
        assert hook.wait(10) == 0
    assert said.read_text().count("guest-fsfreeze-thaw") == 1


def test_a_shipped_hook_that_was_changed_stays_as_it_is(scratch: Path) -> None:
    path = Path(installed(scratch, "postgresql"))
    assert path.stat().st_mode & 0o777 == 0o700
    path.write_text("#!/bin/sh\n# mine\n")
    assert Path(installed(scratch, "postgresql")).read_text() == "#!/bin/sh\n# mine\n"
