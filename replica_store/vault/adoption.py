"""Taking into the catalog what a crash left out of it: log objects that were stored and not yet catalogued.

Done before a machine's first session, so that no LSN is ever stored twice in two objects of which one is later mistaken
for the other, and so that a catalog older than its objects catches up, in its epoch, too: what has been superseded
stays so (I6). What does not continue the history, such as objects of a superseded epoch, stays where it is.
"""

from __future__ import annotations

from dataclasses import replace

from asrfs.format.log_object import check_digest
from replica_store.vault.rows import Entry, MachineRow, log_prefix
from replica_store.vault.survey import Surveyed, chain_of, log_names, survey
from replica_store.vault.vault import Vault


def adopt(vault: Vault, machine: MachineRow) -> list[Entry]:
    """Catalogue what continues the machine's history; returns it. Raises IntegrityError for a damaged object."""
    last = vault.catalog.last_object(machine.id)
    names = log_names(vault.objects, machine.id, last.last_lsn if last else 0)
    if not names:
        return []
    found = survey(vault.objects, machine.id, vault.machine_keys(machine), names)
    surveyed = [each for each in found if isinstance(each, Surveyed) and each.entry.row.epoch >= machine.epoch]
    chain = chain_of(surveyed, last)
    vault.objects.settle(log_prefix(machine.id))
    for entry in chain:
        name = entry.row.name
        check_digest(vault.objects.read(name), vault.objects.where(name))
    with vault.catalog.transaction():
        vault.catalog.append(chain)
        if chain and chain[-1].row.epoch > machine.epoch:
            vault.catalog.put_machine(replace(machine, epoch=chain[-1].row.epoch))
    return chain
