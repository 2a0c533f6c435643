"""What a recovery point says of itself: the payload of a MARKER record, and what it may contain.

It travels inside the history and is copied into the store's catalog, so its parts are bounded, printable and checked
wherever they arrive. A point becomes real once its LSN is durable at the store; nothing here knows of that.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import msgspec

from asrfs.errors import BadInputError, FormatError
from asrfs.model.names import check_name, is_id, is_name

Consistency = Literal["crash", "filesystem", "application"]
CONSISTENCIES: tuple[Consistency, ...] = get_args(Consistency)
HookPhase = Literal["pre", "post"]

NOTE_CHARACTERS_MAX = 1000
FAILED_CHARACTERS_MAX = 500
OUTPUT_CHARACTERS_MAX = 200
HOOKS_MAX = 64
"""Results of hooks a point carries: pre and post of 32 hooks."""
MEMBERS_MAX = 256


class HookResult(msgspec.Struct, frozen=True, kw_only=True):
    """How one hook ended: with an `exit_code`, or, where that is None, as `happened` says.

    `output`: the first characters it printed, as one line.
    """

    name: str
    phase: HookPhase
    exit_code: int | None = None
    happened: str | None = None
    seconds: float = 0.0
    output: str = ""


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's part of a group's point: its marker is record `lsn`, and its writes were held for `hold_ms`."""

    machine: str
    lsn: int
    hold_ms: float = 0.0


class MarkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of a MARKER record.

    `wanted`: the consistency that was asked for, where it is not what was made, and `failed` why; `hold_ms`: for how
    long writes were held, freezing included; `freeze_ms`: how much of that freezing took; `note`: a person's. Of a
    point of a group, `group_point` is the id that all its members' markers share, `members` the ids of the machines
    that belong to it, and `ready` how many of them it was cut on, where that is known.

    What is known only once the instant has passed comes in a later record: the point's own says that it is
    `unfinished`, the later one has the same `id` and says in `completes` which LSN it speaks of. That one makes no
    point; see `completed`.

    A marker with a `group_point` is a share of a point, and of no worth by itself: all shares are a point if the
    history of one of its `members` has a marker that `confirms` them. That one makes no point either.
    """

    id: str
    consistency: Consistency = "crash"
    group: str | None = None
    name: str | None = None
    hold_ms: float | None = None
    note: str | None = None
    wanted: Consistency | None = None
    failed: str | None = None
    freeze_ms: float | None = None
    hooks: tuple[HookResult, ...] = ()
    group_point: str | None = None
    members: tuple[str, ...] = ()
    ready: int | None = None
    unfinished: bool = False
    completes: int | None = None
    confirms: tuple[Share, ...] = ()

    def document(self) -> dict[str, Any]:
        """What commands print of it, in JSON's types; for whose place in the history, see who calls."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        return {key: document[key] for key in self.__struct_fields__ if key not in ("completes", "confirms")}


def completed(marker: MarkerRecord, last_word: MarkerRecord) -> MarkerRecord:
    """The point of an unfinished `marker` once `last_word`, which completes it, is known.

    Only what was measured changes, and a point never becomes more than it said it was: whoever breaks into a host
    later can rename nothing and gains nothing.
    """
    assert marker.unfinished and marker.id == last_word.id
    return msgspec.structs.replace(
        marker,
        unfinished=False,
        consistency=min(marker.consistency, last_word.consistency, key=CONSISTENCIES.index),
        wanted=last_word.wanted,
        failed=last_word.failed,
        hold_ms=last_word.hold_ms,
        freeze_ms=last_word.freeze_ms,
        hooks=last_word.hooks,
        ready=marker.ready if marker.group is None or last_word.ready is None else last_word.ready,
    )


def encode_marker(record: MarkerRecord) -> bytes:
    return msgspec.msgpack.encode(record)


def decode_marker(payload: bytes) -> MarkerRecord:
    """Decode and check a MARKER payload, which may come from a hostile peer. Raises FormatError."""
    try:
        record = msgspec.msgpack.decode(payload, type=MarkerRecord)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"a MARKER record cannot be read: {error}") from None
    check_marker(record)
    return record


def check_marker(record: MarkerRecord) -> None:
    """Raise FormatError for what `asrfs` never writes."""
    try:
        for text, what in ((record.name, "point"), (record.group, "group")):
            if text is not None:
                check_name(text, what)
    except BadInputError as error:
        raise FormatError(f"a MARKER record is not acceptable: {error}") from None
    if not is_id(record.id):
        raise FormatError(f"a MARKER record has id {record.id[:40]!r}")
    for what, text, length_max in (
        ("note", record.note, NOTE_CHARACTERS_MAX),
        ("reason", record.failed, FAILED_CHARACTERS_MAX),
    ):
        if not is_line(text, length_max):
            raise FormatError(f"a MARKER record has a {what} that is no line of at most {length_max} characters")
    for what, number in (("hold time", record.hold_ms), ("time of freezing", record.freeze_ms)):
        if number is not None and not 0 <= number < math.inf:
            raise FormatError(f"a MARKER record has a {what} of {number} ms")
    if record.completes is not None and (record.unfinished or not 0 < record.completes < 1 << 63):
        raise FormatError(f"a MARKER record completes LSN {record.completes}, which cannot be")
    if len(record.hooks) > HOOKS_MAX or not all(map(_is_result, record.hooks)):
        raise FormatError(f"a MARKER record has results of {len(record.hooks)} hooks that cannot be")
    _check_group(record)


def _check_group(record: MarkerRecord) -> None:
    members = record.members
    is_sound = (
        (record.group_point is None or is_id(record.group_point))
        and len(members) <= MEMBERS_MAX
        and len(set(members)) == len(members)
        and all(map(is_id, members))
        and (record.ready is None or 0 <= record.ready <= len(members))
    )
    if not is_sound:
        raise FormatError(f"a MARKER record has {len(members)} members or a point of a group that cannot be")
    shares = record.confirms
    confirmed = {share.machine for share in shares}
    if shares and not (
        record.group_point is not None
        and confirmed <= set(members)
        and len(confirmed) == len(shares) == record.ready
        and all(0 < share.lsn < 1 << 63 and 0 <= share.hold_ms < math.inf for share in shares)
    ):
        raise FormatError(f"a MARKER record confirms {len(shares)} shares that cannot be of one point")
    if (record.group_point or members or record.ready is not None) and record.group is None:
        raise FormatError("a MARKER record has members but no group")


def _is_result(result: HookResult) -> bool:
    return (
        is_name(result.name)
        and (result.exit_code is None or 0 <= result.exit_code <= 255)
        and is_line(result.happened, OUTPUT_CHARACTERS_MAX)
        and 0 <= result.seconds < math.inf
        and is_line(result.output, OUTPUT_CHARACTERS_MAX)
    )


def is_line(text: str | None, length_max: int) -> bool:
    """Whether it is absent, or of one line that every terminal can show."""
    return text is None or (len(text) <= length_max and text.isprintable())
