"""Images: the plain raw bytes of a disk as of its applied LSN. Own ones are sparse files; others are adopted in place.

Only opens and makes them; what may be written, and when (I1), is the applier's business.
"""

from __future__ import annotations

import os
import stat

from asrfs.errors import BadInputError, NotFoundError, RefusedError
from asrfs.model.machine import DiskConfig
from asrfs.model.quantities import check_disk_size
from asrfs.storage.directory import OpenFile, open_path
from asrfs.storage.interface import File, Storage


def image_name(disk_id: str) -> str:
    """The file of an own image in the directory of images."""
    return f"{disk_id}.img"


def create_image(images: Storage, disk: DiskConfig) -> None:
    """Make the own sparse image of a new disk, durable. Raises FileExistsError, OSError."""
    name = image_name(disk.id)
    file = images.create(name)
    try:
        file.truncate(disk.size_bytes)
        file.datasync()
    finally:
        file.close()
    images.sync_directory("")


def open_image(images: Storage, disk: DiskConfig, *, write: bool = False) -> File:
    """Open a disk's image, own or adopted. Raises NotFoundError, and RefusedError when it is shorter than the disk."""
    where = disk.adopted if disk.adopted is not None else image_name(disk.id)
    try:
        file: File = (
            open_path(disk.adopted, write=write) if disk.adopted is not None else images.open(where, write=write)
        )
    except FileNotFoundError:
        raise NotFoundError(f"the image of disk {disk.name} is gone: {where}") from None
    if file.size() < disk.size_bytes:
        size = file.size()
        file.close()
        raise RefusedError(f"the image of disk {disk.name} has {size} of {disk.size_bytes} bytes: {where}")
    return file


def adoptable_size(path: str) -> int:
    """Bytes of a raw image file or block device that is to become a disk. Raises NotFoundError, BadInputError."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise NotFoundError(f"there is no image {path}") from None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise BadInputError(f"{path} is neither a file nor a block device")
    file: OpenFile = open_path(path)
    try:
        return check_disk_size(file.size(), path)
    finally:
        file.close()
