"""The catalog: values of rows that nobody wrote, and a file whose bytes have changed, under every way of reading it."""

from __future__ import annotations

import os
import random
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asrfs.model.configuration import decode_configuration, encode_configuration
from asrfs.model.machine import decode_disk, encode_disk
from asrfs.model.marker import HookResult, MarkerRecord, decode_marker, encode_marker
from asrfs.model.policy import follow_policy
from asrfs.model.quantities import format_time
from asrfs.storage.system_clock import SystemClock
from replica_store.failover.report import document
from replica_store.ingest.ingester import Ingester
from replica_store.points.builder import disks_of, open_disks, resolve
from replica_store.points.point_disk import FrameCache
from replica_store.points.tree import point_tree
from replica_store.vault.catalog import Catalog
from replica_store.vault.configuration import configuration_of
from replica_store.vault.enrolment import make_token
from replica_store.vault.flaws import flaw_before, note_flaws
from replica_store.vault.operations import ChosenPoint, Operation, Places, Step, begin, operations
from replica_store.vault.policy_changes import assign, set_policy
from replica_store.vault.protection import protection_of
from replica_store.vault.rows import LogName, MachineRow, ObjectRow, PointRow, parse_log_name
from replica_store.vault.scrub import Damage, scrub
from replica_store.vault.standing import standing_of
from replica_store.vault.vault import CATALOG_FILE, Vault, describe
from tests.fakes.filled_vault import fill_vault
from tests.fakes.memory_history import MemoryHistory, random_history
from tests.proof.fuzzing.mutations import Strike, any_extreme, flip, mutate_bytes, mutate_text
from tests.proof.fuzzing.target import Target, Trial, refused

_TABLES = (
    *("machines", "objects", "points", "disks", "links", "tokens"),
    *("policies", "assignments", "generations", "appeared"),
    *("operations", "flaws"),
)
_READ_BYTES = 16 << 10
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_EPOCH_END = 1 << 32
_FULL_MARKER = MarkerRecord(
    id="e" * 32,
    group="shop",
    name="full",
    hold_ms=1.5,
    note="a note",
    wanted="application",
    failed="hook db: exit code 1",
    freeze_ms=2.5,
    hooks=(HookResult(name="db", phase="pre", exit_code=1, seconds=0.5, output="no"),),
    group_point="d" * 32,
    members=("c" * 32,),
    ready=1,
    unfinished=True,
)
"""Every column of a point has a value, so each is changed."""
_OPERATION = Operation(
    id="ab" * 16,
    machine_id=MemoryHistory().id,
    machine="web1",
    kind="unplanned",
    state="commit-pending",
    point=ChosenPoint(selector="latest", lsn=20, epoch=1, time_ns=5, id="e" * 32),
    places=Places(directory="/srv/one", state="/srv/one/state", mount="/srv/one/disks", made=("/srv/one/state",)),
    begun_ns=7,
    steps=(Step("serve", 1.5),),
    rto_s=1.5,
)


def make_vault(root: Path) -> MemoryHistory:
    """A vault with a history, a token and a link."""
    history = random_history(4, records=40, disks={"root": 64 * 4096, "db": 16 * 4096})
    history.mark(_FULL_MARKER)
    history.seal()
    fill_vault(root, history)
    with Vault.open(str(root), writable=True) as vault:
        make_token(vault, "web2", SystemClock())
        with vault.catalog.transaction():
            vault.catalog.change("INSERT INTO links VALUES (?, 5, 1, 9, 8, 7)", (history.id,))
            vault.catalog.note_appeared(vault.catalog.points(history.id), 1_700_000_000_000_000_000)
        set_policy(vault, "gold", {"crash_interval": "60s", "bandwidth_limit": "08:00-18:00 20M; else 200M"})
        assign(vault, "gold", "machine", history.id)
    begin(str(root), lambda vault: _OPERATION)
    note_flaws(str(root), history.id, [Damage("web1", "file", 7, 5, 6, "file: digest")], 3)
    return history


# ---- rows ---------------------------------------------------------------------------------------------------------


def odd_column(rng: random.Random, old: Any, strike: Strike) -> Any:
    """Another value of the column's own type: SQLite takes no other."""
    if isinstance(old, str):
        return mutate_text(rng, old, strike).encode("utf-8", "replace").decode()
    if isinstance(old, bytes):
        return rng.choice((flip(rng, old), old[:-1], old + b"\0", b""))
    if isinstance(old, float):
        return rng.choice((float("inf"), -1.0, 1e300))
    if old is None:
        return rng.choice((None, 0, 1))
    number = rng.choice((any_extreme(rng), old + 1, old - 1, -old))
    return max(-(1 << 63), min(number, (1 << 63) - 1))


class Rows:
    """Changes one value in a transaction that never ends well, and reads through the same connection meanwhile."""

    def __init__(self, vault: Vault, history: MemoryHistory) -> None:
        self.vault = vault
        self._description = describe(vault.root)
        self._history = history
        self._columns = {
            table: [str(row[1]) for row in vault.catalog.select(f"PRAGMA table_info({table})")] for table in _TABLES
        }
        self._rows = {table: vault.catalog.table(table) for table in _TABLES}

    def change(self, rng: random.Random, strike: Strike) -> bool:
        """Inside a transaction. False when SQLite itself would not have it."""
        table = rng.choice([name for name in _TABLES if self._rows[name]])
        columns, row = self._columns[table], rng.choice(self._rows[table])
        strike("value")
        for at in rng.sample(range(len(columns)), rng.choice((1, 1, 2))):
            where = " AND ".join(f"{name} IS ?" for name in columns[:3])
            try:
                self.vault.catalog.change(
                    f"UPDATE OR REPLACE {table} SET {columns[at]} = ? WHERE {where}",
                    (odd_column(rng, row[at], strike), *row[:3]),
                )
            except (sqlite3.Error, ValueError):
                return False
        return True

    def trial(self, rng: random.Random, strike: Strike) -> None:
        catalog = self.vault.catalog
        vault = Vault(self.vault.root, self._description, self.vault.objects, catalog)  # it has opened no keys yet

        class _TakenBack(Exception):
            """Ends the transaction."""

        try:
            with catalog.transaction():
                catalog.select("PRAGMA defer_foreign_keys = ON")
                if refused(lambda: self.change(rng, strike)):
                    read_everything(vault, self._history, rng)
                raise _TakenBack
        except _TakenBack:
            return


def read_everything(vault: Vault, history: MemoryHistory, rng: random.Random) -> None:
    """Each way of reading by itself: an error of one must not hide another."""
    machines = refused(vault.machines) or []
    for machine in machines:
        refused(lambda machine=machine: _check_rows(vault, machine))
    lsn = rng.randrange(1, history.lsn + 1)
    selector = rng.choice(
        ("latest", "latest-processed", f"lsn:{lsn}", f"time:{format_time(history.time_at(lsn))}", "m1")
    )
    readings: list[Callable[[], object]] = [
        lambda: vault.machine("web1"),
        lambda: vault.points(history.id),
        lambda: vault.disks_at(history.id, lsn),
        lambda: vault.gap_at(history.id, lsn),
        lambda: vault.objects_of(history.id, lsn),
        lambda: _read_disks(vault, selector),
        lambda: _walk(vault),
        lambda: _check_told(vault, history.id),
        lambda: _check_failovers(vault, history.id, lsn),
        lambda: Ingester(vault, history.id, lambda: "deadbeef").begin_session(vault.machine("web1"), bytes(32)),
    ]
    if rng.random() < 0.1:
        readings.append(lambda: scrub(vault, machines))
    for reading in readings:
        refused(reading)
    for machine in machines:
        standing = refused(lambda machine=machine: standing_of(vault, machine, 1_800_000_000_000_000_000))
        if standing is not None and standing.time_ns is not None:
            format_time(standing.time_ns)
        for point in refused(lambda machine=machine: vault.points(machine.id)) or []:
            format_time(point.time_ns)


def _check_rows(vault: Vault, machine: MachineRow) -> None:
    """What the catalog gives is what enrolment, a host's records and its objects could have put there, and no more."""
    is_labelled = re.fullmatch("[0-9a-f]{32}", machine.id) and _LABEL.fullmatch(machine.name)
    assert is_labelled and 0 <= machine.epoch < _EPOCH_END, f"a machine that cannot be: {machine}"
    history = f"machine {machine.id}"
    for row in refused(lambda: vault.objects_of(machine.id, 1 << 62)) or []:
        _check_object(row, history)
    for disk in refused(lambda: vault.catalog.disk_rows(machine.id)) or []:
        said = refused(lambda disk=disk: decode_disk(encode_disk(disk.record)))
        assert said == disk.record and disk.lsn > 0, f"a disk that cannot be, of {history}: {disk}"
    for point in refused(lambda: vault.catalog.points(machine.id)) or []:
        _check_point(point, history)


def _check_told(vault: Vault, machine_id: str) -> None:
    """No host is told what it would pass over as a whole, and each can be followed in part."""
    told = configuration_of(vault.catalog, machine_id)
    assert decode_configuration(encode_configuration(told)) == told
    follow_policy(told.keys)


def _check_failovers(vault: Vault, machine_id: str, lsn: int) -> None:
    """What is mounted, removed and waited for on the word of a row is what this program would have written."""
    flaw_before(vault.catalog, machine_id, lsn)
    for each in operations(vault.catalog):
        document(each)
        for path in (each.places.directory, each.places.state, each.places.mount, *each.places.made):
            assert os.path.normpath(path) == path and path != "/", f"a place that cannot be: {path}"
        protection_of(vault, vault.machine(each.machine))


def _check_object(row: ObjectRow, history: str) -> None:
    said = LogName(row.machine_id, row.epoch, row.first_lsn, row.last_lsn, row.nonce)
    is_sound = 0 < row.first_lsn <= row.last_lsn and 0 <= row.first_time_ns <= row.last_time_ns
    is_sound = is_sound and row.length > 0 and len(row.digest) == 32 and parse_log_name(row.name) == said
    assert is_sound, f"a log object that cannot be, of {history}: {row}"


def _check_point(row: PointRow, history: str) -> None:
    is_sound = refused(lambda: decode_marker(encode_marker(row.marker))) == row.marker
    is_sound = is_sound and row.lsn > 0 and row.time_ns >= 0 and 0 <= row.epoch < _EPOCH_END
    assert is_sound, f"a point that cannot be, of {history}: {row}"


def _read_disks(vault: Vault, selector: str) -> None:
    cut = resolve(vault, "web1", selector)
    format_time(cut.time_ns)
    disks = disks_of(vault, cut)
    frames = FrameCache(vault, 1 << 20)
    for disk in open_disks(vault, cut, [disk.name for disk in disks], frames).values():
        size = min(disk.size_bytes, _READ_BYTES)
        disk.read(disk.size_bytes - size, size)


def _walk(vault: Vault) -> None:
    """As somebody who looks into the mounted tree."""
    root = point_tree(vault, FrameCache(vault, 1 << 20))
    for machine in root.entries():
        assert "/" not in machine.name and machine.name not in (".", "..")
        below = root.lookup(machine.name).node
        for point in list(below.entries())[:3]:  # type: ignore[union-attr]
            assert "/" not in point.name and point.name not in (".", ".."), "a name would be a path"


@contextmanager
def open_rows(scratch: Path) -> Iterator[Trial]:
    history = make_vault(scratch / "vault")
    with Vault.open(str(scratch / "vault"), writable=True) as vault:
        read_everything(vault, history, random.Random(1))
        _read_disks(vault, "latest")
        yield Rows(vault, history).trial


# ---- the file -----------------------------------------------------------------------------------------------------


@contextmanager
def open_file(scratch: Path) -> Iterator[Trial]:
    history = make_vault(scratch / "vault")
    path = scratch / "vault" / CATALOG_FILE
    good = path.read_bytes()
    assert not list((scratch / "vault").glob(f"{CATALOG_FILE}-*")), "nothing of it is elsewhere"

    def trial(rng: random.Random, strike: Strike) -> None:
        content = mutate_bytes(rng, good, good, strike)
        if rng.random() < 0.7:
            content = good[:100] + content[100:]  # the header is sound: what lies behind it is looked at
        path.write_bytes(content)
        for beside in ("-wal", "-shm", "-journal"):
            path.with_name(path.name + beside).unlink(missing_ok=True)
        catalog = refused(lambda: Catalog(str(path), writable=rng.random() < 0.5))
        if catalog is None:
            return
        refused(catalog.check_whole)
        catalog.close()
        vault = refused(lambda: Vault.open(str(scratch / "vault")))
        if vault is not None:
            with vault:
                read_everything(vault, history, rng)

    try:
        yield trial
    finally:
        shutil.rmtree(scratch / "vault")


TARGETS = (
    Target("catalog rows", 3, open_rows),
    Target("catalog file", 1, open_file),
)
