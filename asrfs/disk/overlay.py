"""An image of which a part is still in a base: where the image has a hole, what the base has there counts.

The filesystem is the map of what is here: it is shared by all who have the image open, and says after a crash what it
said before, or that less is here. Whoever puts zeros into such an image therefore writes them (`KeptImage`), for a hole
would be the base again; and what is being copied from the base is **in doubt** until it is durable, so it is read from
the base until then, whatever the image says.

Reading the image never waits for the base: what has to be fetched is told by `AbsentError`.
"""

from __future__ import annotations

import errno
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import Protocol

from asrfs.disk.base_file import BaseFile
from asrfs.disk.interface import AbsentError, Bytes
from asrfs.storage.interface import File

ZEROS = bytes(1 << 20)
_WINDOW_BYTES = 256 << 20
_WORTH_ASKING_BYTES = 64 << 20
Extent = tuple[int, int]
"""`(offset, end)`."""


class Mapped(Protocol):
    """A file that knows its holes."""

    def data_extents(self, start: int = 0) -> Iterator[tuple[int, int]]: ...


def holes_of(image: Mapped, offset: int, end: int) -> Iterator[Extent]:
    """Where an image has no data between two bytes, in order."""
    at = offset
    for begin, length in image.data_extents(offset):
        if begin >= end:
            break
        if begin > at:
            yield at, begin
        at = max(at, begin + length)
        if at >= end:
            return
    if at < end:
        yield at, end


def joined(extents: Iterable[Extent]) -> list[Extent]:
    """The same bytes in order, each once, in as few extents as can be."""
    found: list[Extent] = []
    for offset, end in sorted(extents):
        if found and offset <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif offset < end:
            found.append((offset, end))
    return found


def cut_to(extents: Iterable[Extent], offset: int, end: int) -> list[Extent]:
    """What of them lies between two bytes."""
    return [(max(a, offset), min(b, end)) for a, b in extents if a < end and offset < b]


def _data_before(image: Mapped, start: int, end: int) -> Iterator[Extent]:
    for offset, length in image.data_extents(start):
        if offset >= end:
            return
        yield offset, offset + length


class BasedImage:
    """The image as whoever serves the disk reads it. Methods may be called from any thread."""

    def __init__(self, image: File, base: BaseFile, doubtful: Sequence[Extent] = ()) -> None:
        self._image = image
        self._base = base
        self._turn = threading.Lock()
        self._doubtful = joined(doubtful)
        self._fetched = threading.local()

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill the whole of `buffer`. Raises OSError, AbsentError."""
        self.read_pieces([(offset, memoryview(buffer))])
        return len(buffer)

    def read_pieces(self, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each buffer from its offset on; nothing between them is looked at. Raises OSError, AbsentError."""
        absent: list[tuple[int, memoryview]] = []
        with self._turn:
            for offset, buffer in pieces:
                end = offset + len(buffer)
                holes = self._absent(offset, end)
                if holes != [(offset, end)]:
                    have = self._image.read_into(buffer, offset)
                    if have != len(buffer):
                        raise OSError(errno.EIO, f"the image ends at {offset + have}")
                absent += [(begin, buffer[begin - offset : until - offset]) for begin, until in holes]
        if absent:
            self._take_fetched(absent)

    def doubt(self, extents: Sequence[Extent]) -> None:
        """From now on these are read from the base, and no others because of a doubt. When this returns nobody is
        reading them from the image any more."""
        with self._turn:
            self._doubtful = joined(extents)

    def close(self) -> None:
        """Give the base up: the image has all of it. What was read before goes on."""
        self._base.close()

    # ---- for the thread that waits ------------------------------------------------------------------------------

    def fetch_all(self, offset: int, length: int) -> None:
        """`fetch` whatever of an extent is not here. Raises OSError of the image."""
        with self._turn:
            holes = self._absent(offset, offset + length)
        self.fetch(holes)

    def fetch(self, extents: Sequence[Extent]) -> None:
        kept: list[tuple[int, int, Bytes | OSError]] = self._kept()
        for offset, end in extents:
            content = bytearray(end - offset)
            try:
                self._base.read_into(memoryview(content), offset)
            except OSError as error:
                kept.append((offset, end, error))
                return
            kept.append((offset, end, content))

    def forget(self) -> None:
        self._kept().clear()

    # ---- inside -------------------------------------------------------------------------------------------------

    def _absent(self, offset: int, end: int) -> list[Extent]:
        """Under `_turn`."""
        holes = list(holes_of(self._image, offset, end))
        if self._doubtful:
            holes = joined(holes + cut_to(self._doubtful, offset, end))
        return holes

    def _take_fetched(self, absent: Sequence[tuple[int, memoryview]]) -> None:
        """What is absent only shrinks, so what was fetched for the same bytes before covers it."""
        kept, missing = self._kept(), []
        for at, buffer in absent:
            end = at + len(buffer)
            for offset, until, content in kept:
                if offset <= at and end <= until:
                    if isinstance(content, OSError):
                        raise content
                    buffer[:] = memoryview(content)[at - offset : end - offset]
                    break
            else:
                missing.append((at, end))
        if missing:
            raise AbsentError(self, missing)

    def _kept(self) -> list[tuple[int, int, Bytes | OSError]]:
        """What was fetched for this thread: `(offset, end, content)`."""
        kept: list[tuple[int, int, Bytes | OSError]] | None = getattr(self._fetched, "kept", None)
        if kept is None:
            kept = self._fetched.kept = []
        return kept


class KeptImage:
    """Such an image as its writer has it: `File`, in which zeros never become holes over content of the base.

    `content`: what the base may have content in, `(offset, end)` in order. Where that is not known `base` is asked for
    what is worth it; all of it may have content where that cannot be.
    """

    def __init__(self, image: File, content: Sequence[Extent] | None, base: BaseFile | None = None) -> None:
        self.image = image
        self._content = content
        self._base = base

    def punch(self, offset: int, length: int) -> None:
        end, at = offset + length, offset
        for begin, until in self._content_between(offset, end):
            if begin > at:
                self.image.punch(at, begin - at)
            for place in range(begin, until, len(ZEROS)):
                self.image.write_at([ZEROS[: until - place]], place)
            at = until
        if end > at:
            self.image.punch(at, end - at)

    def _content_between(self, offset: int, end: int) -> list[Extent]:
        if self._content is None:
            if self._base is not None and end - offset >= _WORTH_ASKING_BYTES:
                with suppress(OSError):
                    return joined(self._base.content(offset, end))
            return [(offset, end)]
        first = max(0, bisect_right(self._content, offset, key=itemgetter(0)) - 1)
        last = bisect_left(self._content, end, key=itemgetter(0))
        return cut_to(self._content[first:last], offset, end)

    def write_at(self, buffers: Sequence[Bytes], offset: int) -> None:
        self.image.write_at(buffers, offset)

    def read_at(self, length: int, offset: int) -> bytes:
        return self.image.read_at(length, offset)

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        return self.image.read_into(buffer, offset)

    def datasync(self) -> None:
        self.image.datasync()

    def allocate(self, length: int) -> None:
        self.image.allocate(length)

    def truncate(self, size: int) -> None:
        self.image.truncate(size)

    def size(self) -> int:
        return self.image.size()

    def data_extents(self, start: int = 0) -> Iterator[tuple[int, int]]:
        return self.image.data_extents(start)

    def close(self) -> None:
        self.image.close()


class WholeView:
    """Image and base as one file, for who reads it from afar and may wait: `read_into` and `data_extents` of `File`."""

    def __init__(self, image: File, base: BaseFile) -> None:
        self._image = image
        self._base = base

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        view = memoryview(buffer)
        have = self._image.read_into(view, offset)
        for begin, end in list(holes_of(self._image, offset, offset + have)):
            self._base.read_into(view[begin - offset : end - offset], begin)
        return have

    def data_extents(self, start: int = 0) -> Iterator[tuple[int, int]]:
        size_bytes = self._image.size()
        while start < size_bytes:  # so that who wants few is not told all
            end = min(start + _WINDOW_BYTES, size_bytes)
            ours = cut_to(_data_before(self._image, start, end), start, end)
            for begin, until in joined(ours + self._base.content(start, end)):
                yield begin, until - begin
            start = end

    def close(self) -> None:
        self._base.close()
        self._image.close()
