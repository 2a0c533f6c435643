"""`kills`: SIGKILL of disk server, agent, supervisor and store, one after another at random moments, under load.

A case is one machine: stamped writes on a bare disk, fio with verification and SQLite on a filesystem on another, until
fio is done. Nobody above sees an error. Then bytes are compared: the bare disk after each death, at the end exports,
images, and SQLite's rows in an export that is mounted.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.proof.kernel.filesystems import check_filesystem, mounted_copy, open_filesystem
from tests.proof.kernel.loads import SqliteLoad, StampLoad
from tests.proof.kernel.world import World, world
from tests.proof.level import Case, Context, Level, Notes
from tests.t5_system.machine import run_tool
from tests.t5_system.stamps import Stamper

VICTIMS = ("disk_server", "agent", "supervisor", "store")
BLOCKS = 512
FIO_SECONDS = 14
KILLS_A_CASE_MIN = 5


def start_fio(where: Path, log: Path) -> subprocess.Popen[bytes]:
    """Random writes that are verified while they go on."""
    with log.open("w") as output:
        return subprocess.Popen(
            [
                *("fio", "--name=verify", f"--directory={where}", "--size=24M", "--numjobs=1", "--rw=randwrite"),
                *("--bsrange=4k-64k", "--ioengine=libaio", "--direct=1", "--iodepth=16", "--fsync=32"),
                *(
                    "--verify=crc32c",
                    "--verify_state_save=0",
                    "--verify_fatal=1",
                    "--do_verify=1",
                    "--loops=1000",
                    "--verify_backlog=256",
                ),
                *("--time_based", f"--runtime={FIO_SECONDS}", "--rate_iops=1500"),
            ],
            stdout=output,
            stderr=output,
        )


def _run(made: World, kind: str, rng: random.Random, notes: Notes) -> None:
    where = made.root / "fs"
    where.mkdir()
    device = open_filesystem(made, "files", kind, where)
    log = made.root / "fio.log"
    stamps = StampLoad(Stamper(rng.randrange(1 << 30), 1, BLOCKS), made.disks[:1], fsync_every=64)
    sqlite = SqliteLoad(where / "rows.sqlite3", "WAL" if rng.random() < 0.5 else "DELETE")
    fio = start_fio(where, log)
    kills = 0
    try:
        victims = itertools.chain.from_iterable(rng.sample(VICTIMS, len(VICTIMS)) for _ in itertools.count())
        for victim in victims:
            time.sleep(rng.uniform(0.0, 0.4))  # sleep: the moment of a death is nobody's event
            rows, writes = sqlite.acknowledged, stamps.writer.done
            if fio.poll() is not None:
                break
            made.kill_one(victim)
            stamps.go_on(20, f"writes after the death of the {victim}")
            sqlite.go_on(1, f"rows after the death of the {victim}")
            stamps.check()
            assert sqlite.acknowledged > rows and stamps.writer.done > writes
            kills += 1
            notes.count()
            notes.fired(victim)
        assert fio.wait(timeout=60) == 0, f"I8: fio saw an error: {log.read_text()[-2000:]}"
        assert "verify: bad" not in log.read_text()
        assert kills >= KILLS_A_CASE_MIN, f"only {kills} kills while fio ran"
        rows, last = sqlite.stop(), stamps.stop()
    finally:
        fio.kill()
        fio.wait()
        sqlite.abandon()
        stamps.abandon()
    notes.fired(kind)
    sqlite.check(where / "rows.sqlite3", rows)
    run_tool("umount", where)
    _compare(made, kind, device, sqlite, rows, stamps, last)


def _compare(made: World, kind: str, device: str, sqlite: SqliteLoad, rows: int, stamps: StampLoad, last: int) -> None:
    """Everything that has the disks now: exports, the mount, the images after a clean stop."""
    run_tool("losetup", "--detach", device)
    made.drained()
    bare, files = made.export("latest", "end")
    stamps.stamper.check([bare], exactly=last)
    run_tool("cmp", files, made.disks[1])
    check_filesystem(files, kind)
    with mounted_copy(files, made.root / "copy", kind) as copy:
        sqlite.check(copy / "rows.sqlite3", rows)
    assert made.host.stop() == 0, made.host.said()
    stamps.stamper.check(made.images()[:1], exactly=last)


def _cases(context: Context) -> Iterator[Case]:
    for number in itertools.count(1):
        kind = ("ext4", "xfs")[number % 2]
        label = f"{kind} {number}"

        def run(notes: Notes, label: str = label, kind: str = kind) -> None:
            with world(context.scratch / label.replace(" ", "-"), bare="2M", files="400M") as made:
                _run(made, kind, context.rng(label), notes)

        yield Case(label, run)


LEVEL = Level(
    name="kills",
    unit="kills",
    submission=30,
    release=1000,
    faults=(*VICTIMS, "ext4", "xfs"),
    cases=_cases,
)
