"""A catalog made again from the objects of a vault shuts out whom the old one did, and is whole or not there."""

from __future__ import annotations

import os
import random
import sqlite3
from pathlib import Path

import pytest

from asrfs.errors import AuthenticationError, TemporaryError
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.tls import MachineIdentity
from replica_store.ingest.greeting import check_identity
from replica_store.vault import catalog as catalog_room
from replica_store.vault.rebuild import rebuild
from replica_store.vault.schema import REBUILDABLE
from replica_store.vault.vault import CATALOG_FILE, Vault
from tests.fakes.rebuild_world import REVOKED, SUPERSEDED, add_restricted_machines

Tables = dict[str, list[tuple[object, ...]]]


@pytest.fixture
def root(scratch: Path, rng: random.Random) -> str:
    """A vault with a revoked machine and one at its second epoch."""
    root = str(scratch / "vault")
    vault = Vault.create(root, "site-b", SystemClock())
    add_restricted_machines(vault, rng)
    vault.close()
    return root


def tables_of(root: str) -> Tables:
    vault = Vault.open(root, writable=False)
    try:
        return {name: vault.catalog.table(name) for name in REBUILDABLE}
    finally:
        vault.close()


@pytest.mark.parametrize("is_lost", [False, True], ids=["over-the-old-one", "lost"])
def test_i6_a_catalog_made_again_shuts_out_whom_the_old_one_did(root: str, is_lost: bool) -> None:
    before = tables_of(root)
    if is_lost:
        os.unlink(os.path.join(root, CATALOG_FILE))
    report = rebuild(root)
    assert (report.machines, report.objects, report.damages) == (2, 3, [])
    vault = Vault.open(root, writable=False)
    revoked, superseded = vault.machine(REVOKED), vault.machine(SUPERSEDED)
    vault.close()
    assert (revoked.revoked, revoked.epoch) == (True, 1)
    with pytest.raises(AuthenticationError, match="are revoked"):
        check_identity(MachineIdentity(revoked.id, REVOKED, revoked.serial), revoked)
    assert (superseded.revoked, superseded.epoch) == (False, 2)
    assert tables_of(root) == before


def test_i3_a_catalog_that_is_not_whole_in_its_file_never_replaces_the_old_one(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody reads an older state of the new catalog, so closing it leaves most of it in the write-ahead log."""
    before = tables_of(root)
    monkeypatch.setattr(catalog_room, "BUSY_S", 0.1)
    readers: list[sqlite3.Connection] = []

    def read(done: int, total: int) -> None:
        if not readers:
            readers.append(sqlite3.connect(os.path.join(root, f"{CATALOG_FILE}.new"), isolation_level=None))
            readers[0].execute("BEGIN")
            readers[0].execute("SELECT COUNT(*) FROM objects").fetchall()

    with pytest.raises(TemporaryError, match="reads the catalog"):
        rebuild(root, read)
    readers[0].close()
    assert tables_of(root) == before
    assert rebuild(root).damages == []
    assert tables_of(root) == before
