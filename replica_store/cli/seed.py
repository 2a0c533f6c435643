"""`replica-store seed`: a copy of a disk that was brought by hand, so that only differences travel."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from asrfs.errors import AsrfsError, BadInputError, NoSpaceError, NotFoundError, TemporaryError
from asrfs.model.names import check_name
from asrfs.model.quantities import SECTOR_BYTES, format_size
from asrfs.storage.directory import OpenFile, open_path
from asrfs.terminal.output import pairs, progress_bar
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.vault.seed_need import check_need

_QCOW2_MAGIC = b"QFI\xfb"


@click.command()
@click.argument("machine")
@click.argument("disk")
@click.option("--image", type=click.Path(path_type=Path), metavar="FILE", required=True, help="Raw copy of the disk.")
@pass_invocation
def seed(invocation: Invocation, machine: str, disk: str, image: Path) -> None:
    """Take FILE, a copy of DISK brought by hand, so that of the first copy only what differs from it travels.

    DISK need not be known yet if nothing of MACHINE has come. FILE is copied and not needed any more. A second seed
    takes the place of the first; it is removed when all of the disk is here.
    """
    begin = time.monotonic()
    check_name(disk, "disk")
    with invocation.open_vault() as vault:
        found = vault.machine(machine)
        with _opened(image) as file:
            size_bytes = file.size()
            check_need(found.name, disk, size_bytes, vault.catalog.disk_rows(found.id))
            keys = vault.machine_keys(found)
            try:
                with vault.seeds.lock(found.id), progress_bar(f"taking the seed of {disk}") as step:
                    content_bytes = vault.seeds.put(found.id, disk, file, keys, step)
            except OSError as error:
                raise _translated(error, image) from None
    document = {
        "machine": found.name,
        "disk": disk,
        "image": str(image.absolute()),
        "size_bytes": size_bytes,
        "content_bytes": content_bytes,
        "seconds": round(time.monotonic() - begin, 3),
    }
    shown = document | {"size_bytes": format_size(size_bytes), "content_bytes": format_size(content_bytes)}
    invocation.answer(document, lambda out: out.print(pairs(shown)))


@contextmanager
def _opened(path: Path) -> Iterator[OpenFile]:
    """The image. Raises NotFoundError, BadInputError."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise BadInputError(f"{path} is neither a file nor a block device")
        file = open_path(str(path))
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}") from None
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        size_bytes = file.size()
        if not size_bytes or size_bytes % SECTOR_BYTES:
            raise BadInputError(f"{path} has {size_bytes} bytes: a raw image is a multiple of {SECTOR_BYTES}")
        if file.read_at(len(_QCOW2_MAGIC), 0) == _QCOW2_MAGIC:
            raise BadInputError(f"{path} is a qcow2 image: make a raw one of it with `qemu-img convert -O raw`")
        yield file
    finally:
        file.close()


def _translated(error: OSError, image: Path) -> AsrfsError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError("the vault has no room for the seed: nothing is left of it, make room and start it again")
    return TemporaryError(f"{image} could not be taken, and nothing is left of it: {error.strerror or error}")
