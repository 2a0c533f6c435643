"""How far a history has come: cursors into the journal that survive a restart.

appended >= durable >= applied        on the host
appended >= durable >= acknowledged   at the store
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
SegmentNumber = Annotated[int, msgspec.Meta(ge=0, lt=1 << 38)]
SegmentOffset = Annotated[int, msgspec.Meta(ge=0, le=1 << 26)]
"""Bounds of what is read from a file: number and offset of a segment are one integer of 64 bits in maps."""
Epoch = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Slot = Annotated[int, msgspec.Meta(ge=0, lt=0xFFFF)]


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """The place just after record `lsn`: the next record is at byte `offset` of `segment`, or starts a later one.

    `lsn` 0 with `segment` 0 is the beginning of the history. `time_ns` is the time of record `lsn`.
    """

    lsn: Number = 0
    segment: SegmentNumber = 0
    offset: SegmentOffset = 0
    time_ns: Number = 0


class Positions(msgspec.Struct, frozen=True, kw_only=True):
    """The agent's persisted knowledge. `applied`: image fsynced up to there. `acknowledged`: durable at the store.

    `last_digest` is the hex digest of the last acknowledged log object, which the next one names.
    """

    format: Literal[1] = 1
    epoch: Epoch = 1
    applied: Cursor = Cursor()
    acknowledged: Cursor = Cursor()
    last_digest: str = ""
