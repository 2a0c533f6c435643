"""`power`: power losses of a served machine, with real filesystems below it.

A case runs a machine whose state directory lies on an ext4 or xfs on a device that remembers every write and flush,
under stamped writes with fsync. Then power is cut at moments drawn at random: the device as it was then, less what was
not flushed, is mounted, which replays the filesystem's journal, and the machine is served from it. I2: it has every
write that an answered fsync covered. I9: it is a prefix. I1: no image held anything behind that prefix.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from asrfs.daemon.state import ROLES
from tests.proof.kernel.filesystems import mounted_copy
from tests.proof.kernel.loads import StampLoad
from tests.proof.kernel.power import RecordedDevice, recorded_device
from tests.proof.kernel.world import PROGRAM
from tests.proof.level import Case, Context, Level, Notes
from tests.t5_system.machine import HostUnderTest, run_tool
from tests.t5_system.stamps import Stamper
from tests.waiting import wait_until

BLOCKS = 512
DEVICE = "480M"
WRITES = 4000
CUTS_A_CASE = 10


@dataclass(frozen=True)
class Answered:
    """The fsync behind operation `done` was answered; the device had got `appended` and flushed `flushed`."""

    done: int
    flushed: int
    appended: int


def run_machine(device: RecordedDevice, where: Path, stamper: Stamper) -> list[Answered]:
    """Serve a machine with its state at `where`, write, and end it all at once; what was answered when."""
    answered: list[Answered] = []

    def note(done: int) -> None:
        found = device.positions()
        answered.append(Answered(done, found["durable"], found["appended"]))

    inner = HostUnderTest(where, name="inner", program=PROGRAM)
    inner.init(bare=f"{BLOCKS * 4}K")
    inner.serve()
    load = StampLoad(stamper, [inner.mount / "bare.img"], on_synced=note)
    try:
        load.go_on(WRITES, "writes", 90.0)
    finally:
        load.abandon()
        end_at_once(inner)
    load.check_alive()
    return answered


def end_at_once(inner: HostUnderTest) -> None:
    """SIGKILL of all its processes, and its mount taken away, so that the filesystem below can be unmounted."""
    for pid in [pid for role in ROLES if (pid := inner.pid(role))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    inner.wait()
    wait_until(lambda: not any(inner.pid(role) for role in ROLES), what="the end of the machine")
    run_tool("umount", "--lazy", inner.mount)


def check_after_loss(where: Path, stamper: Stamper, at_least: int) -> None:
    """Serve the machine whose state is at `where`, as found after the loss."""
    with contextlib.suppress(FileNotFoundError):
        (where / "disks").rmdir()
    inner = HostUnderTest(where, name="inner", program=PROGRAM)
    image = inner.image("bare")
    ahead = stamper.greatest([image])
    inner.serve()
    try:
        k = stamper.check([inner.mount / "bare.img"], at_least=at_least)
        assert ahead <= k, f"I1: the image had operation {ahead} before its record, the history ends at {k}"
        assert inner.stop() == 0, inner.said()
    finally:
        inner.close()
    stamper.check([image], exactly=k)


def draw_cuts(device: RecordedDevice, lsns: range, rng: random.Random) -> list[int]:
    """Moments anywhere, and as many at which the device held writes that were not flushed."""
    unflushed = [lsn for lsn in lsns if lsn - device.flushed_lsn(lsn) > 1]
    chosen = rng.sample(unflushed, min(CUTS_A_CASE // 2, len(unflushed)))
    return sorted([*chosen, *rng.choices(lsns, k=CUTS_A_CASE - len(chosen))])


def _run(device: RecordedDevice, scratch: Path, kind: str, rng: random.Random, notes: Notes) -> None:
    stamper = Stamper(rng.randrange(1 << 30), 1, BLOCKS)
    where = scratch / "below"
    where.mkdir()
    run_tool(f"mkfs.{kind}", "-q", device.device)
    run_tool("mount", "-o", "noatime", device.device, where)
    answered = run_machine(device, where, stamper)
    run_tool("umount", where)
    device.end()
    cut = scratch / "cut.img"
    for lsn in draw_cuts(device, range(answered[0].appended, answered[-1].appended + 1), rng):
        device.cut(lsn, cut, rng, notes)
        flushed = device.flushed_lsn(lsn)
        at_least = max((each.done for each in answered if each.flushed <= flushed), default=0)
        with mounted_copy(cut, where, kind) as mounted:
            try:
                check_after_loss(mounted, stamper, at_least)
            except AssertionError as error:
                raise AssertionError(f"power cut at write {lsn} of the device, {flushed} flushed: {error}") from error
        notes.count()
        notes.fired(kind)


def _cases(context: Context) -> Iterator[Case]:
    for number in itertools.count(1):
        kind = ("ext4", "xfs")[number % 2]
        label = f"{kind} {number}"

        def run(notes: Notes, label: str = label, kind: str = kind) -> None:
            scratch = context.scratch / label.replace(" ", "-")
            scratch.mkdir()
            with recorded_device(scratch / "outer", DEVICE) as device:
                _run(device, scratch, kind, context.rng(label), notes)

        yield Case(label, run)


LEVEL = Level(
    name="power",
    unit="power losses",
    submission=20,
    release=500,
    faults=("ext4", "xfs", "write lost", "write torn"),
    cases=_cases,
)
