"""The catalog and what is derived from it: histories without a gap, disks, points, gaps, chains, achieved RPO."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrfs.errors import AsrfsError, IntegrityError, NotFoundError, RefusedError
from asrfs.format.log_object import NO_DIGEST
from asrfs.model.machine import DiskRecord
from asrfs.model.marker import HookResult, MarkerRecord
from replica_store.vault import schema
from replica_store.vault.catalog import Catalog
from replica_store.vault.chain import Found, best_chain
from replica_store.vault.gaps import gap_at, gaps_of
from replica_store.vault.rows import (
    DiskRow,
    Entry,
    LinkRow,
    MachineRow,
    ObjectRow,
    PointRow,
    log_object_name,
    parse_log_name,
)
from replica_store.vault.standing import SILENT_S_MAX, achieved_rpo_s

ID = "a" * 32
NS = 1_000_000_000


@pytest.fixture
def catalog(scratch: Path) -> Iterator[Catalog]:
    catalog = Catalog.create(str(scratch / "catalog.sqlite3"))
    with catalog.transaction():
        catalog.put_machine(machine())
    yield catalog
    catalog.close()


def machine(name: str = "web1", machine_id: str = ID) -> MachineRow:
    return MachineRow(machine_id, name, 1, "abc", False, 5, 1, b"sealed")


def entry(first: int, last: int, *, disks: tuple[DiskRow, ...] = (), points: tuple[PointRow, ...] = ()) -> Entry:
    row = ObjectRow(ID, 1, first, last, first * 10, last * 10, bytes([last]) * 32, 500, "0badcafe")
    return Entry(row, disks, points)


def disk(lsn: int, slot: int = 0, *, gap: bool = False, removed: bool = False) -> DiskRow:
    record = DiskRecord(slot=slot, id=f"{slot:032x}", name=f"disk{slot}", size_bytes=512, gap=gap, removed=removed)
    return DiskRow(ID, lsn, record)


def point(lsn: int, name: str | None = None) -> PointRow:
    return PointRow(ID, lsn, 1, lsn * 10, MarkerRecord(id=f"{lsn:032x}", name=name))


def append(catalog: Catalog, *entries: Entry) -> None:
    with catalog.transaction():
        catalog.append(entries)


def test_a_history_reads_back_in_order(catalog: Catalog) -> None:
    entries = [entry(1, 5), entry(6, 6), entry(7, 20)]
    append(catalog, *entries)
    rows = [each.row for each in entries]
    assert catalog.objects_of(ID, 1 << 63) == rows
    assert catalog.objects_of(ID, 6) == rows[:2]
    assert catalog.objects_of(ID, 0) == []
    assert catalog.last_object(ID) == rows[-1]
    assert catalog.object_with(ID, 6) == rows[1]
    assert catalog.object_with(ID, 21) is None
    assert catalog.object_with(ID, 0) is None
    assert catalog.space(ID) == (3, 1500)
    assert parse_log_name(rows[0].name) is not None
    assert rows[0].name == log_object_name(ID, 1, 1, 5, "0badcafe")


@pytest.mark.parametrize("first", [1, 5, 7])
def test_i3_a_history_takes_nothing_but_what_comes_next(catalog: Catalog, first: int) -> None:
    append(catalog, entry(1, 5))
    with pytest.raises(AssertionError, match="I3"):
        append(catalog, entry(first, 9))
    assert len(catalog.objects_of(ID, 99)) == 1


def test_a_transaction_is_whole_or_not_at_all(catalog: Catalog) -> None:
    with pytest.raises(AsrfsError, match="no"), catalog.transaction():
        catalog.append([entry(1, 5, disks=(disk(1),), points=(point(5),))])
        raise AsrfsError("no")
    assert (catalog.objects_of(ID, 99), catalog.disk_rows(ID), catalog.points(ID)) == ([], [], [])
    append(catalog, entry(1, 5))


def test_what_is_committed_is_seen_by_readers_beside_and_after_a_kill(catalog: Catalog, scratch: Path) -> None:
    reader = Catalog(catalog.path, writable=False)
    append(catalog, entry(1, 5, points=(point(5, "noon"),)))
    assert [each.name for each in reader.points(ID)] == ["noon"]
    with pytest.raises(AsrfsError), reader.transaction():
        reader.append([entry(6, 6)])
    reader.close()
    for name in ("catalog.sqlite3", "catalog.sqlite3-wal"):  # what a killed process leaves
        (scratch / f"left-{name}").write_bytes((scratch / name).read_bytes())
    left = Catalog(str(scratch / "left-catalog.sqlite3"), writable=True)
    assert left.last_object(ID) == entry(1, 5).row
    assert left.select("PRAGMA synchronous") == [(2,)]
    assert left.select("PRAGMA journal_mode") == [("wal",)]
    left.close()


def test_several_threads_and_writers_wait_for_each_other(catalog: Catalog) -> None:
    others = [Catalog(catalog.path, writable=True) for _ in range(2)]

    def put(writer: Catalog, number: int) -> None:
        for n in range(10):
            with writer.transaction():
                writer.put_machine(machine(f"m{number}-{n}", f"{number * 100 + n:032x}"))

    threads = [
        threading.Thread(target=put, args=each) for each in zip([catalog, catalog, *others], range(4), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(catalog.machines()) == 41
    for other in others:
        other.close()


def test_disks_are_kept_where_they_change(catalog: Catalog) -> None:
    append(catalog, entry(1, 9, disks=(disk(1), disk(4), disk(6, 1), disk(8, removed=True))))
    append(catalog, entry(10, 19, disks=(disk(10, removed=True), disk(11, 1))))
    assert [(row.lsn, row.record.slot) for row in catalog.disk_rows(ID)] == [(1, 0), (6, 1), (8, 0)]


def test_points_keep_everything(catalog: Catalog) -> None:
    hook = HookResult(name="db", phase="pre", exit_code=1, seconds=0.5, output="no")
    said = MarkerRecord(
        id="c" * 32,
        name="noon",
        group="shop",
        hold_ms=1.5,
        note="a person's",
        consistency="crash",
        wanted="application",
        failed="hook db: exit code 1",
        freeze_ms=2.5,
        hooks=(hook,),
        group_point="d" * 32,
        members=(ID,),
        ready=1,
    )
    full = replace(point(3), marker=said)
    append(catalog, entry(1, 9, points=(full, point(7))))
    assert catalog.points(ID) == [full, point(7)]


def test_i5_a_last_word_completes_its_point_once_and_makes_none(catalog: Catalog) -> None:
    def word(lsn: int, point_id: str, completes: int, hold_ms: float) -> PointRow:
        said = MarkerRecord(id=point_id, consistency="crash", completes=completes, hold_ms=hold_ms, failed="thawed")
        return PointRow(ID, lsn, 1, lsn * 10, said)

    unfinished = MarkerRecord(id="c" * 32, consistency="filesystem", name="noon", unfinished=True)
    points = (PointRow(ID, 3, 1, 30, unfinished), point(4, "other"))
    strangers = (word(5, f"{4:032x}", 4, 9.0), word(6, "d" * 32, 3, 9.0), word(7, "c" * 32, 4, 9.0))
    append(catalog, replace(entry(1, 9, points=points), completions=strangers))
    assert catalog.points(ID) == list(points), (
        "neither a point that is finished, nor one by another's id, nor elsewhere"
    )
    append(catalog, replace(entry(10, 19), completions=(word(11, "c" * 32, 3, 2.5), word(12, "c" * 32, 3, 9.0))))
    whole = msgspec.structs.replace(unfinished, consistency="crash", unfinished=False, hold_ms=2.5, failed="thawed")
    assert catalog.points(ID) == [PointRow(ID, 3, 1, 30, whole), points[1]]


def test_unknown_machines_are_not_found(catalog: Catalog) -> None:
    with pytest.raises(NotFoundError, match="db1"):
        catalog.machine("db1")
    assert catalog.machine_by_id("b" * 32) is None
    assert catalog.machine("web1") == machine()


def test_what_is_no_catalog_of_ours_is_named(scratch: Path) -> None:
    path = scratch / "catalog.sqlite3"
    with pytest.raises(IntegrityError, match=r"catalog\.sqlite3.*rebuild"):
        Catalog(str(path), writable=False)
    path.write_bytes(random.Random(1).randbytes(9000))
    with pytest.raises(IntegrityError, match=r"catalog\.sqlite3.*rebuild"):
        Catalog(str(path), writable=True)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(RefusedError, match="99"):
        Catalog(str(path), writable=False)


def test_a_flipped_page_is_found(catalog: Catalog, scratch: Path) -> None:
    for n in range(200):
        append(catalog, entry(n + 1, n + 1))
    assert catalog.check() == []
    catalog.close()
    path = scratch / "catalog.sqlite3"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :: 997] = bytes(len(content[len(content) // 2 :: 997]))
    path.write_bytes(content)
    damaged = Catalog(str(path), writable=False)
    try:
        assert damaged.check() != []
    except IntegrityError as error:
        assert "rebuild" in str(error)  # noqa: PT017 - either way of finding it is good
    damaged.close()


# ---- gaps (I5) -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.booleans()), max_size=30))
def test_i5_a_gap_is_open_where_a_disk_says_so(changes: list[tuple[int, bool, bool]]) -> None:
    """The model: walk the records and remember for each slot what the newest one said."""
    rows = [disk(lsn, slot, gap=gap, removed=removed) for lsn, (slot, gap, removed) in enumerate(changes, 1)]
    gaps = gaps_of(rows)
    newest: dict[int, DiskRecord] = {}
    for lsn in range(len(rows) + 2):
        if 1 <= lsn <= len(rows):
            newest[rows[lsn - 1].record.slot] = rows[lsn - 1].record
        is_open = any(record.gap and not record.removed for record in newest.values())
        assert (gap_at(gaps, lsn) is not None) == is_open


# ---- chains --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    epoch: int
    first_lsn: int
    last_lsn: int
    digest: bytes


def link(epoch: int, first: int, last: int, name: str) -> Link:
    return Link(epoch, first, last, name.encode())


def chain(*found: tuple[Link, bytes]) -> str:
    best = best_chain([Found(*each) for each in found], 0, NO_DIGEST)
    return "".join(each.digest.decode() for each in best)


def test_i6_the_chain_of_the_highest_epoch_then_the_longest_wins() -> None:
    a, b = link(1, 1, 4, "a"), link(1, 5, 8, "b")
    assert chain() == ""
    assert chain((b, b"a")) == "", "without its beginning a history is none"
    assert chain((a, NO_DIGEST), (b, b"a")) == "ab"
    assert chain((b, b"a"), (a, NO_DIGEST)) == "ab", "whatever the order"
    stale, other = link(1, 5, 20, "s"), link(1, 1, 2, "o")
    assert chain((a, NO_DIGEST), (other, NO_DIGEST)) == "a"
    assert chain((a, NO_DIGEST), (b, b"a"), (stale, b"a")) == "as"
    promoted = link(2, 5, 6, "p")
    assert chain((a, NO_DIGEST), (stale, b"a"), (promoted, b"a")) == "ap"
    assert chain((a, NO_DIGEST), (promoted, b"a"), (link(1, 7, 9, "x"), b"p")) == "ap", "epochs never go back"
    assert chain((a, NO_DIGEST), (b, b"other")) == "a"
    assert chain((a, NO_DIGEST), (link(1, 6, 8, "g"), b"a")) == "a", "no gap"


@given(st.integers(0, 1 << 32))
def test_an_acknowledged_history_is_found_among_side_branches(seed: int) -> None:
    """Side branches as crashes leave them: one more object at any place, that nothing continues."""
    rng = random.Random(seed)
    found, names, lsn, digest = [], [], 0, NO_DIGEST
    for n in range(rng.randint(1, 12)):
        last = lsn + rng.randint(1, 5)
        name = f"{n:04d}".encode()
        if rng.random() < 0.3 and n:
            found.append(Found(Link(1, lsn + 1, lsn + rng.randint(1, 1 + last - lsn), b"side" + name), digest))
        found.append(Found(Link(1, lsn + 1, last + 1, name), digest))
        found.append(Found(Link(1, last + 2, last + 9, b"next" + name), name))
        names.append(name)
        lsn, digest = last + 1, name
    rng.shuffle(found)
    got = [each.digest for each in best_chain(found, 0, NO_DIGEST)]
    assert got[: len(names)] == names


# ---- achieved RPO --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("durable_lsn", "heard_ago_s", "connected", "expected_s"),
    [
        (10, 0, True, 0.0),
        (10, 3, True, 0.0),
        (12, 0, True, 7.0),
        (12, 3, True, 10.0),
        (10, 60, False, 60.0),
        (10, SILENT_S_MAX + 40, True, SILENT_S_MAX + 40),
        (12, 60, False, 67.0),
    ],
)
def test_achieved_rpo(durable_lsn: int, heard_ago_s: float, connected: bool, expected_s: float) -> None:
    """The store holds LSN 10, made 7 s before the host's newest; the host's clock is a year off and does not matter."""
    now = 1_800_000_000 * NS
    host_now = now - 365 * 86400 * NS
    link = LinkRow(ID, now - int(heard_ago_s * NS), connected, durable_lsn, durable_lsn, host_now)
    assert achieved_rpo_s(10, host_now - 7 * NS, link, now) == expected_s


TABLES_1 = (
    "CREATE TABLE machines (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, epoch INTEGER NOT NULL, "
    "serial TEXT NOT NULL, revoked INTEGER NOT NULL, enrolled_ns INTEGER NOT NULL, generation INTEGER NOT NULL, "
    "sealed_keys BLOB NOT NULL) STRICT, WITHOUT ROWID",
    "CREATE TABLE points (machine_id TEXT NOT NULL REFERENCES machines (id), lsn INTEGER NOT NULL, id TEXT NOT NULL, "
    "epoch INTEGER NOT NULL, time_ns INTEGER NOT NULL, consistency TEXT NOT NULL, group_name TEXT, name TEXT, "
    "hold_ms REAL, note TEXT, protected INTEGER NOT NULL, PRIMARY KEY (machine_id, lsn)) STRICT, WITHOUT ROWID",
    "CREATE TABLE objects (machine_id TEXT NOT NULL REFERENCES machines (id), first_lsn INTEGER NOT NULL, "
    "last_lsn INTEGER NOT NULL, epoch INTEGER NOT NULL, first_time_ns INTEGER NOT NULL, last_time_ns INTEGER NOT NULL, "
    "digest BLOB NOT NULL, length INTEGER NOT NULL, nonce TEXT NOT NULL, PRIMARY KEY (machine_id, first_lsn)) "
    "STRICT, WITHOUT ROWID",
    "CREATE TABLE disks (machine_id TEXT NOT NULL REFERENCES machines (id), slot INTEGER NOT NULL, "
    "lsn INTEGER NOT NULL, id TEXT NOT NULL, name TEXT NOT NULL, size_bytes INTEGER NOT NULL, "
    "removed INTEGER NOT NULL, gap INTEGER NOT NULL, PRIMARY KEY (machine_id, slot, lsn)) STRICT, WITHOUT ROWID",
)
"""Of the first version, those that later ones changed or refer to."""


@pytest.mark.parametrize("writable", [True, False])
def test_a_catalog_of_the_first_version_is_brought_to_this_one(scratch: Path, writable: bool) -> None:
    path = str(scratch / "catalog.sqlite3")
    old = sqlite3.connect(path)
    for statement in TABLES_1:
        old.execute(statement)
    old.execute("INSERT INTO machines VALUES (?, 'web1', 1, 'abc', 0, 5, 1, x'00')", (ID,))
    old.execute("INSERT INTO points VALUES (?, 3, ?, 1, 30, 'crash', NULL, 'noon', 0.5, NULL, 0)", (ID, f"{3:032x}"))
    old.execute("INSERT INTO objects VALUES (?, 1, 5, 1, 10, 50, ?, 500, '0badcafe')", (ID, bytes([5]) * 32))
    old.execute("INSERT INTO disks VALUES (?, 0, 1, ?, 'root', 512, 0, 0)", (ID, f"{9:032x}"))
    old.execute("PRAGMA user_version = 1")
    old.commit()
    old.close()
    new = Catalog.create(str(scratch / "new.sqlite3"))
    statement = (
        "SELECT m.name, c.name, c.type, c.pk FROM sqlite_schema m, pragma_table_info(m.name) c "
        "WHERE m.type = 'table' AND m.name IN "
        "('machines', 'points', 'objects', 'disks', 'policies', 'assignments', 'generations') ORDER BY 1, 2"
    )
    for _ in range(2):
        catalog = Catalog(path, writable=writable)
        said = MarkerRecord(id=f"{3:032x}", name="noon", hold_ms=0.5)
        assert catalog.points(ID) == [PointRow(ID, 3, 1, 30, said)]
        assert catalog.objects_of(ID, 9) == [ObjectRow(ID, 1, 1, 5, 10, 50, bytes([5]) * 32, 500, "0badcafe")]
        (disk,) = catalog.disk_rows(ID)
        assert disk.record == DiskRecord(slot=0, id=f"{9:032x}", name="root", size_bytes=512)
        assert catalog.configuration_generation() == 0
        assert catalog.select(statement) == new.select(statement)
        assert catalog.select("PRAGMA user_version") == [(schema.VERSION,)]
        catalog.close()
    new.close()


def test_which_objects_are_stretches_is_kept(catalog: Catalog) -> None:
    rows = [
        ObjectRow(ID, 1, first, first + 4, first, first + 4, bytes([first]) * 32, 500, "0badcafe", is_stretch)
        for first, is_stretch in ((1, False), (6, True))
    ]
    append(catalog, *map(Entry, rows))
    assert catalog.objects_of(ID, 9) == rows
    assert [catalog.object_with(ID, lsn) for lsn in (5, 6, 8)] == [rows[0], rows[1], rows[1]]
    found = catalog.last_object(ID)
    assert found == rows[1] and found is not None and found.is_stretch is True


def test_the_generation_of_what_hosts_are_told_only_rises(catalog: Catalog) -> None:
    with catalog.transaction():
        assert catalog.raise_configuration_generation() == 1
        assert catalog.raise_configuration_generation(least=7) == 8
    with catalog.transaction():
        assert catalog.raise_configuration_generation(least=2) == 9
    assert catalog.configuration_generation() == 9
