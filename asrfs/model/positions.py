"""How far a history has come: cursors into the journal that survive a restart.

appended >= durable >= applied        on the host
appended >= durable >= acknowledged   at the store
"""

from __future__ import annotations

import msgspec


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """The place just after record `lsn`: the next record is at byte `offset` of `segment`, or starts a later one.

    `lsn` 0 with `segment` 0 is the beginning of the history. `time_ns` is the time of record `lsn`.
    """

    lsn: int = 0
    segment: int = 0
    offset: int = 0
    time_ns: int = 0


class FillProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far the content an adopted image had before the history has been read into it."""

    slot: int
    offset: int


class Positions(msgspec.Struct, frozen=True, kw_only=True):
    """The agent's persisted knowledge. `applied`: image fsynced up to there. `acknowledged`: durable at the store.

    `last_digest` is the hex digest of the last acknowledged log object, which the next one names.
    """

    format: int = 1
    epoch: int = 1
    applied: Cursor = Cursor()
    acknowledged: Cursor = Cursor()
    last_digest: str = ""
    fills: tuple[FillProgress, ...] = ()
