"""A real vault on disk that holds a history made in memory, as if its host had shipped it."""

from __future__ import annotations

from pathlib import Path

from asrfs.format.log_object import DIGEST_BYTES
from asrfs.storage.system_clock import SystemClock
from replica_store.vault.contents import entry_of
from replica_store.vault.keys import MachineKeys
from replica_store.vault.rows import MachineRow, log_object_name
from replica_store.vault.vault import Vault
from tests.fakes.memory_history import INDEX_KEY, PAYLOAD_KEY, MemoryHistory


def fill_vault(root: Path, history: MemoryHistory) -> None:
    """Make the vault and put the history's machine, log objects and catalog rows into it."""
    with Vault.create(str(root), "site-b", SystemClock()) as vault:
        entries = []
        for number, row in enumerate(history.objects_of(history.id, history.lsn)):
            stored = history.stored(row)
            header, index, _ = history.object_head(row)
            nonce = f"{number:08x}"
            name = log_object_name(history.id, row.epoch, row.first_lsn, row.last_lsn, nonce)
            vault.objects.put(name, [stored])
            entries.append(entry_of(header, index, stored[-DIGEST_BYTES:], nonce, name))
        sealed = vault.sealer.seal_keys(history.id, MachineKeys(INDEX_KEY, PAYLOAD_KEY))
        machine = MachineRow(history.id, history.name, history.epoch, "1", False, 0, 1, sealed)
        with vault.catalog.transaction():
            vault.catalog.put_machine(machine)
            vault.catalog.append(entries)
