"""Leaving out of log objects what the store was brought by hand: the conversation of a session about seeds.

    built ─▶ FILL records, and may the store have a seed? ─▶ MATCH ─▶ MATCHED ─▶ frames that are left out ─▶ send

Objects keep their order: each waits for its own answer, while others are built and asked about. A store without
a seed of a disk is asked again after a while, because one may be brought at any time. One that could not complete an
object, for whatever reason, is sent everything from then on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import trio

from asrfs.format.omission import frames_within, without_frames
from asrfs.model.digest_tree import bitmap_of, numbers_of
from asrfs.protocol.frames import ProtocolError
from asrfs.protocol.messages import OMITTED_BYTES_MAX, ChunksOfDisk, Match, Matched, ObjectBegin
from asrfs.replication.object_builder import BuiltObject, Filled

ASK_AGAIN_S = 5.0


@dataclass(slots=True)
class Seeds:
    """What this process knows of seeds at the store. `names`: of disks by slot; it blocks. Without it nobody asks."""

    names: Callable[[], Mapping[int, str]] | None = None
    is_useless: bool = False
    """An object that lacked something could not be completed."""
    bytes_left_out: int = 0
    _absent_until: dict[int, float] = field(default_factory=dict)

    def worth_asking(self, takes_matches: bool) -> Callable[[int], bool] | None:
        """Whether the store may have a seed of the disk in a slot, as of now; for a thread. None: of no disk."""
        if self.names is None or self.is_useless or not takes_matches:
            return None
        now, absent_until = trio.current_time(), dict(self._absent_until)
        return lambda slot: absent_until.get(slot, now) <= now

    def disk_names(self) -> Mapping[int, str]:
        """Blocks."""
        assert self.names is not None, "nobody asks without it"
        return self.names()

    def note(self, slot: int, *, has: bool) -> None:
        """What the store said."""
        if has:
            self._absent_until.pop(slot, None)
        else:
            self._absent_until[slot] = trio.current_time() + ASK_AGAIN_S


class Outgoing:
    """A built object on its way to the wire. `ready`: it is known what is left out of it."""

    def __init__(self, built: BuiltObject) -> None:
        self.built = built
        self.ready = trio.Event()
        self._omitted: list[int] = []
        if built.filled is None:
            self.ready.set()

    def question(self, number: int, names: Mapping[int, str]) -> Match:
        """What to ask the store."""
        disks = []
        for slot, places in self._places().items():
            filled = self._filled
            runs = _runs([filled.chunks[place].chunk for place in places])
            digests = b"".join(filled.digests[place] for place in places)
            disks.append(ChunksOfDisk(name=names.get(slot, ""), runs=runs, digests=digests))
        return Match(number=number, disks=tuple(disks))

    def answered(self, answer: Matched, seeds: Seeds) -> None:
        """The store's word on the question. Raises ProtocolError."""
        places = self._places()
        if len(answer.equal) != len(places):
            raise ProtocolError(
                f"the store answered for {len(answer.equal)} disks where {len(places)} were asked about"
            )
        equal: list[int] = []
        for (slot, asked), bitmap in zip(places.items(), answer.equal, strict=True):
            numbers = numbers_of(bitmap)
            if numbers and numbers[-1] >= len(asked):
                raise ProtocolError(f"the store matched chunk {numbers[-1]} of {len(asked)}")
            seeds.note(slot, has=bool(bitmap))
            equal += [asked[number] for number in numbers]
        chunks = self._filled.chunks
        frames = frames_within(self._filled.header, [chunks[place].position for place in sorted(equal)])
        self._omitted = [frame for frame in frames if frame < 8 * OMITTED_BYTES_MAX]
        self.ready.set()

    def wire(self) -> tuple[ObjectBegin, list[memoryview]]:
        """What is announced, and the bytes that travel."""
        built = self.built
        pieces = built.pieces
        omitted = b""
        if self._omitted:
            pieces = without_frames(built.pieces[0], self._filled.header, self._omitted)
            omitted = bitmap_of(self._omitted, self._omitted[-1] + 1)
        length = sum(map(len, pieces))
        begin = ObjectBegin(
            first_lsn=built.first_lsn,
            last_lsn=built.last_lsn,
            length=length,
            omitted=omitted,
            level=built.level if omitted else None,
        )
        return begin, pieces

    @property
    def _filled(self) -> Filled:
        assert self.built.filled is not None
        return self.built.filled

    def _places(self) -> dict[int, list[int]]:
        """By slot, in ascending order, which of the chunks are of it."""
        places: dict[int, list[int]] = {}
        for place, chunk in enumerate(self._filled.chunks):
            places.setdefault(chunk.slot, []).append(place)
        return dict(sorted(places.items()))


class Matching:
    """One session's questions. `in_thread` runs what blocks."""

    def __init__(self, seeds: Seeds, in_thread: Callable[..., Awaitable[Mapping[int, str]]]) -> None:
        self._seeds = seeds
        self._in_thread = in_thread
        self._asked: dict[int, Outgoing] = {}

    async def ask(self, outgoing: Outgoing, send: Callable[[Match], Awaitable[None]]) -> None:
        """Have the store asked about an object, if there is anything to ask."""
        if not outgoing.ready.is_set():
            number = outgoing.built.first_lsn
            question = outgoing.question(number, await self._in_thread(self._seeds.disk_names))
            self._asked[number] = outgoing
            await send(question)

    def answered(self, answer: Matched) -> None:
        """The store's word. Raises ProtocolError."""
        outgoing = self._asked.pop(answer.number, None)
        if outgoing is None:
            raise ProtocolError(f"the store matched chunks of LSN {answer.number}, which nobody asked about")
        outgoing.answered(answer, self._seeds)

    async def pass_on(
        self, channel: trio.MemoryReceiveChannel[Outgoing], send: Callable[[Outgoing], Awaitable[None]]
    ) -> None:
        """For ever: objects in order, each once it is known what need not be sent of it."""
        async for outgoing in channel:
            await outgoing.ready.wait()
            await send(outgoing)


def _runs(chunks: list[int]) -> tuple[tuple[int, int], ...]:
    """`(first, count)` of numbers that follow one another."""
    runs: list[list[int]] = []
    for chunk in chunks:
        if runs and sum(runs[-1]) == chunk:
            runs[-1][1] += 1
        else:
            runs.append([chunk, 1])
    return tuple((first, count) for first, count in runs)
