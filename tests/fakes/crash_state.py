"""What a crash decides about: files and names with a visible state, a durable one, and the changes in between."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

SECTOR_BYTES = 512


class Fate(Enum):
    """What a power loss does to changes that were not synced."""

    KEPT = "kept"
    LOST = "lost"
    TORN = "torn"
    SUBSET = "subset"


@dataclass
class Change:
    """One change of a file: bytes, or only its size."""

    offset: int
    content: bytes | None
    size: int | None = None

    def apply(self, content: bytearray) -> None:
        if self.content is None:
            assert self.size is not None
            resize(content, self.size)
            return
        end = self.offset + len(self.content)
        if end > len(content):
            resize(content, end)
        content[self.offset : end] = self.content

    def sectors(self) -> Iterator[Change]:
        """The parts of it that reach a disk each by itself."""
        if self.content is None:
            yield self
            return
        at = 0
        while at < len(self.content):
            length = SECTOR_BYTES - (self.offset + at) % SECTOR_BYTES
            yield Change(self.offset + at, self.content[at : at + length])
            at += length


@dataclass
class Inode:
    visible: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    unsynced: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        self.unsynced.append(change)
        change.apply(self.visible)

    def copy(self) -> Inode:
        return Inode(bytearray(self.visible), self.durable, list(self.unsynced))

    def datasync(self) -> None:
        """What was written since the last one, failed ones too, is durable now; nothing from before a failed one is."""
        content = bytearray(self.durable)
        for change in self.unsynced:
            change.apply(content)
        self.durable = bytes(content)
        self.unsynced.clear()

    def fail_datasync(self) -> None:
        """As the kernel does: the bytes stay visible and count as clean, and no later datasync writes them."""
        self.unsynced.clear()

    def after_power_loss(self, fate: Fate, rng: random.Random) -> Inode:
        if fate is Fate.KEPT:
            content = bytearray(self.visible)
        else:
            content = bytearray(self.durable)
            for change in self.unsynced if fate is not Fate.LOST else ():
                for part in change.sectors() if fate is Fate.TORN else (change,):
                    if rng.random() < 0.5:
                        part.apply(content)
        return Inode(content, bytes(content))


@dataclass(frozen=True)
class NameChange:
    """`old` (None: made or linked) became `new` (None: unlinked), naming file `inode`."""

    old: str | None
    new: str | None
    inode: int
    is_link: bool = False

    def apply(self, names: dict[str, int], living: frozenset[str] = frozenset()) -> None:
        if self.old is not None:
            if names.get(self.old) == self.inode:
                del names[self.old]
            elif not self.is_link:
                # An earlier rename of this file was undone: this one moves it from where it stayed.
                for name in [n for n, i in names.items() if i == self.inode and n not in living][:1]:
                    del names[name]
        if self.new is not None:
            names[self.new] = self.inode

    def touches(self, directory: str) -> bool:
        return directory_of(self.new if self.new is not None else self.old or "") == directory


def directory_of(name: str) -> str:
    return name.rpartition("/")[0]


def resize(content: bytearray, size: int) -> None:
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))
