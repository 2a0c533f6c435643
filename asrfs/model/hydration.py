"""What is being copied from a base into an image, as it is written down before the first byte is (`hydration.json`).

Until such a turn is durable nobody knows what a crash has left of it: what it names is **in doubt**, is read from the
base, and is taken out of the image by the next agent. The turn is over for good once the applied position lies behind
the one it names: nothing is applied, nor is a position saved, before the turn is durable or taken back.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from asrfs.errors import FormatError
from asrfs.model.positions import Number

EXTENTS_MAX = 4096
Place = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class HydrationTurn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`extents`: `(offset, end)` of the disk of that id, in order. `applied_lsn`: the saved one when it was written.

    `through`: nothing is missing of that disk before this byte.
    """

    format: Literal[1] = 1
    disk_id: str = ""
    applied_lsn: Number = 0
    through: Place = 0
    extents: tuple[tuple[Place, Place], ...] = ()

    def doubtful(self, disk_id: str, applied_lsn: int) -> tuple[tuple[int, int], ...]:
        """What of a disk is in doubt where the saved applied position is this."""
        return self.extents if self.disk_id == disk_id and self.applied_lsn >= applied_lsn else ()


NO_TURN = HydrationTurn()


def decode_turn(content: bytes) -> HydrationTurn:
    """Raises FormatError."""
    try:
        turn = msgspec.json.decode(content, type=HydrationTurn)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"a turn of hydration cannot be read: {error}") from None
    if len(turn.extents) > EXTENTS_MAX or any(offset >= end for offset, end in turn.extents):
        raise FormatError(f"a turn of hydration cannot have these {len(turn.extents)} extents")
    return turn


def encode_turn(turn: HydrationTurn) -> bytes:
    return msgspec.json.encode(turn) + b"\n"
