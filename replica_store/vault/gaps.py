"""Where in a history content from before it is missing, decided from DISK records alone (I5). Pure.

A disk's gap opens at a DISK record with `gap`, and closes at one without, or when the disk is removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from replica_store.vault.rows import DiskRow


@dataclass(frozen=True, slots=True)
class Gap:
    """Open from `first_lsn` up to, not including, `closed_lsn`; None: still open."""

    disk: str
    first_lsn: int
    closed_lsn: int | None

    def __str__(self) -> str:
        until = "now" if self.closed_lsn is None else f"LSN {self.closed_lsn}"
        return f"first copy of disk {self.disk}, from LSN {self.first_lsn} until {until}"


def gaps_of(rows: Iterable[DiskRow]) -> list[Gap]:
    """All gaps of a machine whose disk rows these are, in LSN order."""
    opened: dict[int, DiskRow] = {}
    gaps: list[Gap] = []
    for row in rows:
        slot = row.record.slot
        if row.record.gap and not row.record.removed:
            opened.setdefault(slot, row)
        elif begun := opened.pop(slot, None):
            gaps.append(Gap(begun.record.name, begun.lsn, row.lsn))
    gaps += [Gap(begun.record.name, begun.lsn, None) for begun in opened.values()]
    return sorted(gaps, key=lambda gap: gap.first_lsn)


def gap_at(gaps: Sequence[Gap], lsn: int) -> Gap | None:
    """One of the gaps that are open at `lsn`, or None."""
    for gap in gaps:
        if gap.first_lsn <= lsn and (gap.closed_lsn is None or lsn < gap.closed_lsn):
            return gap
    return None
