"""`power`: power losses of a served machine and of its store, with real filesystems below them.

A case runs a machine whose state directory lies on an ext4 or xfs on a device that remembers every write and flush,
under stamped writes with fsync. Then power is cut at moments drawn at random: the device as it was then, less what was
not flushed, is mounted, which replays the filesystem's journal, and the machine is served from it. I2: it has every
write that an answered fsync covered. I9: it is a prefix. I1: no image held anything behind that prefix.

A case `pair` has a store too, on such a device of its own, and both lose power, each at a moment of its own. I3: the
store has all that it promised. I5: its points are listed and exact. I4: the host, which has freed segments, goes on
where the store ends.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from tests.proof.kernel.filesystems import mounted_copy
from tests.proof.kernel.loads import StampLoad
from tests.proof.kernel.moments import Answered, done_at, draw_instant, draw_losses
from tests.proof.kernel.pair import Pair
from tests.proof.kernel.power import RecordedDevice, end_at_once, recorded_device
from tests.proof.kernel.world import PROGRAM
from tests.proof.level import Case, Context, Level, Notes
from tests.t5_system.machine import HostUnderTest, run_tool
from tests.t5_system.stamps import Stamper

BLOCKS = 512
DEVICE = "480M"
WRITES = 2000
HOST_DEVICE = "1200M"
VAULT_DEVICE = "320M"
CUTS_A_CASE = 5


def run_machine(device: RecordedDevice, where: Path, stamper: Stamper) -> list[Answered]:
    """Serve a machine with its state at `where`, write, and end it all at once; what was answered when."""
    answered: list[Answered] = []

    def note(done: int) -> None:
        answered.append(Answered(done, device.now()))

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
    lsns = range(answered[0].at.appended, answered[-1].at.appended + 1)
    drawn = [draw_instant(device, lsns, rng) if n % 2 else device.at(rng.choice(lsns)) for n in range(CUTS_A_CASE)]
    for at in sorted(drawn):
        device.cut(at, cut, rng, notes)
        with mounted_copy(cut, where, kind) as mounted:
            try:
                check_after_loss(mounted, stamper, done_at(answered, at))
            except AssertionError as error:
                raise AssertionError(f"power cut of the device at {at}: {error}") from error
        notes.count()
        notes.fired(kind)


def _run_pair(made: Pair, rng: random.Random, notes: Notes) -> None:
    stamper = Stamper(rng.randrange(1 << 30), 1, BLOCKS)
    life = made.live(stamper, notes)
    for loss in draw_losses(life, made.host_device, made.vault_device, CUTS_A_CASE, rng):
        with made.after(loss, rng, notes):
            try:
                made.check(loss, stamper)
            except AssertionError as error:
                raise AssertionError(f"{loss}: {error}") from error
        notes.count()
        notes.fired(made.kind)
        notes.fired("store's power lost")


def _cases(context: Context) -> Iterator[Case]:
    plans = itertools.cycle(itertools.product(("pair", "host"), ("ext4", "xfs")))
    for number, (who, kind) in enumerate(plans, 1):
        label = f"{who} {kind} {number}"

        def run(notes: Notes, label: str = label, who: str = who, kind: str = kind) -> None:
            scratch = context.scratch / label.replace(" ", "-")
            scratch.mkdir()
            if who == "host":
                with recorded_device(scratch / "outer", DEVICE) as device:
                    _run(device, scratch, kind, context.rng(label), notes)
                return
            with (
                recorded_device(scratch / "outer-host", HOST_DEVICE) as host,
                recorded_device(scratch / "outer-vault", VAULT_DEVICE) as vault,
                contextlib.closing(Pair(scratch, kind, host, vault)) as made,
            ):
                _run_pair(made, context.rng(label), notes)

        yield Case(label, run)


LEVEL = Level(
    name="power",
    unit="power losses",
    submission=20,
    release=500,
    faults=("ext4", "xfs", "write lost", "write torn", "store's power lost", "segments freed"),
    cases=_cases,
)
