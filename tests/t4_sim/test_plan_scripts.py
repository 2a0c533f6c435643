"""Scripts of plans as real processes: what they print, and what they or a killed command leave behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from asrfs.errors import AsrfsError, NotFoundError, TemporaryError
from replica_store.failover import processes
from replica_store.failover.plan import Script
from replica_store.failover.plan_script import run_script
from tests.waiting import wait_until

LONG_S = 600


@pytest.fixture
def mark() -> Iterator[str]:
    mark = f"{secrets.token_hex(16)}/group/pre/step"
    yield mark
    processes.end(mark, None)


def shell(text: str, timeout: str = "60s") -> Script:
    return Script(name="one", command=("/bin/sh", "-c", text), timeout=timeout)


def run(script: Script, mark: str, **variables: str) -> str:
    return run_script(script, {"PATH": "/usr/bin:/bin", **variables}, mark)


def wait_for(path: Path) -> str:
    """What is in it, once it is there: it is put there whole."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.01)
    return path.read_text().strip()


@contextmanager
def killed_with(script: str, mark: str) -> Iterator[None]:
    """A command that carries the script out; killed behind this block."""
    program = (
        "import sys; from replica_store.failover.plan_script import run_script, Script; "
        "run_script(Script(name='one', command=('/bin/sh', '-c', sys.argv[1])), {'PATH': '/usr/bin:/bin'}, sys.argv[2])"
    )
    command = subprocess.Popen([sys.executable, "-c", program, script, mark], cwd=Path(__file__).parents[2])
    try:
        yield
    finally:
        command.send_signal(signal.SIGKILL)
        command.wait()


def children() -> list[str]:
    """Names of our children that are alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, rest = entry.read_text().partition("(")[2].rpartition(")")[::2]
            state, parent = rest.split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.append(name)
    return found


def has_ended(pid: int) -> bool:
    """Within some seconds."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 20)[0])
    finally:
        os.close(descriptor)


def test_the_end_of_what_it_printed(mark: str) -> None:
    assert run(shell("echo $WHO; echo more >&2"), mark, WHO="me") == "me more"
    assert len(run(shell("yes | head -c 100000; echo end"), mark)) <= 300
    with pytest.raises(AsrfsError, match=r"script one ended with 7: no luck"):
        run(shell("echo no luck; exit 7"), mark)
    assert run(shell("echo one; echo two >/dev/stderr; echo three"), mark) == "one two three"
    run(shell("setsid yes & sleep 0.1"), mark)  # it never stops
    processes.end(mark, None)
    assert run(shell("echo before; exec >&- 2>&-; sleep 0.1"), mark) == "before"
    with pytest.raises(NotFoundError, match="/no/such/program"):
        run_script(Script(name="one", command=("/no/such/program",)), {}, mark)


def test_what_it_leaves_behind_goes_on_and_nobody_waits_for_it(mark: str, scratch: Path) -> None:
    """Also one that goes on printing where its script did."""
    told, go_on, came = scratch / "told", scratch / "go-on", scratch / "came"
    service = f"until [ -e {go_on} ]; do sleep 0.05; done; echo here; echo $? > {came}.new; mv {came}.new {came}; "
    service += f"sleep {LONG_S}"
    begun = time.monotonic()
    assert run(shell(f"setsid sh -c '{service}' & echo $! > {told}; echo up"), mark) == "up"
    assert time.monotonic() - begun < LONG_S / 10
    go_on.touch()
    assert wait_for(came) == "0", "printing has killed it"
    pid = int(told.read_text())
    run(shell("true"), f"{mark}-of-another")
    assert processes.find(mark), "another step ends nothing of this"
    run(shell("true"), mark)
    assert has_ended(pid), "the same step, begun again, finds nothing of before"
    wait_until(lambda: not [each for each in children() if each == "cat"], what="the end of who read on")


def test_all_it_started_is_killed_when_its_time_is_up(mark: str, scratch: Path) -> None:
    told = scratch / "told"
    script = f"setsid sleep {LONG_S} & echo $! > {told}.new; mv {told}.new {told}; exec sleep {LONG_S}"
    for seconds in (1, 4, 16, 64):  # the shortest in which it comes as far as that
        with pytest.raises(TemporaryError, match=f"script one did not end within {seconds}s"):
            run(shell(script, f"{seconds}s"), mark)
        assert not processes.find(mark)
        if told.exists():
            break
    assert has_ended(int(told.read_text()))


def test_a_script_goes_on_when_the_command_is_killed(mark: str, scratch: Path) -> None:
    """To its end, whatever it prints: nobody cuts it off in the middle."""
    told, go_on, came = scratch / "told", scratch / "go-on", scratch / "came"
    with killed_with(
        f"echo $$ > {told}.new; mv {told}.new {told}; until [ -e {go_on} ]; do sleep 0.05; done; "
        f"yes | head -c 200000; echo $? > {came}.new; mv {came}.new {came}",
        mark,
    ):
        wait_for(told)
    go_on.touch()
    assert wait_for(came) == "0"


def test_what_a_killed_command_left_is_ended_before_it_is_begun_again(mark: str, scratch: Path) -> None:
    told = scratch / "told"
    with killed_with(f"echo $$ > {told}.new; mv {told}.new {told}; exec sleep {LONG_S}", mark):
        pid = int(wait_for(told))
    # It outlives the command. So may, for a moment, the `mv`.
    wait_until(lambda: [each.pid for each in processes.find(mark)] == [pid])
    # Whoever was killed may be there as a zombie.
    assert run(shell(f"grep -s 'State:.[RSD]' /proc/{pid}/status || echo gone"), mark) == "gone"
