"""What a disk server serves: the journal of a machine and its disks, opened after recovery, and the control verbs.

    images → recover → maps → journal → DISK records → volume

The images come first, before anything is changed: another machine may have them.

`machine.json` may change while we serve; `reconcile` takes the change over. A disk appears in the volume only after
its DISK record is in the history, so the store never meets a write of a disk it has not heard of. Where the journal
has no room for that record, the disk appears all the same, readable, and its first change appends it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asrfs.daemon.control import Fields
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError, BadInputError, IntegrityError, NotFoundError, RefusedError
from asrfs.format.record import PAYLOAD_BYTES_MAX, Kind
from asrfs.fuse.direct import Bytes, Volume
from asrfs.journal.block_map import BlockMap
from asrfs.journal.disk import JournaledDisk, drop_applied, rebuild_maps
from asrfs.journal.recovery import recover
from asrfs.journal.writer import Journal
from asrfs.model.clock import Clock
from asrfs.model.machine import NO_SLOT, DiskConfig, DiskRecord, MachineConfig, decode_marker, encode_disk
from asrfs.model.names import id_bytes
from asrfs.storage.directory import DirectoryStorage, OpenFile, open_path

FILL_BYTES_MAX = 16 * PAYLOAD_BYTES_MAX
"""The most that one `fill` may ask for: a verb is answered soon."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Served:
    """A disk in the volume. `config`: what `machine.json` said of it last."""

    config: DiskConfig
    disk: JournaledDisk
    image: OpenFile


class ServedMachine:
    """Opened by the constructor, which may cut a torn tail. Methods may be called from any thread.

    Raises IntegrityError (corrupt journal), RefusedError (image in use), NotFoundError (image gone), OSError.
    """

    def __init__(self, state: StateDirectory, clock: Clock) -> None:
        self._state = state
        machine = state.load_machine()
        self._served: dict[int, _Served] = {}
        self._announced: dict[int, DiskRecord] = {}
        self._changing = threading.Lock()
        self._images: dict[int, OpenFile] = {}
        """Held and not served: until the disk is, or while what was written to a removed one is being applied."""
        try:
            self._hold_images(machine)
            self._open_journal(machine, clock)
        except BaseException:
            for image in self._images.values():
                image.close()
            raise
        with self._changing:
            self._take_over(machine)
        log.info("machine %s: LSN %d, %d disks", machine.name, self.journal.appended_lsn, len(self._served))

    def _hold_images(self, machine: MachineConfig) -> None:
        for config in machine.disks:
            if not config.released:
                try:
                    self._images[config.slot] = self._open_image(config)
                except NotFoundError:
                    if not config.removed:
                        raise

    def _open_journal(self, machine: MachineConfig, clock: Clock) -> None:
        positions = self._state.load_positions()
        storage = DirectoryStorage(self._state.journal)
        try:
            recovered = recover(storage, positions, id_bytes(machine.id))
        except IntegrityError as error:
            raise IntegrityError(f"{storage.root}: {error}") from None
        if recovered.cut is not None:
            log.warning("a torn tail was cut: %s", recovered.cut)
        self._applied_lsn = positions.applied.lsn
        self._maps = {disk.slot: BlockMap() for disk in machine.live_disks()}
        rebuild_maps(recovered, self._maps)
        self.journal = Journal(storage, id_bytes(machine.id), recovered, clock)
        self.volume = Volume(self.journal.request_sync)

    def reconcile(self) -> None:
        """Take over what changed in `machine.json`."""
        with self._changing:  # read under the lock, else an older state could be taken over after a newer one
            self._take_over(self._state.load_machine())

    def announce_late(self, slot: int) -> None:
        """Have the DISK record of a served disk in the history, if it had no room there before. Raises OSError."""
        with self._changing:
            served = self._served.get(slot)
            if served is not None:
                self._announce(served.config)

    def _announce(self, config: DiskConfig) -> None:
        """Have the disk's present DISK record in the history; under `_changing`. Raises OSError."""
        record = DiskRecord.of(config)
        if self._announced.get(config.slot) != record:
            self.journal.append(Kind.DISK, config.slot, 0, 0, encode_disk(record))
            self._announced[config.slot] = record

    def flush(self) -> None:
        """Make everything durable and close the journal. Raises OSError if it cannot be."""
        self.journal.sync()
        self.journal.close()

    def close(self) -> None:
        """Close the images, which lets others have them. Only where the process goes on."""
        for image in [*self._images.values(), *(served.image for served in self._served.values())]:
            image.close()

    # ---- disks ------------------------------------------------------------------------------------------------

    def _take_over(self, machine: MachineConfig) -> None:
        """Under `_changing`."""
        for config in machine.disks:
            if config.removed:
                self._withdraw(config)
            else:
                self._serve(config)
            try:
                self._announce(config)
            except OSError as error:
                changes = config.slot in self._announced and not config.removed
                if changes or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                log.warning("disk %s is not in the history as it is yet: %s", config.name, error.strerror)
                if not config.removed:
                    late = _UnannouncedDisk(self, config.slot, self._served[config.slot].disk)
                    self.volume.add(config.name, config.slot, late)
                continue
            if not config.removed:
                self.volume.add(config.name, config.slot, self._served[config.slot].disk)

    def _serve(self, config: DiskConfig) -> None:
        served = self._served.get(config.slot)
        if served is not None:
            served.config = config
            return
        image = self._images.pop(config.slot, None) or self._open_image(config)
        block_map = self._maps.setdefault(config.slot, BlockMap())
        disk = JournaledDisk(config.slot, config.size_bytes, image, self.journal, block_map)
        self._served[config.slot] = _Served(config, disk, image)

    def _withdraw(self, config: DiskConfig) -> None:
        """The disk vanishes. Its image stays open for a request under way; once released, others may have it."""
        served = self._served.pop(config.slot, None)
        if served is not None:
            self.volume.remove(served.config.name)
            self._images[config.slot] = served.image
        if config.released and (image := self._images.pop(config.slot, None)) is not None:
            fcntl.flock(image.fd, fcntl.LOCK_UN)

    def _open_image(self, config: DiskConfig) -> OpenFile:
        path = self._state.image_path(config)
        try:
            image = open_path(path)
        except FileNotFoundError:
            raise NotFoundError(f"the image {path} of disk {config.name} does not exist: put it back") from None
        except OSError as error:
            raise RefusedError(f"the image {path} of disk {config.name}: {error.strerror}") from None
        try:
            fcntl.flock(image.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size_bytes = image.size()
            if size_bytes < config.size_bytes:
                raise IntegrityError(
                    f"the image {path} of disk {config.name} has {size_bytes} bytes instead of {config.size_bytes}"
                )
        except BlockingIOError:
            image.close()
            raise RefusedError(f"the image {path} of disk {config.name} is in use by another machine") from None
        except AsrfsError:
            image.close()
            raise
        return image

    # ---- control verbs ----------------------------------------------------------------------------------------

    def positions(self, request: Fields) -> Fields:
        """Where the history stands; all of it at one instant."""
        journal = self.journal
        with journal.lock:
            return {
                "appended": journal.appended_lsn,
                "durable": journal.durable_lsn,
                "applied": self._applied_lsn,
                "epoch": journal.epoch,
                "segment": journal.segment,
                "offset": journal.offset,
                "time_ns": journal.last_time_ns,
                "failed": journal.failed,
            }

    def sync(self, request: Fields) -> Fields:
        """Positions after everything appended before the call became durable."""
        self.journal.sync()
        return self.positions(request)

    def marker(self, request: Fields) -> Fields:
        """Append a MARKER and make it durable."""
        payload = bytes(request["payload"])
        decode_marker(payload)
        journal = self.journal
        with journal.lock:
            journal.append_locked(Kind.MARKER, NO_SLOT, 0, 0, payload)
            lsn, time_ns = journal.appended_lsn, journal.last_time_ns
        journal.sync()
        return {"lsn": lsn, "time_ns": time_ns}

    def applied(self, request: Fields) -> Fields:
        """Drop the maps of segments that are wholly in the images."""
        lsn, segment = int(request["lsn"]), int(request["segment"])
        drop_applied(self.journal, [served.disk for served in list(self._served.values())], segment)
        self._applied_lsn = max(self._applied_lsn, lsn)
        return {}

    def fill(self, request: Fields) -> Fields:
        """Append the present content of an extent."""
        slot, offset, length = int(request["slot"]), int(request["offset"]), int(request["length"])
        served = self._served.get(slot)
        if served is None:
            raise NotFoundError(f"there is no disk in slot {slot}")
        if not 0 < length <= FILL_BYTES_MAX:
            raise BadInputError(f"a fill has 1 to {FILL_BYTES_MAX} bytes, not {length}")
        if slot not in self._announced:
            self.announce_late(slot)
        return {"lsn": served.disk.fill(offset, length)}

    def disks(self, request: Fields) -> Fields:
        """Take over what changed in `machine.json`."""
        self.reconcile()
        return {}

    def verbs(self) -> dict[str, Any]:
        return {
            "positions": self.positions,
            "sync": self.sync,
            "marker": self.marker,
            "applied": self.applied,
            "fill": self.fill,
            "disks": self.disks,
        }


class _UnannouncedDisk:
    """A disk whose DISK record could not be appended for lack of space: the first change appends it."""

    def __init__(self, machine: ServedMachine, slot: int, disk: JournaledDisk) -> None:
        self._machine = machine
        self._slot = slot
        self._disk = disk
        self.size_bytes = disk.size_bytes

    def write(self, offset: int, payload: Bytes) -> None:
        self._machine.announce_late(self._slot)
        self._disk.write(offset, payload)

    def read(self, offset: int, length: int) -> Sequence[Bytes]:
        return self._disk.read(offset, length)

    def zero(self, offset: int, length: int) -> None:
        self._machine.announce_late(self._slot)
        self._disk.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        self._machine.announce_late(self._slot)
        self._disk.discard(offset, length)
