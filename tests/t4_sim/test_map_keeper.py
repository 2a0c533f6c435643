"""A served vault gets its map checkpoints from a process of its own, and goes on without them when that fails."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import structlog
import trio

from replica_store.daemon.map_keeper import AFTER_FAILURE_S, MapKeeper
from replica_store.daemon.map_worker import KEPT
from replica_store.points.builder import build_states
from replica_store.points.map_maker import UNIT
from replica_store.points.point_disk import FrameCache, PointDisk
from replica_store.points.run import OBJECT_WEIGHT
from replica_store.vault.vault import Vault
from tests.fakes.filled_vault import fill_vault
from tests.fakes.memory_history import MemoryHistory

BLOCK = 4096
OBJECTS = UNIT // (OBJECT_WEIGHT + 1) + 5


def history_of_a_unit(rng: random.Random) -> MemoryHistory:
    """One record an object: as much to read as a few hundred thousand records in large ones."""
    history = MemoryHistory()
    history.disk(0, "root", 64 * BLOCK)
    history.seal()
    while len(history.objects_of(history.id, history.lsn)) < OBJECTS:
        history.write(0, rng.randrange(64) * BLOCK, bytes([rng.randrange(256)]) * BLOCK)
        history.seal()
    return history


async def test_i9_a_checkpoint_is_made_when_a_history_has_grown(
    scratch: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = history_of_a_unit(rng)
    fill_vault(scratch / "vault", history)
    with Vault.open(str(scratch / "vault"), writable=True) as vault, structlog.testing.capture_logs() as logs:
        keeper = MapKeeper(vault, trio.CapacityLimiter(2))
        with vault.maps.lock():  # somebody else is at it
            await keeper._make(history.id)
        assert vault.maps.names(history.id) == []
        assert keeper._due(0.0) == [history.id]
        await keeper._make(history.id)
        (name,) = vault.maps.names(history.id)
        assert (name.after_lsn, name.slot) == (0, 0)
        assert keeper._due(0.0) == []
        read = []
        sound = Vault.object_index
        monkeypatch.setattr(Vault, "object_index", lambda self, row: read.append(row) or sound(self, row))
        disks = vault.disks_at(history.id, history.lsn)
        state = build_states(vault, history.id, history.lsn, disks)[0]
        assert PointDisk(state, FrameCache(vault)).read(0, 64 * BLOCK) == history.state_at(history.lsn)[0]
        assert len(read) <= 6
    assert logs == []


async def test_a_history_that_cannot_be_read_is_let_alone_for_a_while(scratch: Path, rng: random.Random) -> None:
    history = history_of_a_unit(rng)
    fill_vault(scratch / "vault", history)
    with Vault.open(str(scratch / "vault"), writable=True) as vault, structlog.testing.capture_logs() as logs:
        vault.objects.delete(vault.objects_of(history.id, 9)[-1].name)
        keeper = MapKeeper(vault, trio.CapacityLimiter(2))
        now = trio.current_time()
        await keeper._make(history.id)
        assert vault.maps.names(history.id) == []
        assert [log["event"] for log in logs] == ["no map checkpoint made"]
        assert "LSN 9..9 is missing" in logs[0]["reason"]
        assert keeper._due(now) == []
        assert keeper._due(now + AFTER_FAILURE_S + 60) == [history.id]


BUSY = """
import sys, threading
from replica_store.daemon import map_worker
map_worker.make_maps = lambda *_: print("busy", flush=True) or threading.Event().wait()
sys.exit(map_worker.main(*sys.argv[1:]))
"""


def test_a_worker_ends_with_whoever_keeps_it(scratch: Path, rng: random.Random) -> None:
    """Also when `serve` is killed, which can tell nobody."""
    history = history_of_a_unit(rng)
    fill_vault(scratch / "vault", history)
    words = [sys.executable, "-c", BUSY, str(scratch / "vault"), history.id, KEPT]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        try:
            assert worker.stdout is not None and worker.stdin is not None
            assert worker.stdout.readline() == b"busy\n"
            assert worker.poll() is None
            worker.stdin.close()
            assert worker.wait(20) == 1
        finally:
            worker.kill()
