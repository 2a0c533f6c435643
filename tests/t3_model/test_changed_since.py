"""What a disk is brought back by, from random histories: with it over the newest state, every byte is what it was."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asrfs.model.extents import BLOCK_BYTES
from asrfs.protocol.messages import Fetch, Fetched, check_fetched
from replica_store.points import changed_since as room
from replica_store.points.changed_since import Fetcher
from tests.fakes.history_steps import FRAME_BYTES, READ_BACK, SIZES, STEPS, HistoryWriter, try_at
from tests.fakes.memory_history import MemoryHistory


def played(steps: list[str], seed: int, frame_bytes: int) -> MemoryHistory:
    writer = HistoryWriter(frame_bytes, seed)
    writer.add(SIZES[seed % len(SIZES)])
    for what in steps:
        writer.step(what)
    writer.history.heal()
    writer.history.seal()
    return writer.history


def fetch(history: MemoryHistory, fetcher: Fetcher, slot: int, lsn: int, size: int, offset: int) -> Fetched:
    asked = Fetch(number=7, slot=slot, disk_id=f"{slot:032x}", size_bytes=size, lsn=lsn, offset=offset)
    answer = fetcher.answer(history.id, asked)
    assert not answer.exit_code, answer.text
    check_fetched(answer, asked)
    return answer


def brought_back(history: MemoryHistory, slot: int, lsn: int, rng: random.Random) -> tuple[bytes, int]:
    """The disk when all of it was fetched, now and then by a store that was started again; how much that was."""
    disk = bytearray(history.state_at(history.lsn)[slot])
    fetcher, offset, total, said = Fetcher(history), 0, 0, 0
    while offset < len(disk):
        answer = fetch(history, fetcher, slot, lsn, len(disk), offset)
        at = 0
        for begin, length in answer.extents:
            disk[begin : begin + length] = answer.content[at : at + length]
            at += length
        for begin, length in answer.zeros:
            disk[begin : begin + length] = bytes(length)
        total += at + sum(length for _, length in answer.zeros)
        offset, said = answer.next, answer.total
        if rng.random() < 0.2:
            fetcher = Fetcher(history)
    assert total == said, "each byte once, and all that was promised"
    return bytes(disk), total


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(st.sampled_from(STEPS), max_size=60),
    seed=st.integers(0, 1 << 30),
    frame_bytes=st.sampled_from(FRAME_BYTES),
)
def test_i9_over_the_newest_state_it_makes_every_earlier_one(steps: list[str], seed: int, frame_bytes: int) -> None:
    rng = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "FETCHED_BYTES_MAX", rng.choice((BLOCK_BYTES, 5 * BLOCK_BYTES, 512 << 10)))
        patch.setattr(room, "FETCHED_EXTENTS_MAX", rng.choice((1, 2, 4096)))
        patch.setattr(room, "_WINDOW_BYTES", rng.choice((BLOCK_BYTES, 64 << 20)))
        history = played(steps, seed, frame_bytes)
        live = {disk.slot for disk in history.disks_at(history.id, history.lsn) if not disk.removed}
        for lsn in range(1, history.lsn + 1):
            then = {disk.slot for disk in history.disks_at(history.id, lsn) if not disk.removed}
            if not live & then or try_at(history, lsn) != READ_BACK:
                continue
            for slot in sorted(live & then):
                now = history.state_at(history.lsn)[slot]
                was = history.state_at(lsn)[slot][: len(now)]
                disk, _ = brought_back(history, slot, lsn, rng)
                assert disk == was + bytes(len(now) - len(was)), f"slot {slot} at LSN {lsn}"


def test_only_what_was_written_since_travels() -> None:
    history = MemoryHistory()
    history.disk(0, "a", 40 * BLOCK_BYTES)
    history.write(0, 0, b"x" * 20 * BLOCK_BYTES)
    point = history.marker()
    history.write(0, 3 * BLOCK_BYTES, b"y" * BLOCK_BYTES)
    history.write(0, 30 * BLOCK_BYTES, b"y" * BLOCK_BYTES)
    history.zero(0, 4 * BLOCK_BYTES, 2 * BLOCK_BYTES)
    history.seal()
    answer = fetch(history, Fetcher(history), 0, point.lsn, 40 * BLOCK_BYTES, 0)
    assert answer.extents == ((3 * BLOCK_BYTES, 3 * BLOCK_BYTES),) and set(answer.content) == {ord("x")}
    assert answer.zeros == ((30 * BLOCK_BYTES, BLOCK_BYTES),) and answer.next == 40 * BLOCK_BYTES
    nothing = fetch(history, Fetcher(history), 0, history.lsn, 40 * BLOCK_BYTES, 0)
    assert (nothing.extents, nothing.zeros, nothing.total, nothing.next) == ((), (), 0, 40 * BLOCK_BYTES)


def test_what_cannot_be_answered_is_said() -> None:
    history = MemoryHistory()
    history.disk(0, "a", 4 * BLOCK_BYTES)
    history.write(0, 0, random.Random(1).randbytes(BLOCK_BYTES))
    point = history.marker()
    history.seal()
    history.write(0, 0, b"y" * BLOCK_BYTES)
    history.seal()

    def code(**fields: int | str) -> tuple[int, str]:
        asked = {"slot": 0, "disk_id": f"{0:032x}", "size_bytes": 4 * BLOCK_BYTES, "lsn": point.lsn, "offset": 0}
        answer = Fetcher(history).answer(history.id, Fetch(number=3, **(asked | fields)))  # type: ignore[arg-type]
        assert answer.number == 3 and not answer.content
        return answer.exit_code, answer.text

    assert code(slot=1)[0] == 3 and code(disk_id="f" * 32)[0] == 3
    assert code(offset=4 * BLOCK_BYTES)[0] == 2 and code(offset=7)[0] == 2
    history.damage(history.objects_of(history.id, point.lsn)[0], -BLOCK_BYTES // 2)
    assert code()[0] == 5
