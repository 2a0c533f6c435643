"""One contract for every catalog: the file, and those in memory that a test or the simulation can set back."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest

from asrfs.errors import IntegrityError, NotFoundError, TemporaryError
from asrfs.model.machine import DiskRecord
from asrfs.model.marker import MarkerRecord
from replica_store.vault.catalog import Catalog
from replica_store.vault.rows import DiskRow, Entry, LinkRow, MachineRow, ObjectRow, PointRow
from replica_store.vault.schema import REBUILDABLE
from tests.fakes.failing_catalog import CatalogFault, fail
from tests.fakes.memory_catalog import MemoryCatalog, open_catalog
from tests.proof.sim import store as sim_store
from tests.proof.sim.processes import Killed, Process

MACHINE = "0123456789abcdef0123456789abcdef"
ROW = MachineRow(MACHINE, "web1", 1, "12", False, 7, 1, b"sealed")


@dataclass
class Kind:
    """`reopen` is what the next process finds."""

    catalog: Catalog
    reopen: Callable[[], Catalog]


@pytest.fixture(params=["file", "memory", "simulation"])
def kind(request: pytest.FixtureRequest, scratch: Path) -> Kind:
    if request.param == "file":
        path = str(scratch / "catalog.sqlite3")
        return Kind(Catalog.create(path), lambda: Catalog(path, writable=True))
    plain = MemoryCatalog()
    if request.param == "memory":
        return Kind(plain, lambda: MemoryCatalog(plain.content()))
    connection = open_catalog(plain.content())
    process = Process("store", "store")
    return Kind(
        sim_store.MemoryCatalog(connection, process),
        lambda: sim_store.MemoryCatalog(open_catalog(connection.serialize()), process),
    )


def entry(first: int, last: int, *, machine_id: str = MACHINE) -> Entry:
    row = ObjectRow(machine_id, 1, first, last, 100 + first, 100 + last, bytes([first]) * 32, 1000, f"{first:08x}")
    disk = DiskRecord(slot=0, id="1" * 32, name="d0", size_bytes=4096 * first)
    point = PointRow(machine_id, last, 1, 100 + last, MarkerRecord(id=f"{last:032x}", name=f"p{last}"))
    return Entry(row, (DiskRow(machine_id, first, disk),), (point,))


def fill(catalog: Catalog) -> None:
    with catalog.transaction():
        catalog.put_machine(ROW)
        catalog.append([entry(1, 4), entry(5, 5)])


def test_what_was_put_is_found(kind: Kind) -> None:
    fill(kind.catalog)
    for catalog in (kind.catalog, kind.reopen()):
        assert catalog.machines() == [ROW] == [catalog.machine("web1")]
        assert catalog.machine_by_id(MACHINE) == ROW
        assert catalog.machine_by_id("f" * 32) is None
        assert catalog.last_object(MACHINE) == entry(5, 5).row
        assert [catalog.object_with(MACHINE, lsn) for lsn in (4, 6)] == [entry(1, 4).row, None]
        assert catalog.objects_of(MACHINE, 4) == [entry(1, 4).row]
        assert catalog.space(MACHINE) == (2, 2000)
        assert catalog.disk_rows(MACHINE) == [*entry(1, 4).disks, *entry(5, 5).disks]
        assert catalog.points(MACHINE) == [*entry(1, 4).points, *entry(5, 5).points]
        assert [len(catalog.table(name)) for name in ("machines", "objects", "points", "disks")] == [1, 2, 2, 2]
        assert catalog.check() == []
        catalog.check_whole()
        with pytest.raises(NotFoundError):
            catalog.machine("db1")


def test_a_machine_is_replaced_and_links_are(kind: Kind) -> None:
    fill(kind.catalog)
    with kind.catalog.transaction():
        kind.catalog.put_machine(replace(ROW, epoch=2, revoked=True))
    links = [LinkRow(MACHINE, 9, connected, 5, 5, 105) for connected in (True, False)]
    assert kind.catalog.link(MACHINE) is None
    for link in links:
        kind.catalog.put_links([link])
    assert kind.reopen().link(MACHINE) == links[-1]
    assert kind.reopen().machine("web1") == replace(ROW, epoch=2, revoked=True)


@pytest.mark.parametrize("error", [ValueError("no"), Killed("no"), KeyboardInterrupt()])
def test_what_raises_leaves_nothing(kind: Kind, error: BaseException) -> None:
    fill(kind.catalog)
    with pytest.raises(type(error)), kind.catalog.transaction():
        kind.catalog.append([entry(6, 9)])
        raise error
    for catalog in (kind.catalog, kind.reopen()):
        assert cast(ObjectRow, catalog.last_object(MACHINE)).last_lsn == 5
    with kind.catalog.transaction():
        kind.catalog.append([entry(6, 9)])
    assert cast(ObjectRow, kind.reopen().last_object(MACHINE)).last_lsn == 9


def test_changes_belong_into_a_transaction_and_histories_have_no_gap(kind: Kind) -> None:
    with pytest.raises(AssertionError):
        kind.catalog.put_machine(ROW)
    fill(kind.catalog)
    with pytest.raises(AssertionError, match="no gap"), kind.catalog.transaction():
        kind.catalog.append([entry(7, 8)])


def test_errors_are_in_our_words(kind: Kind) -> None:
    fill(kind.catalog)
    with pytest.raises(IntegrityError), kind.catalog.transaction():
        kind.catalog.append([entry(1, 1, machine_id="f" * 32)])  # of no machine
    with pytest.raises(IntegrityError), kind.catalog.transaction():
        kind.catalog.put_machine(replace(ROW, id="e" * 32))  # of a name that is taken
    with pytest.raises(IntegrityError):
        kind.catalog.select("SELECT nothing FROM nowhere")


def test_transactions_of_threads_come_one_after_the_other(kind: Kind) -> None:
    fill(kind.catalog)
    begun, seen = threading.Event(), []

    def look() -> None:
        begun.set()
        seen.append(kind.catalog.last_object(MACHINE))

    thread = threading.Thread(target=look)
    with kind.catalog.transaction():
        kind.catalog.append([entry(6, 6)])
        thread.start()
        assert begun.wait(10)
        kind.catalog.append([entry(7, 7)])
    thread.join()
    assert seen == [entry(7, 7).row]


@pytest.mark.parametrize("life", range(20))  # a connection that reads memory it gave back does so by chance
def test_a_commit_in_doubt_is_in_its_copy_and_the_process_goes_on_without(life: int) -> None:
    before = MemoryCatalog()
    fill(before)
    catalog = MemoryCatalog(before.content())
    fault = fail(catalog, CatalogFault(at=-1, error=sqlite3.SQLITE_IOERR))
    with pytest.raises(TemporaryError), catalog.transaction():
        catalog.append([entry(6, 9)])
        fault.at = fault.seen  # the COMMIT
    assert fault.in_doubt is not None
    done = MemoryCatalog(fault.in_doubt)
    expected = {table: done.table(table) for table in REBUILDABLE}  # takes what memory the other may have given back
    assert cast(ObjectRow, done.last_object(MACHINE)).last_lsn == 9
    assert catalog.content() == catalog.commits[-1] == before.content()
    with catalog.transaction():
        catalog.append([entry(6, 9)])
    assert {table: catalog.table(table) for table in REBUILDABLE} == expected
    assert catalog.check() == done.check() == []
