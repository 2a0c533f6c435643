"""Adding, growing and removing disks of a machine, whether it is being served or not.

    make, claim or lengthen the image  →  machine.json  →  tell the disk server, which appends the DISK record
    machine.json: removed  →  tell the disk server  →  apply what was written  →  machine.json: released

What fails before `machine.json` is replaced leaves nothing behind.
"""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress

import msgspec

from asrfs.consistency.filesystems import Kernel
from asrfs.daemon.processes import tell
from asrfs.daemon.state import MACHINE_FILE, StateDirectory, next_slot
from asrfs.errors import AsrfsError, BadInputError, NoSpaceError, NotFoundError, RefusedError, TemporaryError
from asrfs.fuse.mount import FILESYSTEM_TYPE
from asrfs.model.extents import BLOCK_BYTES
from asrfs.model.machine import DiskConfig, MachineConfig
from asrfs.model.names import check_name, check_path
from asrfs.model.quantities import SECTOR_BYTES, check_disk_size
from asrfs.storage.claim import claim, release
from asrfs.storage.directory import DirectoryStorage, open_path


def add_sized(state: StateDirectory, name: str, size_bytes: int) -> DiskConfig:
    """A new sparse disk. Raises BadInputError, RefusedError, NoSpaceError."""
    check_name(name, "disk")
    check_disk_size(size_bytes, f"disk {name}")
    with state.machine_lock():
        state.check_not_promoting()
        machine = state.load_machine()
        _check_name_is_free(machine, name)
        disk = DiskConfig(slot=next_slot(machine), id=uuid.uuid4().hex, name=name, size_bytes=size_bytes)
        try:
            state.make_image(disk)
            _enter(state, machine, disk)
        except AsrfsError:
            if not _is_entered(state, disk):
                _remove_image(state, disk)
            raise
    _tell_disk_server(state)
    return disk


def add_adopted(state: StateDirectory, name: str, image: str) -> DiskConfig:
    """Adopt a raw image or block device in place; its content is read into the history later.

    Raises BadInputError, NotFoundError, RefusedError if another machine or disk uses it.
    """
    check_name(name, "disk")
    path = check_path(os.path.realpath(image))
    size_bytes, is_block_device = _measure(image, path)
    with state.machine_lock():
        state.check_not_promoting()
        machine = state.load_machine()
        _check_name_is_free(machine, name)
        _check_is_no_disk(state, image, path)
        _check_is_no_disk(StateDirectory(os.path.dirname(os.path.dirname(path))), image, path)
        _check_is_on_no_disk(state, image, path)
        _check_not_in_use(path, is_block_device)
        owner = f"{machine.id} {state.root}"
        holder = claim(path, owner)
        if holder is not None:
            raise RefusedError(
                f"{image} is in use by the machine of {holder.partition(' ')[2]}: remove the disk there first"
            )
        disk = DiskConfig(
            slot=next_slot(machine), id=uuid.uuid4().hex, name=name, size_bytes=size_bytes, adopted=path, gap=True
        )
        try:
            _enter(state, machine, disk)
        except AsrfsError:
            if not _is_entered(state, disk):
                release(path, owner)
            raise
    _tell_disk_server(state)
    return disk


def resize(state: StateDirectory, name: str, size_bytes: int) -> DiskConfig:
    """Make a disk longer; what is new reads as zeros. Points from before keep the size they had.

    Raises BadInputError, NotFoundError, NoSpaceError; RefusedError for a smaller size: what lies behind it would be
    lost.
    """
    check_disk_size(size_bytes, f"disk {name}")
    with state.machine_lock():
        state.check_not_promoting()
        machine = state.load_machine()
        disk = machine.disk(name)
        if size_bytes < disk.size_bytes:
            raise RefusedError(
                f"disk {name} has {disk.size_bytes} bytes and is not made smaller: what lies behind byte {size_bytes} "
                "would be lost; add a smaller disk and copy"
            )
        _check_hydrated(disk)
        if size_bytes > disk.size_bytes:
            _lengthen(state.image_path(disk), disk, size_bytes)
            is_uneven = disk.size_bytes % BLOCK_BYTES != 0
            begun_at = disk.growing_from or (disk.size_bytes if is_uneven else None)
            longer = msgspec.structs.replace(disk, size_bytes=size_bytes, growing_from=begun_at)
            disks = tuple(longer if each.slot == disk.slot else each for each in machine.disks)
            state.save_machine(msgspec.structs.replace(machine, disks=disks))
    _tell_disk_server(state)
    return state.load_machine().disk(name)


def remove(state: StateDirectory, name: str, apply: Callable[[], object]) -> DiskConfig:
    """Take a disk off the machine. Its image stays as a file and holds every write; its points stay at the store.

    `apply` has everything written so far put into the images. Where it raises, the disk is gone from the machine but
    its image is not given up: the same call again goes on from there.
    """
    state.check_not_promoting()
    disk = state.load_machine().disk_to_remove(name)
    _check_hydrated(disk)
    disk = _change(state, disk, removed=True)
    _tell_disk_server(state)
    apply()
    if disk.adopted:
        release(disk.adopted, f"{state.load_machine().id} {state.root}")
    disk = _change(state, disk, released=True)
    with suppress(TemporaryError):  # one that starts now does not touch the image any more
        _tell_disk_server(state)
    return disk


def _check_hydrated(disk: DiskConfig) -> None:
    """RefusedError for a disk of which a part lies in its base alone."""
    if disk.base is not None:
        raise RefusedError(
            f"disk {disk.name} is still being hydrated from {disk.base}: try again when `asrfs status` shows no "
            "hydration of it any more"
        )


def apply_unserved(state: StateDirectory) -> None:
    """Have the images of a machine that nobody serves hold everything. Raises RefusedError where somebody does."""
    from asrfs.daemon.final_apply import apply_everything  # loads all of an agent; to list disks needs nothing of it

    lock = state.take_lock("agent")
    if lock is None:
        raise RefusedError(f"the agent of {state.root} has just started: try again")
    try:
        state.settle()
        apply_everything(state)
    finally:
        lock.close()


def _change(state: StateDirectory, disk: DiskConfig, **fields: bool) -> DiskConfig:
    def edit(machine: MachineConfig) -> MachineConfig:
        change = msgspec.structs.replace
        disks = tuple(change(each, **fields) if each.slot == disk.slot else each for each in machine.disks)
        return change(machine, disks=disks)

    machine = state.edit_machine(edit)
    return next(each for each in machine.disks if each.slot == disk.slot)


def _enter(state: StateDirectory, machine: MachineConfig, disk: DiskConfig) -> None:
    state.save_machine(msgspec.structs.replace(machine, disks=(*machine.disks, disk)))


def _is_entered(state: StateDirectory, disk: DiskConfig) -> bool:
    """Whether `machine.json` names the disk although `_enter` failed: its last step is a sync of the directory."""
    return any(each.id == disk.id for each in state.load_machine().disks)


def _check_name_is_free(machine: MachineConfig, name: str) -> None:
    if any(disk.name == name for disk in machine.live_disks()):
        raise RefusedError(f"machine {machine.name} already has a disk {name}: choose another name")
    if any(disk.name == name and not disk.released for disk in machine.disks):
        raise RefusedError(f"disk {name} is not wholly removed: finish that with `asrfs disk remove {name} --yes`")


def _measure(image: str, path: str) -> tuple[int, bool]:
    """`(size in bytes, is a block device)` of an image that could be adopted."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise NotFoundError(f"image {image} does not exist") from None
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise BadInputError(f"{image} is neither a regular file nor a block device")
    file = open_path(path, write=True)
    try:
        size_bytes = file.size()
    finally:
        file.close()
    if size_bytes % SECTOR_BYTES:
        raise BadInputError(f"{image} has {size_bytes} bytes: a raw image is a multiple of {SECTOR_BYTES}")
    return check_disk_size(size_bytes, image), stat.S_ISBLK(mode)


def _lengthen(path: str, disk: DiskConfig, size_bytes: int) -> None:
    """Have at least so many bytes in an image, durably. A block device must have them already."""
    try:
        is_block_device = stat.S_ISBLK(os.stat(path).st_mode)
        image = open_path(path, write=True)
    except OSError as error:
        raise NotFoundError(f"the image {path} of disk {disk.name}: {error.strerror}") from None
    try:
        if is_block_device and image.size() < size_bytes:
            raise RefusedError(f"{path} has {image.size()} bytes: make the device longer first, then disk {disk.name}")
        if not is_block_device and image.size() < size_bytes:
            image.truncate(size_bytes)
            image.datasync()
    except OSError as error:
        raise NoSpaceError(f"cannot make {path} {size_bytes} bytes long: {error.strerror}") from None
    finally:
        image.close()


def _check_is_no_disk(state: StateDirectory, image: str, path: str) -> None:
    """RefusedError if it is a disk of the machine whose state directory this is, if it is one.

    An image that a state directory made bears no claim: where it lies says whose it is.
    """
    if not os.path.isfile(state.path(MACHINE_FILE)):
        return
    machine = state.load_machine()
    for disk in machine.disks:
        own = state.image_path(disk)
        if not disk.released and os.path.exists(own) and os.path.samefile(own, path):
            raise RefusedError(
                f"{image} is already disk {disk.name} of machine {machine.name} ({state.root}): remove the disk there "
                "first"
            )


def _check_is_on_no_disk(state: StateDirectory, image: str, path: str) -> None:
    """RefusedError for what this machine serves itself, or what lies on that.

    Its disk server would wait for itself, and not even SIGKILL ends that. What other machines serve is no image either.
    """
    served, kernel, found = state.load_served(), Kernel(), os.stat(path)
    number = found.st_rdev if stat.S_ISBLK(found.st_mode) else found.st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    try:
        is_served = any(each.device == device and each.kind == FILESYSTEM_TYPE for each in kernel.mounts())
        if is_served or (served is not None and device in kernel.devices_on(served.mount)):
            raise RefusedError(f"{image} is, or lies on, a disk that asrfs serves: a disk needs an image elsewhere")
    except OSError as error:
        raise TemporaryError(f"cannot see what {image} lies on: {error}") from None


def _check_not_in_use(path: str, is_block_device: bool) -> None:
    """RefusedError if the kernel knows the device as mounted, held or otherwise taken."""
    if not is_block_device:
        return
    try:
        os.close(os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        raise RefusedError(f"{path} is in use ({error.strerror}): unmount it first") from None


def _remove_image(state: StateDirectory, disk: DiskConfig) -> None:
    storage = DirectoryStorage(state.path("images"))
    if storage.exists(f"{disk.id}.img"):
        storage.unlink(f"{disk.id}.img")


def _tell_disk_server(state: StateDirectory) -> None:
    """A disk server that runs takes the change over now; one that is away will when it starts."""
    tell(state, "disk_server", "disks")
