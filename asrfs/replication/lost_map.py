"""A dirty map that cannot be read, or is not there although it must have been: writes go on, all is compared (I8).

    kept under another name ─▶ in a new map every disk is UNKNOWN, and what is gone from the journal is given up, saved
        ─▶ the agent runs ─▶ gaps opened ─▶ disks compared with the store ─▶ what differs is marked ─▶ filled, closed

A map that was never written is told from one that is lost by what it was for: a disk whose gap is open, or a journal
that begins behind what the store has acknowledged (I4). Positions are older than the map only before an agent has run.
A map that could not be saved counts all the same: the next start comes to the same one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import structlog

from asrfs.errors import IntegrityError
from asrfs.journal.segments import list_journal, read_header, segment_name
from asrfs.model.dirty_map import DirtyMap, Gap, GivenUp, Reason
from asrfs.model.machine import DiskConfig, DiskRecord, MachineConfig
from asrfs.model.names import id_bytes
from asrfs.model.positions import Positions
from asrfs.replication.dirty_map_file import DirtyMapFile, load_dirty_map
from asrfs.storage.interface import Storage, read_whole

ALARM = "dirty-map"


class Found(NamedTuple):
    """What an agent that starts begins with. `lost`: why it had to be made anew, else empty."""

    map: DirtyMap
    given_up: GivenUp
    lost: str = ""


def find_dirty_map(
    storage: Storage, name: str, journal: Storage, machine: MachineConfig, positions: Positions
) -> Found:
    """The map in the file `name`, or one that says of every disk that nothing is known. Changes nothing. Blocks."""
    try:
        found = Found(*load_dirty_map(storage, name))
    except IntegrityError as error:
        return _unknown(journal, machine, positions, str(error))
    if not storage.exists(name) and positions != Positions() and _is_missed(journal, machine, positions):
        return _unknown(journal, machine, positions, "it is not there")
    return found


def open_dirty_map(
    storage: Storage, name: str, journal: Storage, machine: MachineConfig, positions: Positions
) -> DirtyMapFile:
    """The same, and saved; a file that cannot be read is set aside. Blocks."""
    found = find_dirty_map(storage, name, journal, machine, positions)
    dirty = DirtyMapFile(storage, name, (found.map, found.given_up))
    log = structlog.get_logger("asrfs.dirty_map")
    try:
        if found.lost:
            log.warning("the dirty map is lost, all disks are compared", reason=found.lost)
            if storage.exists(name):
                _set_aside(storage, name)
        if found.lost or not storage.exists(name):
            dirty.save()
    except OSError as error:
        log.warning("the new dirty map is not saved", reason=str(error))
    return dirty


def unknown_of(machine: MachineConfig) -> DirtyMap:
    """A map that has every disk and no mark."""
    dirty = DirtyMap()
    for disk in machine.live_disks():
        dirty.enter(disk.slot, Reason.UNKNOWN)
    return dirty


def unknown_slots(dirty: DirtyMap) -> list[int]:
    """Disks of which comparing has to say what is missing."""
    return [slot for slot in dirty.slots() if Reason.UNKNOWN in dirty.reasons(slot)]


def lost_text(storage: Storage, name: str) -> str:
    """What people are told while disks are unknown."""
    kept = _names_set_aside(storage, name)
    lost = f"could not be read and was set aside as {kept[-1]}" if kept else "was not there any more"
    return f"{name}, which says what the replica lacks, {lost}: all disks are compared with the replica"


def _unknown(journal: Storage, machine: MachineConfig, positions: Positions, why: str) -> Found:
    is_behind = _begins_behind(journal, machine, positions.acknowledged.lsn)
    return Found(unknown_of(machine), _what_is_gone(machine, positions) if is_behind else GivenUp(), why)


def _what_is_gone(machine: MachineConfig, positions: Positions) -> GivenUp:
    """All that is applied, so that the journal has the place behind it (I4)."""
    boot = machine.boot_document()
    disks = tuple(_at_applied(disk, boot) for disk in machine.disks)
    acknowledged_lsn = positions.acknowledged.lsn
    return GivenUp(acknowledged_lsn, positions.applied, disks, (Gap(acknowledged_lsn),))


def _at_applied(disk: DiskConfig, boot: bytes) -> DiskRecord:
    """Of a disk that is being removed records may follow, and its removal with them."""
    is_removed = disk.removed and disk.released
    return msgspec.structs.replace(DiskRecord.of(disk, boot), removed=is_removed, gap=not is_removed)


def _is_missed(journal: Storage, machine: MachineConfig, positions: Positions) -> bool:
    has_gap = any(disk.gap for disk in machine.live_disks())
    return has_gap or _begins_behind(journal, machine, positions.acknowledged.lsn)


def _begins_behind(journal: Storage, machine: MachineConfig, lsn: int) -> bool:
    """Whether the journal does not have record `lsn + 1` any more."""
    for number in list_journal(journal).segments:
        file = journal.open(segment_name(number))
        try:
            header = read_header(file, number, id_bytes(machine.id))
        finally:
            file.close()
        if header is not None:
            return header.first_lsn > lsn + 1
    return False


def _set_aside(storage: Storage, name: str) -> None:
    """Give what cannot be read another name, too, unless it has one. Raises OSError."""
    kept = _names_set_aside(storage, name)
    if kept and read_whole(storage, kept[-1]) == read_whole(storage, name):
        return
    number = int(kept[-1].rpartition("-")[2]) + 1 if kept else 1
    storage.link(name, f"{name}.unreadable-{number}")
    storage.sync_directory("")


def _names_set_aside(storage: Storage, name: str) -> Sequence[str]:
    """Oldest first."""
    pattern = re.compile(re.escape(name) + r"\.unreadable-(\d+)")
    found = [(int(match[1]), each) for each in storage.names("") if (match := pattern.fullmatch(each))]
    return [each for _, each in sorted(found)]
