"""Raising a machine's epoch, after which nobody of a lower one can add to its history (I6)."""

from __future__ import annotations

from dataclasses import replace

from asrfs.errors import NotFoundError
from replica_store.vault.enrolment import newest_description, put_description
from replica_store.vault.vault import Vault


def raise_epoch(vault: Vault, machine_id: str) -> int:
    """The new epoch, durable in the catalog and in the machine's sealed description, so that a rebuild has it too.

    The caller holds `lock_descriptions`. Raises NotFoundError.
    """
    with vault.catalog.transaction():
        row = vault.catalog.machine_by_id(machine_id)
        if row is None:
            raise NotFoundError(f"the store knows no machine with id {machine_id}")
        known = newest_description(vault, machine_id)
        row = replace(
            row,
            epoch=max(row.epoch, known.epoch if known else 0) + 1,
            generation=max(row.generation, known.generation if known else 0) + 1,
        )
        put_description(vault, row)
        vault.catalog.put_machine(row)
    return row.epoch
