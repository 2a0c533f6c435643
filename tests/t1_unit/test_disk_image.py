"""Own images and adopted ones."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from asrfs.disk.image import adoptable_size, create_image, image_name, open_image
from asrfs.errors import BadInputError, NotFoundError, RefusedError
from asrfs.model.machine import DiskConfig
from asrfs.storage.directory import DirectoryStorage
from tests.fakes.crash_storage import CrashStorage, Fate

OWN = DiskConfig(slot=0, id="a" * 32, name="root", size_bytes=1 << 20)


def test_an_own_image_is_sparse_private_and_durable(scratch: Path) -> None:
    images = DirectoryStorage(str(scratch / "images"))
    create_image(images, OWN)
    status = os.stat(scratch / "images" / image_name(OWN.id))
    assert (status.st_size, status.st_blocks, status.st_mode & 0o777) == (1 << 20, 0, 0o600)
    with pytest.raises(FileExistsError):
        create_image(images, OWN)
    image = open_image(images, OWN, write=True)
    image.write_at([b"x"], (1 << 20) - 1)
    image.close()


def test_an_own_image_survives_power_loss() -> None:
    storage = CrashStorage()
    create_image(storage, OWN)
    after = storage.crash(Fate.LOST, random.Random(0))
    image = open_image(after, OWN)
    assert image.size() == 1 << 20
    image.close()


def test_an_adopted_image_is_used_where_it_lies(scratch: Path) -> None:
    path = scratch / "old.raw"
    path.write_bytes(b"o" * 8192)
    images = DirectoryStorage(str(scratch / "images"))
    adopted = DiskConfig(slot=1, id="b" * 32, name="old", size_bytes=adoptable_size(str(path)), adopted=str(path))
    image = open_image(images, adopted)
    assert image.read_at(8192, 0) == b"o" * 8192
    image.close()
    assert images.names("") == []


def test_an_image_that_is_gone_or_too_short(scratch: Path) -> None:
    images = DirectoryStorage(str(scratch / "images"))
    with pytest.raises(NotFoundError, match="root is gone"):
        open_image(images, OWN)
    path = scratch / "short.raw"
    path.write_bytes(bytes(512))
    with pytest.raises(RefusedError, match="512 of 1024 bytes"):
        open_image(images, DiskConfig(slot=1, id="b" * 32, name="d", size_bytes=1024, adopted=str(path)))


def test_what_cannot_be_adopted(scratch: Path) -> None:
    with pytest.raises(NotFoundError):
        adoptable_size(str(scratch / "no"))
    with pytest.raises(BadInputError, match="neither a file nor a block device"):
        adoptable_size(str(scratch))
    for size in (0, 513):
        path = scratch / f"{size}.raw"
        path.write_bytes(bytes(size))
        with pytest.raises(BadInputError):
            adoptable_size(str(path))
