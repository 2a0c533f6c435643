"""Bugs on purpose inside processes of their own: a level's process names one, every process it starts has it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asrfs.journal.writer import Journal
from asrfs.storage import directory
from asrfs.storage.interface import Bytes

PLANT = "ASRFS_PROOF_PLANT"
HELD_MAX = 64


def answer_before_append() -> None:
    """Records are written when there are many, or somebody reads or syncs: a kill loses answered writes."""
    roll, read_locked, commit, close = Journal._roll, Journal.read_locked, Journal._commit, Journal.close

    def flush(journal: Any) -> None:
        held, journal.held = getattr(journal, "held", []), []
        for write_at, buffers, at in held:
            write_at(buffers, at)

    def roll_lazily(journal: Any) -> None:
        flush(journal)
        roll(journal)
        write_at = journal._write_at

        def hold(buffers: Sequence[Bytes], at: int) -> None:
            if len(journal.held) >= HELD_MAX:
                flush(journal)
            journal.held.append((write_at, tuple(map(bytes, buffers)), at))

        journal._write_at = hold

    def flush_before(method: Callable[..., Any], takes_lock: bool) -> Callable[..., Any]:
        def wrapped(journal: Any, *arguments: Any) -> Any:
            if takes_lock:
                with journal.lock:
                    flush(journal)
            else:
                flush(journal)
            return method(journal, *arguments)

        return wrapped

    Journal._roll = roll_lazily  # type: ignore[method-assign]
    Journal.read_locked = flush_before(read_locked, False)  # type: ignore[method-assign]
    Journal._commit = flush_before(commit, True)  # type: ignore[method-assign]
    Journal.close = flush_before(close, True)  # type: ignore[method-assign]


def never_sync() -> None:
    """fdatasync of a file does nothing: only a power cut shows it."""
    directory.OpenFile.datasync = lambda file: None  # type: ignore[method-assign]


PLANTS: Mapping[str, Callable[[], None]] = {
    "answer-before-append": answer_before_append,
    "never-sync": never_sync,
}


def apply_named() -> None:
    """Change the product in this process as the environment says."""
    name = os.environ.get(PLANT)
    if name:
        PLANTS[name]()
