"""A point copied back over live disks with real programs: byte for byte what export gives, all disks and members
together, refused while they are used, and finished whoever is killed meanwhile."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.t5_system.machine import HostUnderTest
from tests.t5_system.site import DISK, GROUP, Site
from tests.waiting import wait_until
from tools.lab import Lab

pytestmark = pytest.mark.timeout(300)
MIB = 1 << 20
SIZES = {"files": 48 * MIB, "plain": 2 * MIB}
SLOWLY = "bandwidth_limit=8M"
"""What is written back goes to the store again, which takes seconds, so that somebody can die meanwhile."""


@pytest.fixture
def lab(scratch: Path) -> Iterator[Lab]:
    """A store, and an enrolled, served machine with two disks."""
    lab = Lab(parent=scratch)
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        for name, size in SIZES.items():
            lab.asrfs("disk", "add", name, "--size", str(size))
        lab.asrfs("set", "crash_interval=24h", "application_interval=off")
        lab.enroll()
        lab.start_host()
        yield lab
    finally:
        lab.close()


def store(lab: Lab, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return _run([sys.executable, "-m", "replica_store.cli.main", "--vault", lab.vault, "--json", *words])


def _run(words: list[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        stdin=subprocess.DEVNULL,
    )


def refused(lab: Lab, code: int, *words: str) -> str:
    done = store(lab, *words)
    assert done.returncode == code, f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
    assert done.stderr.startswith("asrfs: error: "), done.stderr
    return done.stderr


def promote(lab: Lab, point: str, *words: str) -> dict[str, Any]:
    done = store(lab, "promote", lab.machine, "--point", point, "--yes", *words)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["state"] == "done"
    return document


def scribble(path: Path, rng: random.Random, times: int, least: int = 0) -> None:
    """Writes, and holes, all over a disk."""
    size = path.stat().st_size
    fd = os.open(path, os.O_RDWR)
    try:
        for _ in range(times):
            length = rng.randrange(1, 64) * 4096
            offset = rng.randrange(least, size - length) // 4096 * 4096
            os.pwrite(fd, bytes(length) if rng.random() < 0.3 else rng.randbytes(length), offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(lab: Lab, rng: random.Random, times: int = 60) -> None:
    for name in SIZES:
        scribble(lab.disks / f"{name}.img", rng, times if name == "files" else 5)


def point_of(lab: Lab, name: str) -> dict[str, bytes]:
    """Make a point of what the disks are, which is returned."""
    lab.asrfs("point", "create", "--name", name, "--wait")
    return disks_of(lab)


def disks_of(lab: Lab) -> dict[str, bytes]:
    return {name: (lab.disks / f"{name}.img").read_bytes() for name in SIZES}


def exported(lab: Lab, point: str) -> dict[str, bytes]:
    found = {}
    for name in SIZES:
        output = lab.root / f"exported-{name}"
        lab.replica_store("export", lab.machine, name, "--point", point, "--output", output, "--force")
        found[name] = output.read_bytes()
    return found


def is_held(lab: Lab) -> bool:
    fd = os.open(lab.disks / "plain.img", os.O_RDWR)
    try:
        os.pwrite(fd, bytes(4096), 0)
    except OSError as error:
        return error.errno == errno.EROFS
    finally:
        os.close(fd)
    return False


def phase(lab: Lab) -> str:
    try:
        return str(json.loads((lab.state / "promoting.json").read_text())["phase"])
    except FileNotFoundError:
        return "none"


def alarms(lab: Lab) -> list[str]:
    return [alarm["id"] for alarm in lab.status()["alarms"]]


def test_i7_and_i9_a_point_comes_back_byte_for_byte_and_what_was_there_is_a_point(lab: Lab, rng: random.Random) -> None:
    write_all(lab, rng)
    good = point_of(lab, "good")
    write_all(lab, rng)
    spoilt = point_of(lab, "spoilt")
    scribble(lab.disks / "plain.img", rng, 3)
    last = disks_of(lab)
    assert good != spoilt != last
    planned = store(lab, "promote", lab.machine, "--point", "good")
    assert planned.returncode == 2 and "nothing was changed: say --yes" in planned.stderr
    assert {each["disk"] for each in json.loads(planned.stdout)["disks"]} == set(SIZES)
    assert disks_of(lab) == last and not lab.replica_store("promotions")
    done = promote(lab, "good")
    assert disks_of(lab) == good == exported(lab, "good"), "I9: byte for byte"
    (machine,) = done["machines"]
    assert 0 < machine["bytes_written"] < sum(SIZES.values())
    assert machine["bytes_changed"] == machine["bytes_written"], "only differences travel"
    assert exported(lab, machine["before"]) == last, "I7: what was there is a point"
    assert exported(lab, machine["end"]) == good
    assert exported(lab, "spoilt") == spoilt
    between = machine["before_lsn"] + 3
    line = refused(
        lab, 4, "export", lab.machine, "plain", "--point", f"lsn:{between}", "--output", str(lab.root / "none")
    )
    assert "lies in a gap" in line, "I5"
    status = lab.status()
    assert status["state"] == "protected" and alarms(lab) == [] and not is_held(lab)
    write_all(lab, rng, 5)
    lab.asrfs("drain", "--timeout", "60s")
    assert lab.asrfs("verify")["chunks_different"] == 0
    promote(lab, machine["before"])
    assert disks_of(lab) == last, "and back again"
    assert [each["state"] for each in lab.replica_store("promotions")] == ["done", "done"]


def test_disks_in_use_are_refused_and_nothing_has_changed(lab: Lab, rng: random.Random) -> None:
    write_all(lab, rng)
    point_of(lab, "good")
    (lab.root / "mounted").mkdir()
    lab.attach("files", "--format", "ext4", "--on", lab.root / "mounted")
    (lab.root / "mounted" / "file").write_text("content")
    line = refused(lab, 4, "promote", lab.machine, "--point", "good", "--yes")
    assert "disk files is attached as /dev/loop" in line and "asrfs detach files" in line
    (lab.root / "mounted" / "other").write_text("and it goes on")
    os.sync()
    assert phase(lab) == "none" and not is_held(lab)
    lab.asrfs("detach", "files")
    with (lab.disks / "plain.img").open("rb"):
        line = refused(lab, 4, "promote", lab.machine, "--point", "good", "--yes")
        assert f"process {os.getpid()} has" in line and "plain.img open" in line
    assert [each["state"] for each in lab.replica_store("promotions")] == ["cancelled", "cancelled"]
    promote(lab, "good")
    device = lab.attach("plain")
    assert device.startswith("/dev/loop")
    lab.asrfs("detach", "plain")


def started_with(lab: Lab, memory_mib: int) -> Any:
    file = lab.root / "boot.toml"
    file.write_text(f'kind = "qemu"\n[qemu]\nmemory = "{memory_mib}M"\n')
    return lab.asrfs("boot", "set", file)


def test_a_filesystem_comes_back_and_so_does_how_the_machine_is_started(lab: Lab, rng: random.Random) -> None:
    mounted = lab.root / "mounted"
    mounted.mkdir()
    boot = started_with(lab, 256)
    lab.attach("files", "--format", "ext4", "--on", mounted)
    for number in range(50):
        (mounted / f"file{number}").write_bytes(rng.randbytes(20_000))
    before = {path.name: path.read_bytes() for path in mounted.iterdir() if path.is_file()}
    lab.asrfs("point", "create", "--consistency", "filesystem", "--name", "good", "--wait")
    for path in mounted.glob("file*"):
        path.unlink()
    (mounted / "ransom").write_bytes(rng.randbytes(5 * MIB))
    os.sync()
    lab.asrfs("detach", "files")
    assert started_with(lab, 512) != boot
    lab.asrfs("drain", "--timeout", "60s")
    out = lab.root / "out"
    together = lab.replica_store("export", lab.machine, "--point", "good", "--directory", out)
    (machine,) = together["machines"]
    assert machine["boot"]["kind"] == boot["kind"] and json.loads((out / f"{lab.machine}.json").read_text()) == machine
    assert {name: (out / f"{name}.img").read_bytes() for name in SIZES} == exported(lab, "good")
    planned = json.loads(store(lab, "promote", lab.machine, "--point", "good").stdout)
    assert any("asrfs boot" in each for each in planned["warnings"])
    promote(lab, "good")
    assert lab.asrfs("boot", "show") == boot
    device = lab.attach("files")
    assert (
        subprocess.run(["fsck.ext4", "-f", "-y", device], check=False, capture_output=True, timeout=60).returncode <= 1
    )
    lab.asrfs("detach", "files")
    lab.attach("files", "--on", mounted)
    assert {path.name: path.read_bytes() for path in mounted.iterdir() if path.is_file()} == before
    lab.asrfs("detach", "files")


def test_disks_that_were_added_removed_or_grown_since(lab: Lab, rng: random.Random) -> None:
    write_all(lab, rng)
    good = point_of(lab, "good")
    write_all(lab, rng)
    lab.asrfs("disk", "add", "late", "--size", "1M")
    (lab.disks / "late.img").write_bytes(rng.randbytes(MIB))
    lab.asrfs("disk", "resize", "plain", str(3 * MIB))
    wait_until(lambda: (lab.disks / "plain.img").stat().st_size == 3 * MIB, what="the kernel knows it")
    scribble(lab.disks / "plain.img", rng, 5, least=2 * MIB)
    late = (lab.disks / "late.img").read_bytes()
    lab.asrfs("drain", "--timeout", "60s")
    assert "disk late of machine web1 was added since" in refused(lab, 4, "promote", lab.machine, "--point", "good")
    assert "--leave nothing" in refused(
        lab, 2, "promote", lab.machine, "--point", "good", "--leave", "late", "--leave", "nothing"
    )
    promote(lab, "good", "--leave", "late")
    assert disks_of(lab) == good | {"plain": good["plain"] + bytes(MIB)}
    assert (lab.disks / "late.img").read_bytes() == late
    lab.asrfs("disk", "remove", "late", "--yes")
    now = disks_of(lab)
    lab.asrfs("drain", "--timeout", "60s")
    line = refused(lab, 4, "promote", lab.machine, "--point", "before-promote-" + _last(lab)["id"][:12])
    assert "disk late of machine web1 was removed since" in line
    assert disks_of(lab) == now


def _last(lab: Lab) -> dict[str, Any]:
    found: list[dict[str, Any]] = lab.replica_store("promotions")
    return found[-1]


@pytest.mark.parametrize("role", ["agent", "disk_server", "supervisor", "store", "command"])
def test_i5_whoever_is_killed_while_disks_are_written_it_is_finished(lab: Lab, rng: random.Random, role: str) -> None:
    write_all(lab, rng, 300)
    good = point_of(lab, "good")
    write_all(lab, rng, 300)
    lab.asrfs("drain", "--timeout", "60s")
    last = disks_of(lab)
    lab.asrfs("set", SLOWLY)
    words = ["--vault", str(lab.vault), "--json", "promote", lab.machine, "--point", "good", "--yes"]
    said = lab.root / "promote.log"
    with said.open("w") as log:
        command = subprocess.Popen(
            [sys.executable, "-m", "replica_store.cli.main", *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    wait_until(lambda: phase(lab) == "writing", seconds_max=30.0, what="the disks are being written")
    if role == "command":
        command.kill()
        command.wait()
    elif role == "store":
        lab.kill_store()
        lab.start_store()
    elif role == "supervisor":
        assert lab.host is not None
        lab.host.kill()
        lab.host.wait()
        lab.start_host()
    else:
        lab.kill(role)
    if phase(lab) == "writing":
        assert is_held(lab)
        if phase(lab) == "writing":
            with pytest.raises(OSError, match="Input/output"):
                (lab.disks / "files.img").read_bytes()
            status = lab.status()
            is_told = "promoting" in [alarm["id"] for alarm in status["alarms"]]
            assert is_told == (status["state"] == "promoting"), "it may be over by now"
    lab.asrfs("set", "bandwidth_limit=0")
    if role == "command":
        promote(lab, "good")
    else:
        assert command.wait(timeout=120) == 0, said.read_text()
    done = lab.replica_store("promotions")[0]  # of the one that was killed: the next one may find it done
    assert done["state"] == "done"
    assert disks_of(lab) == good == exported(lab, "good")
    assert exported(lab, done["machines"][0]["before"]) == last
    assert phase(lab) == "none" and not is_held(lab)
    assert lab.asrfs("verify")["chunks_different"] == 0


def _begun(words: list[str], said: Path) -> subprocess.Popen[bytes]:
    with said.open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "replica_store.cli.main", *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )


def _end(command: subprocess.Popen[bytes]) -> None:
    command.kill()
    command.wait()


def test_another_point_may_take_the_place_of_one_that_is_being_written(lab: Lab, rng: random.Random) -> None:
    write_all(lab, rng, 300)
    point_of(lab, "good")
    write_all(lab, rng, 300)
    lab.asrfs("drain", "--timeout", "60s")
    last = disks_of(lab)
    lab.asrfs("set", "bandwidth_limit=500K")
    words = ["--vault", str(lab.vault), "promote", lab.machine]
    first = _begun([*words, "--point", "good", "--yes"], lab.root / "first.log")
    try:
        wait_until(lambda: phase(lab) == "writing", seconds_max=30.0, what="the disks are being written")
        (begun,) = lab.replica_store("promotions")
        assert begun["state"] == "writing", "it takes a minute"
        refused(lab, 4, "promote", lab.machine, "--cancel")
        said = lab.root / "second.log"
        second = _begun([*words, "--point", begun["machines"][0]["before"], "--yes"], said)
        try:
            wait_until(lambda: len(lab.replica_store("promotions")) == 2, seconds_max=30.0, what="the other one")
            lab.asrfs("set", "bandwidth_limit=0")
            assert second.wait(timeout=60) == 0
        finally:
            _end(second)
        assert first.wait(timeout=60) in (0, 1)
    finally:
        _end(first)
    assert disks_of(lab) == last
    assert lab.asrfs("verify")["chunks_different"] == 0


def test_nothing_is_held_for_who_is_away(lab: Lab, rng: random.Random) -> None:
    write_all(lab, rng)
    point_of(lab, "good")
    lab.stop_host()
    wait_until(
        lambda: lab.replica_store("machine", "show", lab.machine)["link"] != "up", seconds_max=30.0, what="the end"
    )
    assert "is not connected" in refused(lab, 4, "promote", lab.machine, "--point", "good", "--yes")
    assert refused(lab, 3, "promote", lab.machine, "--point", "nothing")
    assert refused(lab, 2, "promote", lab.machine)
    assert refused(lab, 3, "promote", lab.machine, "--cancel")


# ---- groups ----


@pytest.fixture
def site(scratch: Path) -> Iterator[Site]:
    site = Site(scratch, 2)
    try:
        site.start()
        yield site
    finally:
        site.close()


def test_members_of_a_group_go_back_together_to_one_point_of_it(site: Site, scratch: Path, rng: random.Random) -> None:
    def paths() -> list[Path]:
        return [machine.mount / f"{DISK}.img" for machine in site.machines]

    def write() -> list[bytes]:
        for path in paths():
            fd = os.open(path, os.O_RDWR)
            os.pwrite(fd, rng.randbytes(200_704), rng.randrange(100) * 4096)
            os.fsync(fd)
            os.close(fd)
        return [path.read_bytes() for path in paths()]

    good = write()
    point = site.create(site.machines[0], "--name", "good")
    assert point is not None
    last = write()
    drained(site.machines)
    site.machines[1].asrfs("attach", DISK)
    done = site.store.run("promote", GROUP, "--point", point, "--yes")
    assert done.returncode == 4 and "disk data is attached" in done.stderr, done.stderr
    assert [path.read_bytes() for path in paths()] == last, "nobody went back"
    site.machines[1].asrfs("detach", DISK)
    wait_until(lambda: not any(m.state.is_promoting() for m in site.machines), what="all let go")
    document = site.store.ask("promote", GROUP, "--point", "good", "--yes")
    assert document["state"] == "done" and document["group"] == GROUP
    assert [path.read_bytes() for path in paths()] == good
    out = scratch / "out"
    site.store.ask("export", GROUP, "--point", point, "--directory", out)
    assert [(out / f"m{number}" / f"{DISK}.img").read_bytes() for number in range(2)] == good
    taken = site.store.run("export", GROUP, "--point", "good", "--directory", out)
    assert taken.returncode == 4 and "m0" in taken.stderr, taken.stderr
    for words in (["m0", DISK, "--directory", out], ["m0", "--output", out / "x"], ["m0"]):
        assert site.store.run("export", *words, "--point", "good").returncode == 2
    alone = site.store.run("promote", "m0", "--point", point)
    assert "m1 stay where they are" in alone.stdout
    assert site.store.run("promote", GROUP, "--point", "lsn:3").returncode == 2
    assert site.store.run("promote", GROUP, "--point", "nothing").returncode == 3


def drained(machines: list[HostUnderTest]) -> None:
    asks: list[Callable[[], Any]] = [lambda m=m: m.asrfs("drain", "--timeout", "60s") for m in machines]  # type: ignore[misc]
    for ask in asks:
        ask()
