"""What the last verification of a machine could not read back: a point that may need it is not failed over to unasked.

Only the catalog has it: a rebuilt one knows of no flaw until the next verification.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from asrfs.errors import IntegrityError
from replica_store.vault.catalog import Catalog
from replica_store.vault.operations import LOCK_S_MAX
from replica_store.vault.scrub import Damage
from replica_store.vault.tails import tail_id, tail_with_id, tails
from replica_store.vault.vault import Vault, lock_descriptions


class Flaw(NamedTuple):
    """Records that could not be read back, and why. Every state from the first of them on may need them."""

    first_lsn: int
    last_lsn: int
    what: str


def note_flaws(root: str, machine_id: str, damages: Sequence[Damage], now_ns: int) -> None:
    """Put what a verification found in the place of what the one before found."""
    with lock_descriptions(root, LOCK_S_MAX), Vault.open(root, writable=True) as vault, vault.catalog.transaction():
        ids = [machine_id, *(tail.id for tail in tails(vault.catalog, machine_id))]
        for each in ids:
            vault.catalog.change("DELETE FROM flaws WHERE machine_id = ?", (each,))
        for damage in damages:
            vault.catalog.change(
                "INSERT OR REPLACE INTO flaws (machine_id, first_lsn, last_lsn, what, found_ns) VALUES (?, ?, ?, ?, ?)",
                (_whose(machine_id, damage), damage.first_lsn, damage.last_lsn, damage.text, now_ns),
            )


def any_flaw(catalog: Catalog, machine_id: str) -> bool:
    """Whether anything is noted of a machine or its tails."""
    return bool(
        catalog.select(
            "SELECT 1 FROM flaws WHERE machine_id = ? OR machine_id LIKE ? LIMIT 1", (machine_id, f"{machine_id}~%")
        )
    )


def _whose(machine_id: str, damage: Damage) -> str:
    return machine_id if damage.tail is None else tail_id(machine_id, damage.tail)


def flaw_before(catalog: Catalog, machine_id: str, lsn: int) -> Flaw | None:
    """The first one that the state at this LSN may need, of a machine or of one of its tails."""
    tail = tail_with_id(catalog, machine_id)
    if tail is not None and (flaw := flaw_before(catalog, tail.machine_id, tail.branch_lsn)) is not None:
        return flaw
    rows = catalog.select(
        "SELECT first_lsn, last_lsn, what FROM flaws WHERE machine_id = ? AND first_lsn <= ? "
        "ORDER BY first_lsn LIMIT 1",
        (machine_id, lsn),
    )
    if not rows:
        return None
    flaw = Flaw(*rows[0])
    if not (isinstance(flaw.first_lsn, int) and isinstance(flaw.last_lsn, int) and isinstance(flaw.what, str)):
        raise IntegrityError(f"{catalog.path}: a row of flaws cannot be: make it again with `replica-store verify`")
    return flaw
