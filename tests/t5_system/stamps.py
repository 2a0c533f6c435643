"""Stamped writes: each block carries the number of its write, so an image says which prefix of the history it is.

One writer writes operations 1, 2, 3, … one after the other over several disks. Operation k is known from (seed, k)
alone, so whatever the image holds can be checked without having recorded anything: the greatest stamp found on any
disk is k, and then every block of every disk must be what operations 1..k leave (I9).
"""

from __future__ import annotations

import mmap
import os
import random
import struct
from collections.abc import Sequence
from pathlib import Path

BLOCK = 4096
_STAMP = struct.Struct("<QQQ")


class Stamper:
    """The sequence of operations of one seed over `disks` disks of `blocks` blocks each."""

    def __init__(self, seed: int, disks: int, blocks: int) -> None:
        self.disks = disks
        self.blocks = blocks
        self._seed = seed
        self._places: list[tuple[int, int, int]] = [(0, 0, 0)]
        self._random = random.Random(seed)
        self._modelled = 0
        self._model: list[dict[int, int]] = []

    def place(self, k: int) -> tuple[int, int, int]:
        """`(disk, first block, blocks)` of operation k, k from 1."""
        while len(self._places) <= k:
            count = self._random.choice((1, 1, 1, 2, 5, 16))
            block = self._random.randrange(self.blocks - count + 1)
            self._places.append((self._random.randrange(self.disks), block, count))
        return self._places[k]

    def content(self, k: int, disk: int, block: int) -> bytes:
        """What operation k writes to a block: its stamp, over and over with the place in it."""
        return (_STAMP.pack(k, disk, block) * (BLOCK // _STAMP.size + 1))[:BLOCK]

    def model(self, k: int) -> list[dict[int, int]]:
        """For each disk: which operation of 1..k wrote each block last. Good until the next call, which goes on."""
        if k < self._modelled or not self._model:
            self._modelled, self._model = 0, [{} for _ in range(self.disks)]
        for each in range(self._modelled + 1, k + 1):
            disk, first, count = self.place(each)
            for block in range(first, first + count):
                self._model[disk][block] = each
        self._modelled = k
        return self._model

    def check(self, images: Sequence[Path], at_least: int = 0, exactly: int | None = None) -> int:
        """Check that the images together are the state after operations 1..k for one k, and return k.

        Raises AssertionError naming I9, the disk and the block; or if k is less than `at_least`.
        """
        contents = [image.read_bytes() for image in images]
        k = max(map(self._greatest_stamp, contents))
        assert k >= at_least, f"I2/I3: operation {at_least} was acknowledged, the images end at {k}"
        assert exactly is None or k == exactly, f"the images end at operation {k} instead of {exactly}"
        for disk, (content, last) in enumerate(zip(contents, self.model(k), strict=True)):
            for block in range(self.blocks):
                found = content[block * BLOCK : (block + 1) * BLOCK]
                writer = last.get(block)
                expected = bytes(BLOCK) if writer is None else self.content(writer, disk, block)
                assert found == expected, (
                    f"I9: after operation {k} block {block} of disk {disk} should be of operation {writer}, "
                    f"is of {_STAMP.unpack_from(found)}"
                )
        return k

    def greatest(self, images: Sequence[Path]) -> int:
        """The number of the newest operation any block of these is of; 0 for none."""
        return max(self._greatest_stamp(image.read_bytes()) for image in images)

    def _greatest_stamp(self, content: bytes) -> int:
        assert len(content) == self.blocks * BLOCK
        return max(int(_STAMP.unpack_from(content, at)[0]) for at in range(0, len(content), BLOCK))


class StampWriter:
    """Writes the operations with O_DIRECT, each complete before the next begins."""

    def __init__(self, stamper: Stamper, paths: Sequence[Path]) -> None:
        self.stamper = stamper
        self.done = 0
        self._fds = [os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC) for path in paths]
        self._buffer = mmap.mmap(-1, 16 * BLOCK)

    def write(self, count: int) -> int:
        """Write `count` more operations; the number of the last."""
        for k in range(self.done + 1, self.done + count + 1):
            disk, first, blocks = self.stamper.place(k)
            length = blocks * BLOCK
            self._buffer[:length] = b"".join(
                self.stamper.content(k, disk, block) for block in range(first, first + blocks)
            )
            written = os.pwrite(self._fds[disk], memoryview(self._buffer)[:length], first * BLOCK)
            assert written == length
            self.done = k
        return self.done

    def fsync(self) -> int:
        """Flush all disks; the number of the last operation, which is durable now."""
        for fd in self._fds:
            os.fsync(fd)
        return self.done

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
