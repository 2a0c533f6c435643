"""Which shares of group points are points: for all members at once, or for none. Pure.

A marker with a group point is a share, and of no worth by itself. A confirming record, in the history of one of the
members, names the shares that are the point. It is one when everything it names is here: the record itself, each share
at its LSN, and no gap under any of them (I5). So a point appears everywhere in the instant in which the last of these
becomes durable, and a cut that came to nothing, of which nobody wrote such a record, appears nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from asrfs.model.marker import MarkerRecord, Share
from replica_store.vault.rows import PointRow


@dataclass(frozen=True, slots=True)
class ConfirmationRow:
    """A confirming record: `marker.confirms` are the shares. `machine_id`, `lsn`: whose history has it, and where."""

    machine_id: str
    lsn: int
    marker: MarkerRecord


HasShare = Callable[[str, int, str], bool]
"""Whether record LSN of that machine is here, with no gap under it, and is a share of that group point."""


def listed(points: Iterable[PointRow], confirmations: Iterable[ConfirmationRow], has_share: HasShare) -> list[PointRow]:
    """Those of a machine's `points` that are points; shares as the points of the group that they are."""
    real = real_points(confirmations, has_share)
    found = []
    for point in points:
        group_point = point.marker.group_point
        if group_point is None:
            found.append(point)
        elif (confirmation := real.get(group_point)) is not None:
            share = _share_of(confirmation, point)
            if share is not None:
                found.append(_as_listed(point, confirmation.marker, share))
    return found


def real_points(confirmations: Iterable[ConfirmationRow], has_share: HasShare) -> Mapping[str, ConfirmationRow]:
    """By the id of the group point. Where two records confirm one, the one with more shares counts."""
    real: dict[str, ConfirmationRow] = {}
    for row in sorted(confirmations, key=lambda row: len(row.marker.confirms)):
        group_point = row.marker.group_point
        if group_point is None or row.machine_id not in row.marker.members:
            continue  # who does not belong to it has no say
        if all(has_share(share.machine, share.lsn, group_point) for share in row.marker.confirms):
            real[group_point] = row
    return real


def _share_of(confirmation: ConfirmationRow, point: PointRow) -> Share | None:
    shares: Sequence[Share] = confirmation.marker.confirms
    for share in shares:
        if (share.machine, share.lsn) == (point.machine_id, point.lsn):
            return share
    return None


def _as_listed(point: PointRow, said: MarkerRecord, share: Share) -> PointRow:
    """`ready` and `members` tell a point of all from one of some. Who was frozen was held for as long as that took."""
    hold_ms = max(share.hold_ms, point.marker.hold_ms or 0.0)
    marker = msgspec.structs.replace(point.marker, hold_ms=hold_ms, members=said.members, ready=said.ready)
    return replace(point, marker=marker)
