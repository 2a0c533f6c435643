"""The agent's persisted positions: one value in memory, replaced from several threads, saved atomically.

What stands in memory is true already (the image is fsynced, the store has acknowledged), so any save may carry all
of it. Whoever frees something on the strength of a position asks `saved`, never `current`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec

from asrfs.model.positions import Positions

Save = Callable[[Positions], None]


class PositionsFile:
    """`save` replaces the file durably or raises OSError or NoSpaceError; it is called by one thread at a time."""

    def __init__(self, positions: Positions, save: Save) -> None:
        self._save = save
        self._changing = threading.Lock()
        self._saving = threading.Lock()
        self._current = positions
        self._saved = positions

    @property
    def current(self) -> Positions:
        return self._current

    @property
    def saved(self) -> Positions:
        """What a restart would find at least."""
        return self._saved

    def change(self, **fields: Any) -> Positions:
        """Replace fields of `Positions` in memory."""
        with self._changing:
            self._current = msgspec.structs.replace(self._current, **fields)
            return self._current

    def save(self) -> Positions:
        """Make what is in memory durable unless it is. Blocks; returns what is saved."""
        with self._saving:
            positions = self._current
            if positions != self._saved:
                self._save(positions)
                self._saved = positions
            return positions
