"""What may be exported: a disk as it was at a point, read-only, and the file of a disk that lives.

Calls block and may come from several threads at once. Offsets and lengths lie inside the export: `Transmission` has
seen to that. What fails raises AsrfsError or OSError.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Protocol

from asrfs.disk.interface import Bytes
from asrfs.errors import AsrfsError, BadInputError
from asrfs.model.quantities import SECTOR_BYTES
from asrfs.storage.directory import open_path
from replica_store.nbd.offer import Offer
from replica_store.nbd.transmission import Extent, Piece
from replica_store.points.point_disk import PointDisk

HOLE_BYTES_MIN = 64 << 10
"""Shorter holes are sent as zeros: a chunk of its own would cost the client more."""
_STATUS_STEP_BYTES = 256 << 20
_ZEROS = bytes(1 << 20)


class Export(Protocol):
    """One disk that clients may choose by its name."""

    @property
    def offer(self) -> Offer: ...

    def pieces(self, offset: int, length: int, *, may_have_holes: bool) -> list[Piece]:
        """The bytes there; one piece unless there may be holes."""

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What is a hole there and what is not, in order, all of it."""

    def write(self, offset: int, payload: Bytes) -> None: ...

    def zero(self, offset: int, length: int, *, keep_space: bool) -> None: ...

    def flush(self) -> None:
        """Make durable what was written before by anybody."""

    def close(self) -> None: ...


class PointExport:
    """A disk at a point: immutable."""

    def __init__(self, disk: PointDisk, name: str, description: str = "") -> None:
        self._disk = disk
        self._offer = Offer(name, disk.size_bytes, read_only=True, description=description)

    @property
    def offer(self) -> Offer:
        return self._offer

    def pieces(self, offset: int, length: int, *, may_have_holes: bool) -> list[Piece]:
        if not may_have_holes:
            return [Piece(offset, length, self._disk.read(offset, length))] if length else []
        return _read_around(self._disk.read, offset, self.extents(offset, length))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return _joined(self._cut(offset, length))

    def _cut(self, offset: int, length: int) -> Iterator[Extent]:
        at, end = offset, offset + length
        while at < end:
            until = min(end, at + _STATUS_STEP_BYTES)
            found = self._disk.state.layers.between(at - at % SECTOR_BYTES, until + -until % SECTOR_BYTES)
            for start, stop in zip(found.start.tolist(), found.end.tolist(), strict=True):
                start, stop = max(start, at), min(stop, until)
                yield Extent(start - at, is_hole=True)
                yield Extent(stop - start, is_hole=False)
                at = stop
            yield Extent(until - at, is_hole=True)
            at = until

    def write(self, offset: int, payload: Bytes) -> None:
        raise AssertionError("a point is read-only")

    def zero(self, offset: int, length: int, *, keep_space: bool) -> None:
        raise AssertionError("a point is read-only")

    def flush(self) -> None:
        """There is never anything to make durable."""

    def close(self) -> None:
        """Nothing is held."""


class FileExport:
    """A file or block device, such as the disk of a recovered machine in its mount.

    Once a flush has failed, what is durable is not known any more, and every later one fails too: the kernel would
    report success for bytes that it dropped.
    """

    def __init__(self, path: str, name: str, *, read_only: bool) -> None:
        self._file = open_path(path, write=not read_only)
        self._flush_failed = False
        size_bytes = self._file.size()
        if not size_bytes:
            self._file.close()
            raise BadInputError(f"{path} is empty: there is nothing to export")
        self._offer = Offer(name, size_bytes, read_only=read_only, description=path)

    @property
    def offer(self) -> Offer:
        return self._offer

    def pieces(self, offset: int, length: int, *, may_have_holes: bool) -> list[Piece]:
        if not may_have_holes:
            return [Piece(offset, length, self._read(offset, length))] if length else []
        return _read_around(self._read, offset, self.extents(offset, length))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return _joined(self._cut(offset, length))

    def _cut(self, offset: int, length: int) -> Iterator[Extent]:
        at, end = offset, offset + length
        for start, size in self._file.data_extents(offset):
            if start >= end:
                break
            start, stop = max(start, at), min(start + size, end)
            yield Extent(start - at, is_hole=True)
            yield Extent(stop - start, is_hole=False)
            at = stop
            if at >= end:
                break
        yield Extent(end - at, is_hole=True)

    def _read(self, offset: int, length: int) -> bytes:
        content = self._file.read_at(length, offset)
        if len(content) < length:
            raise AsrfsError(f"{self._offer.description} has become shorter than it was")
        return content

    def write(self, offset: int, payload: Bytes) -> None:
        self._file.write_at([payload], offset)

    def zero(self, offset: int, length: int, *, keep_space: bool) -> None:
        if not keep_space:
            if length:
                self._file.punch(offset, length)
            return
        for at in range(offset, offset + length, len(_ZEROS)):
            self._file.write_at([memoryview(_ZEROS)[: offset + length - at]], at)

    def flush(self) -> None:
        if self._flush_failed:
            raise AsrfsError(f"{self._offer.description}: an earlier flush failed, so what is durable is not known")
        try:
            self._file.datasync()
        except OSError:
            self._flush_failed = True
            raise

    def close(self) -> None:
        self._file.close()


def image_files(directory: str) -> dict[str, str]:
    """By name of the disk, the files of a machine's mount. Raises OSError."""
    suffix = ".img"
    return {
        name.removesuffix(suffix): os.path.join(directory, name)
        for name in sorted(os.listdir(directory))
        if name.endswith(suffix) and len(name) > len(suffix)
    }


class _Read(Protocol):
    def __call__(self, offset: int, length: int, /) -> bytes: ...


def _read_around(read: _Read, offset: int, extents: Iterable[Extent]) -> list[Piece]:
    """Pieces with holes of at least `HOLE_BYTES_MIN`; what lies between them is read at once."""
    pieces: list[Piece] = []
    at = begin = offset
    for extent in extents:
        if extent.is_hole and extent.length >= HOLE_BYTES_MIN:
            if begin < at:
                pieces.append(Piece(begin, at - begin, read(begin, at - begin)))
            pieces.append(Piece(at, extent.length, None))
            begin = at + extent.length
        at += extent.length
    if begin < at:
        pieces.append(Piece(begin, at - begin, read(begin, at - begin)))
    return pieces


def _joined(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Neighbours of one kind as one, without empty ones."""
    length, is_hole = 0, False
    for extent in extents:
        if not extent.length:
            continue
        if length and extent.is_hole != is_hole:
            yield Extent(length, is_hole)
            length = 0
        is_hole = extent.is_hole
        length += extent.length
    if length:
        yield Extent(length, is_hole)
