"""`prefixes`: a real filesystem's write log, and the disk at LSN after LSN of it.

A case makes an ext4 on a served disk, copies, syncs, deletes and trims there, and ships all of it. Then, at a thousand
LSNs, the recovery point's bytes are compared with what the journal's records leave, put together by `write_log` (I9).
A sample is exported and mounted: ext4 replays its journal, is clean by e2fsck, and holds every file that had been
synced by then, byte for byte (I2).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from asrfs.daemon import control
from asrfs.model.machine import DiskRecord
from replica_store.points.builder import build_states, disks_of, resolve
from replica_store.points.point_disk import DiskState, FrameCache, PointDisk
from replica_store.vault.vault import Vault
from tests.fakes import log_writes_replay
from tests.proof.kernel.filesystems import check_filesystem, mounted_copy
from tests.proof.kernel.world import World, world
from tests.proof.kernel.write_log import KIND_NAMES, Record, flush_boundaries, put, read_write_log
from tests.proof.level import Case, Context, Level, Notes
from tests.t5_system.machine import run_tool

DISK_BYTES = 16 << 20
FILES_BYTES = 3 << 19
ROUNDS = 20
"""All of it together is less than a segment, which stays as long as the journal goes on in it."""
PREFIXES_A_CASE = 1000
MOUNTS_A_CASE = 10
MODES = ("ordered", "journal")


@dataclass(frozen=True)
class Synced:
    """What was there, and durable, once the disk server had appended `lsn`."""

    lsn: int
    files: dict[str, bytes]


def positions(made: World) -> dict[str, int]:
    return control.call(made.host.state.socket_path("disk_server"), "positions")


def write_files(made: World, where: Path, rng: random.Random) -> list[Synced]:
    """Make and delete files, syncing after each round."""
    files: dict[str, bytes] = {}
    synced = []
    for number in range(ROUNDS):
        for name in rng.sample(sorted(files), len(files) // 2):
            (where / name).unlink()
            del files[name]
        while sum(map(len, files.values())) < FILES_BYTES:
            name = f"{number}-{len(files)}"
            files[name] = rng.randbytes(rng.choice((1, 700, 5000, 20_000, 70_000)))
            (where / name).write_bytes(files[name])
        run_tool("sync", "-f", where)
        synced.append(Synced(positions(made)["appended"], dict(files)))
        if number % 5 == 4:
            run_tool("fstrim", where)
    return synced


def compare_prefixes(made: World, records: list[Record], lsns: list[int], notes: Notes) -> None:
    """At each LSN, ascending, the point's bytes equal the model's."""
    model = bytearray(DISK_BYTES)
    done = 0
    with Vault.open(str(made.store.path)) as vault:
        cut = resolve(vault, made.host.name, "latest")
        frames = FrameCache(vault)
        disk = disks_of(vault, cut)[0]
        state: DiskState | None = None
        for number, lsn in enumerate(lsns):
            for record in records[done:lsn]:
                put(model, record)
                notes.fired(KIND_NAMES[record.kind])
            done = lsn
            # Now and then from the beginning of the history, else on from the LSN before.
            state = _state(vault, cut.machine.id, lsn, disk, None if number % 50 == 0 else state)
            found = PointDisk(state, frames).read(0, DISK_BYTES)
            assert found == model, f"I9: at LSN {lsn} {_first_difference(found, model)}"
            notes.count()


def _state(vault: Vault, machine_id: str, lsn: int, disk: DiskRecord, before: DiskState | None) -> DiskState:
    base = {disk.slot: before} if before is not None else None
    return build_states(vault, machine_id, lsn, [disk], base=base)[disk.slot]


def _first_difference(found: bytes, model: bytearray) -> str:
    for at in range(0, DISK_BYTES, 512):
        if found[at : at + 512] != model[at : at + 512]:
            return f"sector {at // 512} differs"
    return "the length differs"


def check_write_log(made: World, records: list[Record]) -> None:
    """Whoever replays what `inspect --log-writes` makes has the same disk (I9)."""
    log = made.root / "disk.log"
    said = made.asrfs("inspect", made.host.path / "journal", "--log-writes", log)
    assert (said["first_lsn"], said["last_lsn"]) == (1, len(records))
    replayed, model = bytearray(DISK_BYTES), bytearray(DISK_BYTES)
    for entry in log_writes_replay.entries(log):
        log_writes_replay.put(replayed, entry)
    for record in records:
        put(model, record)
    assert replayed == model, f"I9: the replayed write log: {_first_difference(bytes(replayed), model)}"


def mount_prefix(made: World, lsn: int, synced: list[Synced]) -> None:
    """Export the disk at an LSN and mount it: replayed, clean, and every file is there that must be."""
    (image,) = made.export(f"lsn:{lsn}", "prefix")
    last = max(i for i, each in enumerate(synced) if each.lsn <= lsn)
    after = synced[min(last + 1, len(synced) - 1)].files
    with mounted_copy(image, made.root / "copy", "ext4") as where:
        for name, content in synced[last].files.items():
            if name in after:
                found = (where / name).read_bytes()
                assert found == content, f"I2: file {name} was synced at LSN {synced[last].lsn}, differs at {lsn}"
    check_filesystem(image, "ext4")


def _run(made: World, mode: str, rng: random.Random, notes: Notes) -> None:
    where = made.root / "fs"
    where.mkdir()
    device = made.attach_bare("root")
    run_tool("mkfs.ext4", "-q", "-F", device)
    run_tool("mount", "-o", f"noatime,data={mode}", device, where)
    synced = write_files(made, where, rng)
    run_tool("umount", where)
    run_tool("losetup", "--detach", device)
    made.drained()
    last = positions(made)["appended"]
    records = read_write_log(made.host.path / "journal", last)
    first = 1 + next(record.lsn for record in records if record.length)
    every = range(first, last + 1)
    lsns = sorted(rng.sample(every, min(len(every), PREFIXES_A_CASE)))
    compare_prefixes(made, records, lsns, notes)
    check_write_log(made, records)
    begun = synced[0].lsn
    flushes = [lsn for lsn in flush_boundaries(records) if lsn >= begun]
    anywhere = [lsn for lsn in lsns if lsn >= begun]
    for fault, among in (("mounted at a flush", flushes), ("mounted anywhere", anywhere)):
        for lsn in rng.sample(among, min(MOUNTS_A_CASE // 2, len(among))):
            mount_prefix(made, lsn, synced)
            notes.fired(fault)


def _cases(context: Context) -> Iterator[Case]:
    for number in itertools.count(1):
        mode = MODES[number % len(MODES)]
        label = f"{mode} {number}"

        def run(notes: Notes, label: str = label, mode: str = mode) -> None:
            with world(context.scratch / label.replace(" ", "-"), root=f"{DISK_BYTES >> 20}M") as made:
                _run(made, mode, context.rng(label), notes)

        yield Case(label, run)


LEVEL = Level(
    name="prefixes",
    unit="prefixes",
    submission=2000,
    release=50_000,
    faults=("WRITE", "ZERO", "DISCARD", "mounted at a flush", "mounted anywhere"),
    cases=_cases,
)
