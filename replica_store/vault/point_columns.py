"""A recovery point as columns of the catalog and back. Pure.

Lists lie in a column as JSON, NULL for an empty one. What is read is checked as a marker that comes from a host is.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from asrfs.errors import FormatError
from asrfs.model.marker import HookResult, MarkerRecord, check_marker
from replica_store.vault.row_checks import EPOCH_END, are, impossible
from replica_store.vault.rows import PointRow

POINT_COLUMNS = (
    "machine_id, lsn, id, epoch, time_ns, consistency, group_name, name, hold_ms, note, "
    "wanted, failed, freeze_ms, hooks, group_point, members, ready, unfinished, protected"
)

_NULL = type(None)
_TYPES = (str, int, str, int, int, str, int, int)
_TEXT = (str, _NULL)
_REAL = (float, int, _NULL)
_TYPES_OR_NULL = (_TEXT, _TEXT, _REAL, _TEXT, _TEXT, _TEXT, _REAL, _TEXT, _TEXT, _TEXT, (int, _NULL))

T = TypeVar("T")


def columns_of(point: PointRow) -> tuple[Any, ...]:
    """In the order of POINT_COLUMNS."""
    marker = point.marker
    return (
        *(point.machine_id, point.lsn, marker.id, point.epoch, point.time_ns, marker.consistency),
        *(marker.group, marker.name, marker.hold_ms, marker.note, marker.wanted, marker.failed, marker.freeze_ms),
        *(_json(marker.hooks), marker.group_point, _json(marker.members), marker.ready),
        *(marker.unfinished, point.protected),
    )


def point_of(columns: tuple[Any, ...]) -> PointRow:
    """Raises IntegrityError for a row that cannot be."""
    machine_id, lsn, point_id, epoch, time_ns, consistency, *rest, unfinished, protected = columns
    firm = (machine_id, lsn, point_id, epoch, time_ns, consistency, unfinished, protected)
    if not (are(firm, _TYPES) and are(tuple(rest), _TYPES_OR_NULL)):
        raise impossible("point", str(lsn))
    group, name, hold_ms, note, wanted, failed, freeze_ms, hooks, group_point, members, ready = rest
    try:
        said = MarkerRecord(
            id=point_id,
            consistency=consistency,
            group=group,
            name=name,
            hold_ms=hold_ms,
            note=note,
            wanted=wanted,
            failed=failed,
            freeze_ms=freeze_ms,
            hooks=_list(hooks, HookResult),
            group_point=group_point,
            members=_list(members, str),
            ready=ready,
            unfinished=bool(unfinished),
        )
        marker = msgspec.convert(msgspec.to_builtins(said), MarkerRecord)  # words that are one of a few
        check_marker(marker)
    except (msgspec.MsgspecError, ValueError, RecursionError, FormatError):
        raise impossible("point", str(lsn)) from None
    if not (lsn > 0 and time_ns >= 0 and 0 <= epoch < EPOCH_END):
        raise impossible("point", str(lsn))
    return PointRow(machine_id, lsn, epoch, time_ns, marker, bool(protected))


def _json(items: tuple[Any, ...]) -> str | None:
    return msgspec.json.encode(items).decode() if items else None


def _list(text: str | None, type: type[T]) -> tuple[T, ...]:
    return () if text is None else msgspec.json.decode(text, type=tuple[type, ...])  # type: ignore[valid-type]
