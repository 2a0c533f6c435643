"""Mounts a random history as a tree, in a process of its own: `python -m tests.t5_system.mount_program DIR SHOWN SEED`.

The same seed makes the same history in the test, which so knows every byte. The file SHOWN holds the LSN up to which
the store has received it, so that points appear while the tree is mounted. The program says `ready` when it is mounted,
and `slow` when a read has come that never returns.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from replica_store.points.mount import mount_points
from tests.fakes.memory_history import MemoryHistory, random_history

RECORDS = 400
DISKS = {"root": 900 * 4096, "data": 200 * 4096 + 1536}
SLOW_DISK = "slow"
"""Reading it takes for ever, as from a store that does not answer."""
SLOW_SECONDS = 3600.0


class ShownHistory:
    """The history up to the LSN in a file."""

    def __init__(self, history: MemoryHistory, shown: Path) -> None:
        self._history = history
        self._shown = shown

    def __getattr__(self, name: str) -> object:
        self._history.hidden_after = int(self._shown.read_text())
        return getattr(self._history, name)

    def read_frame(self, row: object, header: object, table: object, i: int) -> bytes:
        frame = self._history.read_frame(row, header, table, i)  # type: ignore[arg-type]
        if frame.startswith(b"slow"):
            print("slow", flush=True)
            time.sleep(SLOW_SECONDS)  # sleep: stands for a store that does not answer
        return frame


def make_history(seed: int) -> MemoryHistory:
    """The history of the test; its last record is on a disk that cannot be read in time."""
    history = random_history(seed, records=RECORDS, disks=DISKS)
    history.disk(2, SLOW_DISK, 4096)
    history.seal()
    history.write(2, 0, b"slow".ljust(4096, b"."))
    history.seal()
    return history


if __name__ == "__main__":
    mount_dir, shown, seed = sys.argv[1:]
    mount_points(
        ShownHistory(make_history(int(seed)), Path(shown)),  # type: ignore[arg-type]
        Path(mount_dir),
        source="replica-store",
        ready=lambda: print("ready", flush=True),
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
