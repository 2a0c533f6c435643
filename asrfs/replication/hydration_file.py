"""The agent's word on what it copies from a base: durable before the first byte of a turn is written.

    begin ─▶ (disk server told) ─▶ image written, datasync ─▶ over
                 any failure, any death in between ─▶ pending ─▶ taken back: punched, datasync ─▶ over

`pending` is what has to be taken back before anything else is written to an image or a position is saved.
"""

from __future__ import annotations

from collections.abc import Callable

from asrfs.errors import FormatError, IntegrityError
from asrfs.model.hydration import NO_TURN, HydrationTurn, decode_turn, encode_turn
from asrfs.storage.interface import File, Storage, read_whole, write_atomically


def load_turn(storage: Storage, name: str) -> HydrationTurn:
    """What is written down. Raises IntegrityError."""
    try:
        return decode_turn(read_whole(storage, name))
    except FileNotFoundError:
        return NO_TURN
    except FormatError as error:
        raise IntegrityError(f"{name}: {error}") from None


class HydrationFile:
    """`saved_lsn`: the saved applied position. Used by one thread at a time."""

    def __init__(self, storage: Storage, name: str, saved_lsn: Callable[[], int]) -> None:
        self._storage = storage
        self._name = name
        self._saved_lsn = saved_lsn
        self._turn = load_turn(storage, name)
        is_open = bool(self._turn.extents) and self._turn.applied_lsn >= saved_lsn()
        self.pending: HydrationTurn | None = self._turn if is_open else None

    def begin(self, disk_id: str, through: int, extents: list[tuple[int, int]]) -> HydrationTurn:
        """From now on these are in doubt, whatever happens. Raises OSError."""
        assert self.pending is None, "one turn at a time"
        turn = HydrationTurn(disk_id=disk_id, applied_lsn=self._saved_lsn(), through=through, extents=tuple(extents))
        write_atomically(self._storage, self._name, encode_turn(turn))
        self._turn = self.pending = turn
        return turn

    def over(self) -> None:
        """What was pending is durable."""
        self.pending = None

    def take_back(self, opened: Callable[[str], File | None]) -> None:
        """Have what is pending out of the image again, durably.

        `opened`: the image of the disk of an id through a descriptor that has seen no failure, None if that disk has
        no base. Raises OSError: it is pending still.
        """
        if self.pending is None:
            return
        image = opened(self.pending.disk_id)
        if image is not None:
            for offset, end in self.pending.extents:
                image.punch(offset, end - offset)
            image.datasync()
        self.pending = None

    def rest(self, disk_id: str, through: int) -> None:
        """Nothing is in doubt, and for a while nothing will be: also for who looks at the file. Raises OSError."""
        assert self.pending is None
        turn = HydrationTurn(disk_id=disk_id, applied_lsn=self._saved_lsn(), through=through)
        if turn.through != self._turn.through or turn.disk_id != self._turn.disk_id or self._turn.extents:
            write_atomically(self._storage, self._name, encode_turn(turn))
            self._turn = turn

    def through(self, disk_id: str) -> int:
        """Nothing is missing of a disk before this byte."""
        return self._turn.through if self._turn.disk_id == disk_id else 0
