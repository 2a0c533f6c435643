"""What a crash decides about: files and names with a visible state, a durable one, and the changes in between."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

SECTOR_BYTES = 512
HOLE_BYTES = 4096


class Fate(Enum):
    """What a power loss does to changes that were not synced."""

    KEPT = "kept"
    LOST = "lost"
    TORN = "torn"
    SUBSET = "subset"
    REORDERED = "reordered"


@dataclass
class Change:
    """One change of a file: bytes, bytes that are `punched` out of it, or only its size."""

    offset: int
    content: bytes | None
    size: int | None = None
    punched: bool = False

    def apply(self, content: bytearray, data: set[int]) -> None:
        """`data`: numbers of the blocks that are no holes."""
        if self.content is None:
            assert self.size is not None
            resize(content, self.size)
            data.difference_update([block for block in data if block * HOLE_BYTES >= self.size])
            return
        end = self.offset + len(self.content)
        if end > len(content):
            resize(content, end)
        content[self.offset : end] = self.content
        if self.punched:
            last = -(-end // HOLE_BYTES) if end == len(content) else end // HOLE_BYTES
            data.difference_update(range(-(-self.offset // HOLE_BYTES), last))
        else:
            data.update(range(self.offset // HOLE_BYTES, -(-end // HOLE_BYTES)))

    def sectors(self) -> Iterator[Change]:
        """The parts of it that reach a disk each by itself: of holes whole blocks."""
        if self.content is None:
            yield self
            return
        unit = HOLE_BYTES if self.punched else SECTOR_BYTES
        at = 0
        while at < len(self.content):
            length = unit - (self.offset + at) % unit
            yield Change(self.offset + at, self.content[at : at + length], punched=self.punched)
            at += length


@dataclass
class Inode:
    """A file. What is `bytes` may be shared with copies of it and is copied before it changes. `visible_data`,
    `durable_data`: blocks that are no holes."""

    visible: bytes | bytearray = b""
    durable: bytes = b""
    unsynced: list[Change] = field(default_factory=list)
    has_lost_writes: bool = False
    """A datasync has failed: what is visible is not all that the next one makes durable."""
    visible_data: set[int] = field(default_factory=set)
    durable_data: set[int] = field(default_factory=set)

    def change(self, change: Change) -> None:
        self.unsynced.append(change)
        if isinstance(self.visible, bytes):
            self.visible = bytearray(self.visible)
        change.apply(self.visible, self.visible_data)

    def freeze(self) -> bytes:
        """What is visible, to be shared."""
        if isinstance(self.visible, bytearray):
            self.visible = bytes(self.visible)
        return self.visible

    def copy(self) -> Inode:
        known = (set(self.visible_data), set(self.durable_data))
        return Inode(self.freeze(), self.durable, list(self.unsynced), self.has_lost_writes, *known)

    def datasync(self, last: Change | None) -> None:
        """Of what was written since the last one, failed ones too, all up to change `last` is durable now, and nothing
        behind it; nothing from before a failed one is."""
        covered = next((i + 1 for i, change in enumerate(self.unsynced) if change is last), 0)
        if not covered:
            return
        if not self.has_lost_writes and covered == len(self.unsynced):
            self.durable, self.durable_data = self.freeze(), set(self.visible_data)
        else:
            content = bytearray(self.durable)
            for change in self.unsynced[:covered]:
                change.apply(content, self.durable_data)
            self.durable = bytes(content)
        del self.unsynced[:covered]

    def fail_datasync(self) -> None:
        """As the kernel does: the bytes stay visible and count as clean, and no later datasync writes them."""
        self.unsynced.clear()
        self.has_lost_writes = True

    def after_power_loss(self, fate: Fate, rng: random.Random) -> Inode:
        if fate is Fate.KEPT:
            content, data = self.freeze(), self.visible_data
        elif fate is Fate.LOST or not self.unsynced:
            content, data = self.durable, self.durable_data
        else:
            content, data = self._some_of_it(fate, rng)
        return Inode(content, content, visible_data=set(data), durable_data=set(data))

    def _some_of_it(self, fate: Fate, rng: random.Random) -> tuple[bytes, set[int]]:
        content, data = bytearray(self.durable), set(self.durable_data)
        for change in reordered(self.unsynced, rng) if fate is Fate.REORDERED else self.unsynced:
            for part in change.sectors() if fate is Fate.TORN else (change,):
                if rng.random() < 0.5:
                    part.apply(content, data)
        return bytes(content), data


def reordered(changes: list[Change], rng: random.Random) -> list[Change]:
    """The same changes as the disk may get them: in any order between two changes of the size."""
    found: list[Change] = []
    run: list[Change] = []
    for change in changes:
        if change.content is None:
            rng.shuffle(run)
            found += [*run, change]
            run = []
        else:
            run.append(change)
    rng.shuffle(run)
    return found + run


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
