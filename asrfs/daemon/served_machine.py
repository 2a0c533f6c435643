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
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from asrfs.daemon.base_readers import BaseReaders
from asrfs.daemon.based_disks import BasedDisks
from asrfs.daemon.control import Fields
from asrfs.daemon.hardening import ARMED_URGENCY, HOLDING_URGENCY, hurry, take_time
from asrfs.daemon.rewriting import is_partial, rewrite
from asrfs.daemon.shown_disks import HiddenDisk, UnannouncedDisk
from asrfs.daemon.state import StateDirectory
from asrfs.disk.interface import waiting
from asrfs.disk.overlay import BasedImage
from asrfs.errors import AsrfsError, BadInputError, IntegrityError, NotFoundError, RefusedError
from asrfs.format.record import PAYLOAD_BYTES_MAX, Kind
from asrfs.fuse.volume import ServedDisk, Volume
from asrfs.journal.block_map import BlockMap
from asrfs.journal.disk import JournaledDisk, WriteTogether, rebuild_maps
from asrfs.journal.epochs import EpochJournal
from asrfs.journal.hold import WriteHold
from asrfs.journal.map_keeper import MapKeeper
from asrfs.journal.recovery import Recovered, recover
from asrfs.model.clock import Clock
from asrfs.model.extents import CHUNK_BYTES
from asrfs.model.machine import NO_SLOT, DiskConfig, DiskRecord, MachineConfig, encode_disk, grown
from asrfs.model.marker import decode_marker
from asrfs.model.names import id_bytes, is_id
from asrfs.model.positions import Positions
from asrfs.storage.directory import DirectoryStorage, OpenFile, open_path

FILL_BYTES_MAX = 16 * PAYLOAD_BYTES_MAX
"""The most that one `fill` may ask for: a verb is answered soon."""
FILL_STEP_BYTES = CHUNK_BYTES
"""A fill holds the journal for so much at a time: a write that comes meanwhile waits for no more."""
FILL_REST_S, FILL_REST_BESIDE_WRITES_S = 50e-6, 500e-6
"""Between two steps. Who waits for a lock gets it only when who had it stays away for a moment (a write once waited for
a second); with writers about, filling takes a small part of the time."""
QUIET_S_MAX = 0.1
LSN_END = 1 << 63

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
        self._clock = clock
        machine = state.load_machine()
        self._served: dict[int, _Served] = {}
        self._announced: dict[int, DiskRecord] = {}
        self._boot = b""
        """What `machine.json` says of how the machine is started; under `_changing`."""
        self._is_partial = False
        self._changing = threading.Lock()
        self._based = BasedDisks(state)
        self._readers = BaseReaders()
        serving = threading.main_thread().ident
        assert serving is not None
        self._serving = time.pthread_getcpuclockid(serving)
        self._filled_lsn = 0
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
        self._maps = {disk.slot: BlockMap() for disk in machine.live_disks()}
        try:
            recovered = self._recover(storage, positions, machine, by_indexes=True)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            log.warning("too few files may be open for a map of each segment: all segments are read instead")
            for block_map in self._maps.values():
                block_map.close()
            recovered = self._recover(storage, positions, machine, by_indexes=False)
        if recovered.cut is not None:
            log.warning("a torn tail was cut: %s", recovered.cut)
        self._applied_lsn = positions.applied.lsn
        self.journal = EpochJournal(storage, id_bytes(machine.id), recovered, clock)
        self._keeper = MapKeeper(self.journal, storage, self._maps, recovered)
        self.hold = WriteHold(self.journal, clock)
        self.hold.fence(self._state.is_fenced())
        self.volume = Volume(
            self.journal.request_sync, WriteTogether(self.journal), self.hold.keep, self._readers.submit
        )

    def _recover(
        self, storage: DirectoryStorage, positions: Positions, machine: MachineConfig, *, by_indexes: bool
    ) -> Recovered:
        """The history that was found, all of it in the maps. Raises IntegrityError, OSError."""
        try:
            recovered = recover(storage, positions, id_bytes(machine.id), by_indexes=by_indexes)
        except IntegrityError as error:
            raise IntegrityError(f"{storage.root}: {error}") from None
        rebuild_maps(recovered, self._maps, storage)
        return recovered

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
        record = DiskRecord.of(config, self._boot)
        if self._announced.get(config.slot) != record:
            self.journal.append(Kind.DISK, config.slot, 0, 0, encode_disk(record))
            self._announced[config.slot] = record

    def flush(self) -> None:
        """Make everything durable and close the journal. Raises OSError if it cannot be."""
        self.hold.end()
        self._readers.close()
        self.journal.sync()
        self.journal.close()
        self._keeper.close()

    def close(self) -> None:
        """Close the images, which lets others have them. Only where the process goes on."""
        for image in [*self._images.values(), *(served.image for served in self._served.values())]:
            image.close()

    # ---- disks ------------------------------------------------------------------------------------------------

    def _take_over(self, machine: MachineConfig) -> None:
        """Under `_changing`."""
        self._boot = machine.boot_document()
        self._is_partial = is_partial(self._state)
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
                    self._show(config)
                continue
            if not config.removed:
                self._grow(config)
                self._show(config)

    def _show(self, config: DiskConfig) -> None:
        """Let guests have the disk, unless it is partly written; under `_changing`."""
        disk = self._served[config.slot].disk
        shown: ServedDisk = disk
        if self._is_partial:
            shown = HiddenDisk(disk.size_bytes)
        elif config.slot not in self._announced:
            shown = UnannouncedDisk(partial(self.announce_late, config.slot), disk)
        self.volume.add(config.name, config.slot, shown)

    def _grow(self, config: DiskConfig) -> None:
        """Let the disk have its present size; under `_changing`, when its DISK record says so. Raises OSError."""
        disk = self._served[config.slot].disk
        if disk.size_bytes == config.size_bytes:
            return
        disk.make_room(config.size_bytes)
        if config.growing_from is not None:
            self.journal.sync()
            self._state.edit_machine(lambda machine: grown(machine, config))
        disk.size_bytes = config.size_bytes

    def _serve(self, config: DiskConfig) -> None:
        served = self._served.get(config.slot)
        if served is not None:
            if config.base is None and served.config.base is not None:
                served.disk.image = served.image  # which has all of it by now
                self._based.is_whole(config.slot)
            served.config = config
            return
        image = self._images.pop(config.slot, None) or self._open_image(config)
        block_map = self._maps.setdefault(config.slot, BlockMap())
        size_bytes = config.growing_from or config.size_bytes
        disk = JournaledDisk(config.slot, size_bytes, self._based.overlay(config, image), self.journal, block_map)
        self._served[config.slot] = _Served(config, disk, image)

    def _withdraw(self, config: DiskConfig) -> None:
        """The disk vanishes. Its image stays open for a request under way; once released, others may have it."""
        served = self._served.pop(config.slot, None)
        if served is not None:
            self.volume.remove(served.config.name)
            self._images[config.slot] = served.image
        if config.released and (image := self._images.pop(config.slot, None)) is not None:
            fcntl.flock(image.fd, fcntl.LOCK_UN)
            self._forget_map(config.slot)

    def _forget_map(self, slot: int) -> None:
        """Of a disk that is released, so all of it is in the image."""
        with self.journal.lock:
            if (block_map := self._maps.pop(slot, None)) is not None:
                block_map.close()

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
                "served_s": time.clock_gettime(self._serving),
            }

    def sync(self, request: Fields) -> Fields:
        """Positions after everything appended before the call became durable."""
        self.journal.sync()
        return self.positions(request)

    def marker(self, request: Fields) -> Fields:
        """Append a MARKER and make it durable; RefusedError once the clock of this host is past `not_after`.

        Filesystems that are frozen until then are so when the marker is appended.
        """
        payload, not_after = bytes(request["payload"]), request.get("not_after")
        decode_marker(payload)
        journal = self.journal
        with journal.lock:
            if not_after is not None and self._clock.monotonic() >= float(not_after):
                raise RefusedError("the marker came after its deadline")
            journal.append_locked(Kind.MARKER, NO_SLOT, 0, 0, payload)
            lsn, time_ns = journal.appended_lsn, journal.last_time_ns
        journal.sync()
        return {"lsn": lsn, "time_ns": time_ns}

    def arm(self, request: Fields) -> Fields:
        """Be ready for `hold` of this id, which is to append the MARKER `payload`, not after an instant as `marker`
        does, and to hold for so many seconds at the most."""
        payload, seconds, not_after = bytes(request["payload"]), request["seconds"], request.get("not_after")
        if not isinstance(seconds, int | float) or not isinstance(not_after, int | float | None):
            raise BadInputError("a hold lasts for a number of seconds")
        decode_marker(payload)
        self.hold.arm(_hold_id(request), payload, seconds, not_after)
        if not_after is None:
            hurry(ARMED_URGENCY)
        return {}

    def begin_hold(self, request: Fields) -> Fields:
        """Append the MARKER that was armed and hold every change behind it until `release`.

        Making it durable is for `sync`, after the release: what is held takes others' time.
        """
        held = self.hold.begin_armed(_hold_id(request))
        hurry(HOLDING_URGENCY)
        return {"lsn": held.lsn, "time_ns": held.time_ns, "epoch": held.epoch}

    def release(self, request: Fields) -> Fields:
        """Let changes go on; then be quiet for `quiet_s`, while others of this host do the same."""
        released = self.hold.release(_hold_id(request))
        quiet_s = request.get("quiet_s", 0.0)
        if isinstance(quiet_s, int | float) and quiet_s > 0:
            time.sleep(min(quiet_s, QUIET_S_MAX))
        take_time()
        return {"holding": released.holding, "hold_ms": released.seconds * 1000}

    def applied(self, request: Fields) -> Fields:
        """Drop the maps of segments that are wholly in the images."""
        lsn, segment = int(request["lsn"]), int(request["segment"])
        self._based.applied(lsn)
        self.journal.drop_through(segment, list(self._maps.values()))  # also of disks that are removed
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
        based = self._based.based(slot)
        for at in range(offset, offset + length, FILL_STEP_BYTES):
            is_alone = self.journal.appended_lsn == self._filled_lsn
            time.sleep(FILL_REST_S if is_alone else FILL_REST_BESIDE_WRITES_S)
            size = min(FILL_STEP_BYTES, offset + length - at)
            if based is None:
                self._filled_lsn = served.disk.fill(at, size)
            else:
                self._filled_lsn = waiting(partial(_fill_based, served.disk, based, at, size))
        return {"lsn": self._filled_lsn}

    def disks(self, request: Fields) -> Fields:
        """Take over what changed in `machine.json`."""
        self.reconcile()
        return {}

    def new_epoch(self, request: Fields) -> Fields:
        """Go on in a new epoch, behind an LSN to which another side of the machine came; positions when that, and what
        the disks are, is durable. Asked again it does nothing more."""
        epoch, after_lsn = request["epoch"], request["after_lsn"]
        if not isinstance(epoch, int) or not isinstance(after_lsn, int) or not 0 <= after_lsn < LSN_END:
            raise BadInputError("a new epoch has a number, and begins behind an LSN")
        with self._changing:
            if self.journal.epoch < epoch:
                self.journal.begin_epoch(epoch, after_lsn)
                self._announced.clear()
            self._take_over(self._state.load_machine())
        return self.sync(request)

    def fence(self, request: Fields) -> Fields:
        """Take over whether guests may write, and whether they may read."""
        with self._changing:
            self.hold.fence(self._state.is_fenced())
            self._is_partial = is_partial(self._state)
            for served in self._served.values():
                self._show(served.config)
        return {}

    def rewrite(self, request: Fields) -> Fields:
        """Bring a part of a disk back to what it was; positions behind it."""
        served = self._served.get(int(request["slot"]))
        if served is None:
            raise NotFoundError(f"there is no disk in slot {request['slot']}")
        if served.config.slot not in self._announced:
            self.announce_late(served.config.slot)
        rewrite(served.disk, self.hold, request)
        return self.positions(request)

    def verbs(self) -> dict[str, Any]:
        return {
            "positions": self.positions,
            "sync": self.sync,
            "marker": self.marker,
            "arm": self.arm,
            "hold": self.begin_hold,
            "release": self.release,
            "applied": self.applied,
            "fill": self.fill,
            "disks": self.disks,
            "hydrating": self._based.hydrating,
            "new_epoch": self.new_epoch,
            "fence": self.fence,
            "rewrite": self.rewrite,
        }


def _fill_based(disk: JournaledDisk, based: BasedImage, offset: int, length: int) -> int:
    """Nothing is appended before all of it is here. What is journaled is fetched in vain."""
    disk.read(offset, length)
    return disk.fill(offset, length)


def _hold_id(request: Fields) -> str:
    hold_id = request["id"]
    if not isinstance(hold_id, str) or not is_id(hold_id):
        raise BadInputError("a hold is named by the id of the point")
    return hold_id
