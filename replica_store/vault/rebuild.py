"""A new catalog from the objects alone.

    newest policies, groups and failovers; list machines ─▶ newest description of each ─▶ survey its log ─▶ chain
        ─▶ catalog.sqlite3.new ─▶ in place of the old

The new one takes its place only once its file holds all of it, without SQLite's write-ahead log beside it.
Tokens that were not used and what hosts last said of themselves are not in objects and are lost. The old catalog goes
first, with what SQLite keeps beside it, because its write-ahead log must never meet the new one; a crash in
between leaves no catalog, which every command says, and rebuilding again mends.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from asrfs.errors import IntegrityError
from asrfs.storage.directory import DirectoryStorage
from replica_store.vault.catalog import Catalog
from replica_store.vault.group_changes import GROUP_BOOKS
from replica_store.vault.groups import write_groups
from replica_store.vault.keys import KeyFiles, MachineDescription, Sealer
from replica_store.vault.objects import Objects
from replica_store.vault.operations import sealed_operations, write_operation
from replica_store.vault.policies import write_book
from replica_store.vault.policy_changes import POLICY_BOOKS
from replica_store.vault.promotions import sealed_promotions, write_promotion
from replica_store.vault.rows import Entry, MachineRow, description_prefix, log_prefix, parse_log_name
from replica_store.vault.survey import Surveyed, Unreadable, chain_of, log_names, survey
from replica_store.vault.vault import CATALOG_FILE, describe, lock, lock_descriptions, open_objects

_BATCH = 1000
_NEW_FILE = f"{CATALOG_FILE}.new"
_BESIDE = ("", "-wal", "-shm")


@dataclass(slots=True)
class Rebuilt:
    """What was found. `damages`: one line each, naming file and LSN, of what the catalog lacks now."""

    machines: int = 0
    objects: int = 0
    points: int = 0
    left_out: int = 0
    damages: list[str] = field(default_factory=list)


def rebuild(root: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Rebuilt:
    """Replace the vault's catalog. Raises RefusedError while the vault is served.

    `progress` is told how many log objects of how many have been read.
    """
    root = os.path.abspath(root)
    describe(root)
    storage = DirectoryStorage(root)
    with lock(root), lock_descriptions(root):
        _remove(storage, _NEW_FILE)
        objects = open_objects(root)
        catalog = Catalog.create(storage.path(_NEW_FILE))
        try:
            report = _fill(catalog, objects, KeyFiles(os.path.join(root, "keys")).sealer(), progress)
            catalog.fold()  # only the file takes the old one's place
        finally:
            catalog.close()
        storage.sync_directory("")
        _remove(storage, CATALOG_FILE)
        storage.rename(_NEW_FILE, CATALOG_FILE)
        storage.sync_directory("")
    return report


def _fill(catalog: Catalog, objects: Objects, sealer: Sealer, progress: Callable[[int, int], None]) -> Rebuilt:
    report = Rebuilt()
    names_of = {machine_id: log_names(objects, machine_id) for machine_id in _machine_ids(objects)}
    total = sum(map(len, names_of.values()))
    _fill_decisions(catalog, objects, sealer, report)
    done = 0
    for machine_id, names in sorted(names_of.items()):
        description = _description(objects, sealer, machine_id, report)
        if description is None:
            done += len(names)
            continue
        with catalog.transaction():
            catalog.put_machine(_machine_row(description, description.epoch))
        report.machines += 1
        keys = sealer.open_keys(machine_id, description.sealed_keys)
        objects.settle(log_prefix(machine_id))
        surveyed: list[Surveyed] = []
        unreadable: list[Unreadable] = []
        for each in survey(objects, machine_id, keys, names):
            if isinstance(each, Surveyed):
                surveyed.append(each)
            else:
                unreadable.append(each)
            done += 1
            progress(done, total)
        chain = chain_of(surveyed, None)
        for at in range(0, len(chain), _BATCH):
            with catalog.transaction():
                catalog.append(chain[at : at + _BATCH])
        if chain and chain[-1].row.epoch > description.epoch:  # I6: what has been superseded stays so
            with catalog.transaction():
                catalog.put_machine(_machine_row(description, chain[-1].row.epoch))
        _account(report, description, chain, surveyed, unreadable)
    return report


def _fill_decisions(catalog: Catalog, objects: Objects, sealer: Sealer, report: Rebuilt) -> None:
    """What people decided. What hosts are told rises above whatever they were told before."""
    book, damages = POLICY_BOOKS.newest(objects, sealer)
    groups, more_damages = GROUP_BOOKS.newest(objects, sealer)
    failovers, damaged_failovers = sealed_operations(objects, sealer)
    promoted, damaged_promotions = sealed_promotions(objects, sealer)
    report.damages += damages + more_damages + damaged_failovers + damaged_promotions
    with catalog.transaction():
        for each in failovers:
            write_operation(catalog, each)
        for promotion in promoted:
            write_promotion(catalog, promotion)
        if book is not None:
            write_book(catalog, book)
        if groups is not None:
            write_groups(catalog, groups)
        catalog.raise_configuration_generation(
            least=max(book.generation if book else 0, groups.generation if groups else 0)
        )


def _account(
    report: Rebuilt,
    description: MachineDescription,
    chain: list[Entry],
    surveyed: list[Surveyed],
    unreadable: list[Unreadable],
) -> None:
    """Say what is missing. An unreadable object matters only if nothing else holds its LSNs."""
    report.objects += len(chain)
    report.points += sum(len(entry.points) for entry in chain)
    report.left_out += len(surveyed) - len(chain)
    last_lsn = chain[-1].row.last_lsn if chain else 0
    report.damages += [
        f"{each.text} (LSN {each.name.first_lsn}..{each.name.last_lsn} of machine {description.name})"
        for each in unreadable
        if each.name.last_lsn > last_lsn
    ]
    cut_off = [each.entry.row for each in surveyed if each.entry.row.first_lsn > last_lsn + 1]
    if cut_off:
        until = min(row.first_lsn for row in cut_off) - 1
        report.damages.append(
            f"machine {description.name}: LSN {last_lsn + 1}..{until} is missing or damaged, so {len(cut_off)} later "
            f"log objects up to LSN {max(row.last_lsn for row in cut_off)} are not in the catalog"
        )


def _machine_ids(objects: Objects) -> set[str]:
    """Machines that have an object of any kind."""
    found = set()
    for name in objects.list("machines/"):
        parsed = parse_log_name(name)
        found.add(parsed.machine_id if parsed else name.split("/")[1])
    return found


def _description(objects: Objects, sealer: Sealer, machine_id: str, report: Rebuilt) -> MachineDescription | None:
    found = []
    for name in objects.list(description_prefix(machine_id)):
        try:
            found.append(sealer.open_description(machine_id, objects.read(name), objects.where(name)))
        except IntegrityError as error:
            report.damages.append(str(error))
    if not found:
        report.damages.append(
            f"{objects.where(f'machines/{machine_id}')}: no description of this machine can be read, so its history "
            "cannot be opened"
        )
    return max(found, key=lambda description: description.generation, default=None)


def _machine_row(description: MachineDescription, epoch: int) -> MachineRow:
    return MachineRow(
        id=description.id,
        name=description.name,
        epoch=epoch,
        serial=description.serial,
        revoked=description.revoked,
        enrolled_ns=description.enrolled_ns,
        generation=description.generation,
        sealed_keys=description.sealed_keys,
    )


def _remove(storage: DirectoryStorage, name: str) -> None:
    """Durably, a catalog before its log: without the log it would be found again, older than it was or damaged."""
    for beside in _BESIDE:
        if storage.exists(name + beside):
            storage.unlink(name + beside)
            storage.sync_directory("")
