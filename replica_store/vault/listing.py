"""The listed points of a machine, put together from the catalog. Which shares of groups are points: see `cuts.py`."""

from __future__ import annotations

from asrfs.errors import FormatError, IntegrityError
from asrfs.model.marker import decode_marker
from replica_store.vault.catalog import Catalog
from replica_store.vault.cuts import ConfirmationRow, listed
from replica_store.vault.gaps import Gap, gap_at, gaps_of
from replica_store.vault.rows import PointRow

_GROUP_POINTS = "SELECT group_point FROM points WHERE machine_id = ? AND group_point IS NOT NULL"


def listed_points(catalog: Catalog, machine_id: str) -> list[PointRow]:
    """In LSN order: the whole prefix of each is here, of all its members, and no gap lies under any of them (I5)."""
    gaps: dict[str, list[Gap]] = {}

    def has_no_gap(machine: str, lsn: int) -> bool:
        if machine not in gaps:
            gaps[machine] = gaps_of(catalog.disk_rows(machine))
        return gap_at(gaps[machine], lsn) is None

    points = [point for point in catalog.points(machine_id) if has_no_gap(machine_id, point.lsn)]
    if all(point.marker.group_point is None for point in points):
        return points
    shares = _shares(catalog, machine_id)

    def has_share(machine: str, lsn: int, group_point: str) -> bool:
        return (machine, lsn, group_point) in shares and has_no_gap(machine, lsn)

    return listed(points, _confirmations(catalog, machine_id), has_share)


def _shares(catalog: Catalog, machine_id: str) -> set[tuple[str, int, str]]:
    """Every share of the group points that this machine has a share of: `(machine, lsn, group point)`."""
    rows = catalog.select(
        f"SELECT machine_id, lsn, group_point FROM points WHERE group_point IN ({_GROUP_POINTS})",  # noqa: S608
        (machine_id,),
    )
    return {(str(machine), int(lsn), str(group_point)) for machine, lsn, group_point in rows}


def _confirmations(catalog: Catalog, machine_id: str) -> list[ConfirmationRow]:
    rows = catalog.select(
        f"SELECT machine_id, lsn, marker FROM confirmations WHERE group_point IN ({_GROUP_POINTS})",  # noqa: S608
        (machine_id,),
    )
    try:
        return [ConfirmationRow(str(machine), int(lsn), decode_marker(bytes(marker))) for machine, lsn, marker in rows]
    except (FormatError, TypeError, ValueError):
        raise IntegrityError(
            f"{catalog.path}: a row of confirmations cannot be: make the catalog again with `replica-store rebuild`"
        ) from None
