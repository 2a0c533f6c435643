"""An image over a base: every byte is the image's where it has data, else the base's (I9); what is away fails alone."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrfs.daemon.base_readers import BaseReaders
from asrfs.disk import overlay
from asrfs.disk.base_file import BaseFile
from asrfs.disk.interface import AbsentError, waiting
from asrfs.disk.overlay import BasedImage, KeptImage, WholeView, cut_to, holes_of, joined
from asrfs.errors import FormatError, IntegrityError, RefusedError
from asrfs.model.hydration import HydrationTurn, decode_turn, encode_turn
from asrfs.replication.hydration_file import HydrationFile
from asrfs.replication.hydrator import runs_with_content
from asrfs.storage import holes
from asrfs.storage.content import content_asked, encode_content
from asrfs.storage.directory import OpenFile, open_path
from asrfs.storage.holes import check_holes
from tests.fakes.crash_storage import CrashFile, CrashStorage
from tests.fakes.hydrated_world import MemoryBase
from tests.waiting import wait_until

BLOCK = 4096
SIZE = 16 * BLOCK + 1536
BASE = bytes(range(1, 256)) * (SIZE // 255 + 1)
BASE = BASE[:SIZE]
PLACES = st.integers(0, SIZE)
EXTENTS = st.lists(st.tuples(PLACES, PLACES).map(lambda two: (min(two), max(two))), max_size=6)


def memory_base(content: bytes = BASE) -> tuple[MemoryBase, BaseFile]:
    memory = MemoryBase(content)

    def ask(file: OpenFile, start: int) -> Iterator[tuple[int, int]]:
        return file.data_extents(start)

    return memory, BaseFile("/base", len(content), memory.open, ask)


def empty_image() -> CrashFile:
    storage = CrashStorage()
    file = storage.create("image")
    file.truncate(SIZE)
    return file


@given(EXTENTS)
def test_joined_extents_are_the_same_bytes(extents: list[tuple[int, int]]) -> None:
    found = joined(extents)
    assert {byte for a, b in found for byte in range(a, b)} == {byte for a, b in extents for byte in range(a, b)}
    assert all(a < b for a, b in found)
    assert all(one[1] < two[0] for one, two in pairwise(found))


@given(EXTENTS, PLACES, PLACES)
def test_cut_extents_lie_between(extents: list[tuple[int, int]], one: int, other: int) -> None:
    offset, end = min(one, other), max(one, other)
    cut = {byte for a, b in cut_to(extents, offset, end) for byte in range(a, b)}
    assert cut == {byte for a, b in extents for byte in range(max(a, offset), min(b, end))}


@given(
    written=st.lists(st.tuples(st.integers(0, 16), st.integers(1, 4), st.booleans()), max_size=6),
    doubtful=EXTENTS,
    pieces=st.lists(st.tuples(PLACES, PLACES).map(lambda two: (min(two), max(two))), min_size=1, max_size=4),
)
def test_i9_overlay_against_bytes(
    written: list[tuple[int, int, bool]], doubtful: list[tuple[int, int]], pieces: list[tuple[int, int]]
) -> None:
    image, (memory, base) = empty_image(), memory_base()
    expected = bytearray(BASE)
    for block, count, zeros in written:
        offset = block * BLOCK
        content = (bytes if zeros else lambda length: b"\xff" * length)(min(count * BLOCK, SIZE - offset))
        image.write_at([content], offset)
        expected[offset : offset + len(content)] = content
    for offset, end in doubtful:
        expected[offset:end] = BASE[offset:end]
    based = BasedImage(image, base, doubtful)
    buffers = [(offset, memoryview(bytearray(end - offset))) for offset, end in pieces]
    waiting(lambda: based.read_pieces(buffers))
    for offset, buffer in buffers:
        assert buffer == expected[offset : offset + len(buffer)]
    here = {byte for block, count, _ in written for byte in range(block * BLOCK, min((block + count) * BLOCK, SIZE))}
    here -= {byte for offset, end in doubtful for byte in range(offset, end)}
    memory.away = True
    for offset, end in pieces:
        if all(byte in here for byte in range(offset, end)):
            based.read_into(bytearray(end - offset), offset)


@given(st.lists(st.tuples(st.integers(0, 16), st.integers(1, 5), st.sampled_from("wzp")), max_size=8))
def test_i9_zeros_over_a_base_stay_zeros(steps: list[tuple[int, int, str]]) -> None:
    content = bytearray(BASE)
    content[4 * BLOCK : 9 * BLOCK] = bytes(5 * BLOCK)
    for known in (False, True):
        _, base = memory_base(bytes(content))
        image, expected = empty_image(), bytearray(content)
        kept = KeptImage(image, joined(base.content()) if known else None)
        for block, count, kind in steps:
            offset = block * BLOCK
            length = min(count * BLOCK, SIZE - offset)
            if kind == "w":
                kept.write_at([b"\xff" * length], offset)
                expected[offset : offset + length] = b"\xff" * length
            else:
                kept.punch(offset, length)
                expected[offset : offset + length] = bytes(length)
        based = BasedImage(image, base)
        found = bytearray(SIZE)
        waiting(lambda based=based, found=found: based.read_into(found, 0))  # type: ignore[misc]
        assert found == expected
        whole = bytearray(SIZE)
        view = WholeView(image, base)
        assert view.read_into(whole, 0) == SIZE
        assert whole == expected
        rest = bytearray(expected)
        for offset, length in view.data_extents():
            rest[offset : offset + length] = bytes(length)
        assert not any(rest)


def test_where_base_is_zeros_holes_are_made() -> None:
    content = bytearray(BASE)
    content[4 * BLOCK : 9 * BLOCK] = bytes(5 * BLOCK)
    _, base = memory_base(bytes(content))
    image = empty_image()
    kept = KeptImage(image, joined(base.content()))
    kept.write_at([b"x" * SIZE], 0)
    kept.punch(0, SIZE)
    assert list(holes_of(image, 0, SIZE)) == [(4 * BLOCK, 9 * BLOCK)]


def test_long_discard_asks_a_base_that_is_not_known_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay, "_WORTH_ASKING_BYTES", 8 * BLOCK)
    content = bytearray(SIZE)
    content[4 * BLOCK + 512 : 4 * BLOCK + 1024] = b"x" * 512
    memory, base = memory_base(bytes(content))
    image = empty_image()
    KeptImage(image, None, base).punch(0, SIZE)
    assert list(holes_of(image, 0, SIZE)) == [(0, 4 * BLOCK), (5 * BLOCK, SIZE)]
    memory.away = True
    KeptImage(image, None, base).punch(0, SIZE)
    assert list(holes_of(image, 0, SIZE)) == []


def test_reading_the_image_never_touches_the_base() -> None:
    memory, base = memory_base()
    image = empty_image()
    image.write_at([b"x" * BLOCK], 0)
    based = BasedImage(image, base)
    assert based.read_into(bytearray(BLOCK), 0) == BLOCK
    with pytest.raises(AbsentError) as absent:
        based.read_into(bytearray(2 * BLOCK), 0)
    assert absent.value.extents == [(BLOCK, 2 * BLOCK)]
    assert memory.reads == []
    absent.value.source.fetch(absent.value.extents)
    found = bytearray(2 * BLOCK)
    based.read_into(found, 0)
    assert found == b"x" * BLOCK + BASE[BLOCK : 2 * BLOCK]
    with pytest.raises(AbsentError):
        threading_result(lambda: based.read_into(bytearray(BLOCK), BLOCK))
    absent.value.source.forget()
    with pytest.raises(AbsentError):
        based.read_into(bytearray(BLOCK), BLOCK)


def threading_result(call: object) -> object:
    """What a call does in another thread: nothing was fetched for that one."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(call())  # type: ignore[operator]
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def test_base_that_is_away_fails_what_needs_it_and_is_tried_again() -> None:
    memory, base = memory_base()
    based = BasedImage(empty_image(), base)
    found = bytearray(BLOCK)
    waiting(lambda: based.read_into(found, 0))
    memory.away = True
    for _ in range(2):
        with pytest.raises(OSError, match="/base cannot be read") as caught:
            waiting(lambda: based.read_into(found, 0))
        assert caught.value.errno == errno.EIO
    memory.away = False
    waiting(lambda: based.read_into(found, BLOCK))
    assert found == BASE[BLOCK : 2 * BLOCK]


def test_base_of_another_size_is_no_base() -> None:
    memory = MemoryBase(BASE[:-512])
    base = BaseFile("/base", SIZE, memory.open)
    with pytest.raises(OSError, match="bytes instead of"):
        base.read_into(memoryview(bytearray(512)), 0)


def test_base_file_on_a_filesystem(scratch: Path) -> None:
    path = scratch / "base"
    path.write_bytes(BASE)
    base = BaseFile(str(path), SIZE)
    found = bytearray(SIZE)
    base.read_into(memoryview(found), 0)
    assert found == BASE
    assert base.content(3, SIZE) == [(3, SIZE)]
    before = set(os.listdir("/proc/self/fd"))
    base.close()
    base.close()
    assert len(os.listdir("/proc/self/fd")) == len(before) - 1
    path.rename(scratch / "away")
    with pytest.raises(OSError, match="cannot be read"):
        base.read_into(memoryview(found), 0)


def test_content_by_attribute_is_named_exactly() -> None:
    assert content_asked(b"user.asrfs.content.4096") == 4096
    for other in (b"user.asrfs.content.", b"user.asrfs.content.-1", b"user.x", b"user.asrfs.content.1" + b"0" * 20):
        assert content_asked(other) is None
    assert encode_content([(1, 2)]) == bytes([1, *bytes(7), 2, *bytes(7)])


# ---- a turn ------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(0, 3))
def test_runs_with_content_leave_zeros_out(blocks: list[bool], tail_sectors: int) -> None:
    piece = b"".join(b"\0" * 4095 + b"x" if block else bytes(BLOCK) for block in blocks)
    piece += b"x" * (512 * tail_sectors)
    runs = runs_with_content(memoryview(piece))
    rest = bytearray(piece)
    for start, end in runs:
        assert any(piece[start : start + BLOCK])
        rest[start:end] = bytes(end - start)
    assert not any(rest)
    assert joined(runs) == runs


def test_turn_is_in_doubt_until_the_applied_position_is_behind_it() -> None:
    turn = HydrationTurn(disk_id="d" * 32, applied_lsn=7, through=4, extents=((0, 4096),))
    assert decode_turn(encode_turn(turn)) == turn
    assert turn.doubtful("d" * 32, 7) == turn.extents
    assert turn.doubtful("d" * 32, 8) == ()
    assert turn.doubtful("e" * 32, 7) == ()


@pytest.mark.parametrize("content", [b"", b"{}x", b'{"extents":[[4,4]]}', b'{"extents":[[-1,4]]}', b'{"more":1}'])
def test_turn_that_cannot_be_is_refused(content: bytes) -> None:
    with pytest.raises(FormatError):
        decode_turn(content)


def test_turn_that_was_not_ended_is_pending_at_the_next_start() -> None:
    storage = CrashStorage()
    saved = [5]
    file = HydrationFile(storage, "hydration.json", lambda: saved[0])
    assert file.pending is None
    file.begin("d" * 32, 0, [(0, BLOCK)])
    assert HydrationFile(storage, "hydration.json", lambda: 5).pending is not None
    assert HydrationFile(storage, "hydration.json", lambda: 6).pending is None
    file.over()
    file.rest("d" * 32, BLOCK)
    again = HydrationFile(storage, "hydration.json", lambda: 5)
    assert again.pending is None
    assert (again.through("d" * 32), again.through("e" * 32)) == (BLOCK, 0)
    broken = storage.open("hydration.json", write=True)
    broken.write_at([b"{{{"], 0)
    with pytest.raises(IntegrityError, match=r"hydration\.json"):
        HydrationFile(storage, "hydration.json", lambda: 5)


# ---- who waits ---------------------------------------------------------------------------------------------------


class SlowSource:
    """`fetch` takes until it is let go."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.fetching = threading.Event()
        self.here = False

    def fetch(self, extents: object) -> None:
        self.fetching.set()
        assert self.go_on.wait(20)
        self.here = True

    def forget(self) -> None: ...

    def need(self) -> None:
        if not self.here:
            raise AbsentError(self, [(0, 1)])


def test_requests_wait_in_threads_of_their_own() -> None:
    readers, source, answered = BaseReaders(2), SlowSource(), threading.Event()

    def request() -> None:
        source.need()
        answered.set()

    readers.submit(request)
    assert source.fetching.wait(20)
    quick = threading.Event()
    readers.submit(quick.set)
    assert quick.wait(20)
    assert not answered.is_set()
    source.go_on.set()
    assert answered.wait(20)
    readers.close()


def test_what_is_not_done_at_the_end_stays_unanswered() -> None:
    readers, source, done = BaseReaders(1), SlowSource(), []

    def request() -> None:
        source.need()
        done.append(1)

    readers.submit(request)
    assert source.fetching.wait(20)
    readers.submit(lambda: done.append(2))
    readers.close()
    source.go_on.set()
    wait_until(lambda: not any(each.name == "base-reader" for each in threading.enumerate()), what="the reader's end")
    assert done == []


# ---- where it may lie --------------------------------------------------------------------------------------------


def test_filesystem_that_knows_its_holes_is_taken(scratch: Path) -> None:
    check_holes(str(scratch))
    assert os.listdir(scratch) == []


@pytest.mark.parametrize("says", [[(0, 1 << 20)], [(512 << 10, 65536)], []])
def test_filesystem_that_does_not_is_refused(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, says: list[tuple[int, int]]
) -> None:
    class Coarse(OpenFile):
        def data_extents(self, start: int = 0) -> Iterator[tuple[int, int]]:
            return iter(says)

    monkeypatch.setattr(holes, "open_path", lambda path, write: Coarse(open_path(path, write=write).fd))
    with pytest.raises(RefusedError, match="ext4, xfs, btrfs or tmpfs"):
        check_holes(str(scratch))


def test_full_filesystem_is_taken_to_be_as_before(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(OpenFile):
        def write_at(self, buffers: object, offset: int) -> None:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(holes, "open_path", lambda path, write: Full(open_path(path, write=write).fd))
    check_holes(str(scratch))


def test_doubles_know_holes_from_zeros() -> None:
    """What the tests of hydration rest on: zeros that were written are data, what was punched is a hole."""
    image = empty_image()
    image.write_at([bytes(BLOCK)], BLOCK)
    assert list(image.data_extents()) == [(BLOCK, BLOCK)]
    image.punch(BLOCK, BLOCK)
    assert list(image.data_extents()) == []
