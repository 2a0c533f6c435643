"""Where the members of a consistency group were cut together."""

from __future__ import annotations

from asrfs.errors import BadInputError, NotFoundError
from replica_store.points.selector import AtPoint, AtTime, Newest, parse_selector
from replica_store.vault.groups import Group
from replica_store.vault.rows import MachineRow, PointRow
from replica_store.vault.vault import Vault


def group_cuts(vault: Vault, group: Group, selector: str) -> dict[str, str]:
    """By member's name, the selector of one point of the group that all its members have. Raises NotFoundError."""
    wanted = parse_selector(selector)
    rows: dict[str, MachineRow] = {machine.id: machine for machine in vault.machines()}
    shares: dict[str, dict[str, PointRow]] = {}
    for member in group.members:
        for point in vault.points(member):
            if point.group == group.name and point.marker.group_point is not None:
                shares.setdefault(point.marker.group_point, {})[member] = point
    whole = [share for share in shares.values() if set(share) == set(group.members)]
    found = [share for share in whole if any(_is_meant(point, wanted) for point in share.values())]
    if isinstance(wanted, Newest | AtTime) or len(found) > 1:
        found = sorted(found, key=lambda share: max(point.time_ns for point in share.values()))[-1:]
    if not found:
        raise NotFoundError(
            f"no point that all members of group {group.name} were cut at together is {selector!r}: see "
            "`replica-store point list`, or take members to points of their own, one by one"
        )
    return {rows[member].name: f"lsn:{point.lsn}" for member, point in found[0].items()}


def _is_meant(point: PointRow, wanted: object) -> bool:
    if isinstance(wanted, AtPoint):
        return wanted.label in (point.id, point.name, point.marker.group_point)
    if isinstance(wanted, AtTime):
        return point.time_ns <= wanted.time_ns
    if isinstance(wanted, Newest):
        return wanted.word != "latest-application" or point.consistency == "application"
    raise BadInputError("members of a group have no LSN in common: name a point of the group, or a time")
