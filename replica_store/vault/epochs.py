"""Raising a machine's epoch: from then on only who was told the new one adds to its history (I6).

    description object put ─▶ machine row ─▶ commit ─▶ (caller) the new epoch is told to somebody

All in one transaction, so that a rebuilt catalog has it, too. If the transaction does not come about, a description is
left with an epoch that nobody was told: a rebuild that believes it refuses the host, which then asks for a higher one.
Asking again after a lost answer raises it again, which harms nobody.
"""

from __future__ import annotations

from dataclasses import replace

from asrfs.errors import NotFoundError, RefusedError
from replica_store.vault.enrolment import newest_description, put_description
from replica_store.vault.row_checks import EPOCH_END
from replica_store.vault.vault import Vault


def raise_epoch(vault: Vault, machine_id: str, *, above: int = 0) -> int:
    """A new epoch of the machine, higher than any it had and than `above`; durable when this returns.

    The caller serves the vault or holds `lock_descriptions`. Raises NotFoundError, NoSpaceError; RefusedError when
    there is no higher one.
    """
    with vault.catalog.transaction():
        row = vault.catalog.machine_by_id(machine_id)
        if row is None:
            raise NotFoundError(f"the store knows no machine with id {machine_id}")
        known = newest_description(vault, machine_id)
        epoch = max(row.epoch, known.epoch if known else 0, above) + 1
        if epoch >= EPOCH_END:
            raise RefusedError(f"machine {row.name} has no epoch above {epoch - 1}")
        row = replace(row, epoch=epoch, generation=max(row.generation, known.generation if known else 0) + 1)
        put_description(vault, row)
        vault.catalog.put_machine(row)
    return epoch
