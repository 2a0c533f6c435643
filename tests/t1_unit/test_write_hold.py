"""Holding writes: what is in the cut, what waits for the release, and who lets go when nobody says so."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from asrfs.disk.interface import HeldError
from asrfs.errors import BadInputError, RefusedError
from asrfs.format.record import Kind
from asrfs.fuse import abi
from asrfs.fuse.channel import SLOTS, Channel, PlainChannel, RingChannel
from asrfs.fuse.volume import Volume
from asrfs.journal import hold as hold_room
from asrfs.journal.block_map import BlockMap
from asrfs.journal.disk import JournaledDisk, WriteTogether
from asrfs.journal.hold import HOLD_S_MAX, WriteHold
from asrfs.journal.reader import JournalReader
from asrfs.journal.recovery import recover
from asrfs.journal.writer import Journal
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.model.positions import Cursor, Positions
from asrfs.storage.system_clock import SystemClock
from tests.fakes.crash_storage import CrashStorage, Fault
from tests.fakes.fuse_kernel import FuseKernel
from tests.fakes.journal_world import MACHINE_ID, StepClock
from tests.waiting import wait_until

BLOCK = 4096
SIZE = 1 << 20
SLOT = 1
NODE = SLOT + 2
POINT, OTHER = "a" * 32, "b" * 32
FOREVER_S = 60.0


class Rig:
    """A journaled disk whose writes may be held."""

    def __init__(self) -> None:
        self.storage = CrashStorage()
        image = self.storage.create("image")
        image.write_at([bytes(SIZE)], 0)
        recovered = recover(self.storage, Positions(), MACHINE_ID, segment_bytes=8 << 20)
        self.journal = Journal(
            self.storage, MACHINE_ID, recovered, StepClock(), segment_bytes=8 << 20, prepare_ahead=False
        )
        self.disk = JournaledDisk(SLOT, SIZE, image, self.journal, BlockMap())
        self.hold = WriteHold(self.journal, SystemClock())
        self.volume = Volume(self.journal.request_sync, WriteTogether(self.journal), self.hold.keep)
        self.volume.add("root", SLOT, self.disk)

    def kinds(self) -> list[tuple[int, int]]:
        self.journal.sync()
        reader = JournalReader(self.storage, MACHINE_ID)
        batch = reader.read(Cursor(), self.journal.durable_lsn, 1 << 30)
        reader.close()
        return [(header.kind, header.offset) for header, _ in batch.records]

    def kept(self) -> int:
        return len(self.hold._kept)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.hold.end()
    rig.journal.close()


@pytest.fixture(params=[PlainChannel, RingChannel])
def kernel(request: pytest.FixtureRequest, rig: Rig) -> Iterator[FuseKernel]:
    channel: Callable[[int], Channel] = request.param
    with FuseKernel(rig.volume, channel) as kernel:
        yield kernel
        rig.hold.end()


def write_request(offset: int, payload: bytes) -> bytes:
    return struct.pack("<QQIIQII", 0, offset, len(payload), 0, 0, 0, 0) + payload


def test_what_changes_behind_the_marker_is_refused_until_the_release(rig: Rig) -> None:
    rig.disk.write(0, b"a" * BLOCK)
    held = rig.hold.begin(POINT, b"marker", FOREVER_S)
    assert held.lsn == rig.journal.appended_lsn == 2
    for change in (
        lambda: rig.disk.write(BLOCK, b"b" * BLOCK),
        lambda: rig.disk.write(3, b"b"),
        lambda: rig.disk.write(BLOCK, bytes(BLOCK)),
        lambda: rig.disk.zero(0, BLOCK),
        lambda: rig.disk.discard(0, 2 * BLOCK),
    ):
        with pytest.raises(HeldError):
            change()
    assert rig.journal.appended_lsn == 2
    assert rig.disk.read(0, BLOCK) == b"a" * BLOCK
    assert rig.disk.fill(0, BLOCK) == 3, "what is no change of a guest's goes on"
    assert rig.hold.release(POINT).holding
    wait_until(lambda: rig.journal.barred is None)
    rig.disk.write(BLOCK, b"b" * BLOCK)
    assert rig.kinds() == [(Kind.WRITE, 0), (Kind.MARKER, 0), (Kind.FILL, 0), (Kind.WRITE, BLOCK)]


def test_writes_of_a_turn_are_held_together(rig: Rig) -> None:
    rig.hold.begin(POINT, b"marker", FOREVER_S)
    together = WriteTogether(rig.journal)
    frames = [together.frame(memoryview(bytearray(64) + bytearray(b"x" * BLOCK))) for _ in range(2)]
    assert not together([(rig.disk, 0, frames[0]), (rig.disk, BLOCK, frames[1])])
    assert rig.journal.appended_lsn == 1


def test_held_writes_are_answered_after_the_release_and_in_order(rig: Rig, kernel: FuseKernel) -> None:
    """More of them than there are slots: reads and syncs go on meanwhile."""
    kernel.write(NODE, 0, b"0" * BLOCK)
    rig.hold.begin(POINT, b"marker", FOREVER_S)
    sent = [
        kernel.send(abi.WRITE, NODE, write_request(turn % 3 * BLOCK, b"%d" % (turn % 10) * BLOCK))
        for turn in range(3 * SLOTS)
    ]
    punch = struct.pack("<QQQII", 0, 5 * BLOCK, BLOCK, abi.FALLOC_PUNCH_HOLE | abi.FALLOC_KEEP_SIZE, 0)
    sent.append(kernel.send(abi.FALLOCATE, NODE, punch))
    assert kernel.read(NODE, 0, BLOCK).body == b"0" * BLOCK
    assert kernel.ask(abi.FSYNC, NODE, bytes(16)).error == 0
    assert rig.kept() == len(sent)
    assert rig.journal.durable_lsn == rig.journal.appended_lsn == 2, "the sync spoke of the cut alone"
    assert rig.hold.release(POINT).holding
    replies = [kernel.receive() for _ in sent]
    assert [reply.unique for reply in replies] == sent
    assert all(reply.error == 0 for reply in replies)
    last = kernel.write(NODE, 7 * BLOCK, b"z" * BLOCK)
    assert last.error == 0
    kinds = rig.kinds()
    assert kinds[:2] == [(Kind.WRITE, 0), (Kind.MARKER, 0)]
    assert [offset for _, offset in kinds[2:]] == [turn % 3 * BLOCK for turn in range(3 * SLOTS)] + [
        5 * BLOCK,
        7 * BLOCK,
    ]


def test_nobody_says_release_and_the_deadline_does(rig: Rig, kernel: FuseKernel) -> None:
    rig.hold.begin(POINT, b"marker", 0.05)
    assert kernel.write(NODE, 0, b"a" * BLOCK).error == 0, "answered by the deadline alone"
    released = rig.hold.release(POINT)
    assert not released.holding
    assert released.seconds >= 0.05


@pytest.mark.parametrize("begun_after_s", [0.0, 0.08])
def test_an_armed_hold_ends_at_its_deadline_too_though_nobody_is_woken_when_it_begins(
    rig: Rig, begun_after_s: float
) -> None:
    """Also behind one that might have lasted for much longer, and when it has been armed for longer than it lasts."""
    rig.hold.begin(OTHER, b"marker", FOREVER_S)
    assert rig.hold.release(OTHER).holding
    rig.hold.arm(POINT, b"marker", 0.05)
    time.sleep(begun_after_s)  # sleep: for longer than the hold lasts, or not at all
    assert rig.hold.begin_armed(POINT).lsn == rig.journal.appended_lsn == 2
    with pytest.raises(HeldError):
        rig.disk.write(0, b"a" * BLOCK)
    wait_until(lambda: rig.journal.barred is None)
    released = rig.hold.release(POINT)
    assert not released.holding
    assert 0.05 <= released.seconds < FOREVER_S / 2


def test_only_what_is_armed_begins_and_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(hold_id: str) -> None:
        with pytest.raises(RefusedError, match="not made ready"):
            rig.hold.begin_armed(hold_id)

    refused(POINT)
    rig.hold.arm(POINT, b"marker", FOREVER_S)
    refused(OTHER)
    assert rig.hold.begin_armed(POINT)
    with pytest.raises(RefusedError, match="held already"):
        rig.hold.arm(OTHER, b"marker", FOREVER_S)
    assert rig.hold.release(POINT).holding
    refused(POINT)
    rig.hold.arm(POINT, b"marker", FOREVER_S)
    assert not rig.hold.release(POINT).holding, "it was void before it was held"
    refused(POINT)
    monkeypatch.setattr(hold_room, "ARMED_S_MAX", 0.0)
    rig.hold.arm(POINT, b"marker", FOREVER_S)
    refused(POINT)
    assert rig.journal.appended_lsn == 1


def test_a_release_behind_the_deadline_does_not_count_even_when_nothing_let_go_before(rig: Rig) -> None:
    """As after a process was stopped: its thread may be later than the word that comes in."""

    class StoppedClock:
        now = 0.0

        def time_ns(self) -> int:
            return 1

        def monotonic(self) -> float:
            return self.now

    clock = StoppedClock()
    hold = WriteHold(rig.journal, clock)
    hold.begin(POINT, b"marker", FOREVER_S)
    clock.now = FOREVER_S
    assert not hold.release(POINT).holding
    hold.end()


def test_what_was_frozen_until_an_instant_is_not_marked_after_it(rig: Rig) -> None:
    now = SystemClock().monotonic()
    with pytest.raises(RefusedError, match="too late"):
        rig.hold.begin(POINT, b"marker", FOREVER_S, now)
    rig.hold.arm(POINT, b"marker", FOREVER_S, now)
    with pytest.raises(RefusedError, match="too late"):
        rig.hold.begin_armed(POINT)
    assert rig.journal.appended_lsn == 0
    rig.hold.begin(POINT, b"marker", FOREVER_S, now + FOREVER_S)
    assert rig.hold.release(POINT).holding


def test_a_hold_that_is_not_known_is_not_held(rig: Rig) -> None:
    """A disk server that died has taken it along; the next one knows of none."""
    assert not rig.hold.release(POINT).holding
    rig.hold.begin(POINT, b"marker", FOREVER_S)
    assert not rig.hold.release(OTHER).holding
    with pytest.raises(RefusedError, match="held already"):
        rig.hold.begin(OTHER, b"marker", FOREVER_S)
    assert rig.hold.release(POINT).holding
    assert not rig.hold.release(POINT).holding, "a release counts once"


def test_marker_that_cannot_be_appended_holds_nothing(rig: Rig) -> None:
    fault = rig.storage.inject(Fault(0, errno.ENOSPC, kinds=frozenset(("write",))))
    with pytest.raises(OSError, match="No space"):
        rig.hold.begin(POINT, b"marker", FOREVER_S)
    assert fault.fired == 1
    rig.disk.write(0, b"a" * BLOCK)
    for seconds in (0, -1.0, HOLD_S_MAX + 1, float("nan"), float("inf")):
        with pytest.raises(BadInputError):
            rig.hold.begin(POINT, b"marker", seconds)
        with pytest.raises(BadInputError):
            rig.hold.arm(POINT, b"marker", seconds)


def test_a_journal_that_fails_while_it_is_held_stays_failed(rig: Rig, kernel: FuseKernel) -> None:
    rig.hold.begin(POINT, b"marker", FOREVER_S)
    kept = kernel.send(abi.WRITE, NODE, write_request(0, b"a" * BLOCK))
    wait_until(lambda: rig.kept() == 1)
    with rig.journal.lock:
        rig.journal._fail("planted")
    assert kernel.write(NODE, 0, b"b" * BLOCK).error == -errno.EIO
    rig.hold.release(POINT)
    reply = kernel.receive()
    assert (reply.unique, reply.error) == (kept, -errno.EIO)
    assert kernel.write(NODE, 0, b"b" * BLOCK).error == -errno.EIO


def test_what_is_kept_has_a_bound_and_then_everything_waits(
    rig: Rig, kernel: FuseKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold_room, "KEPT_BYTES_MAX", 3 * BLOCK)
    rig.hold.begin(POINT, b"marker", FOREVER_S)
    sent = [kernel.send(abi.WRITE, NODE, write_request(turn * BLOCK, b"a" * BLOCK)) for turn in range(5)]
    read = kernel.send(abi.READ, NODE, struct.pack("<QQIIQII", 0, 4 * BLOCK, BLOCK, 0, 0, 0, 0))
    wait_until(lambda: rig.kept() == 3)
    assert rig.hold.release(POINT).holding
    replies = [kernel.receive() for _ in range(6)]
    assert {reply.unique for reply in replies} == {*sent, read}
    assert replies[-1].unique == read
    assert replies[-1].body == b"a" * BLOCK


def test_ending_lets_go_and_holds_no_more(rig: Rig, kernel: FuseKernel) -> None:
    rig.hold.begin(POINT, b"marker", FOREVER_S)
    kernel.send(abi.WRITE, NODE, write_request(0, b"a" * BLOCK))
    wait_until(lambda: rig.kept() == 1)
    rig.hold.end()
    assert kernel.receive().error == 0
    assert not rig.hold.release(POINT).holding
    with pytest.raises(RefusedError, match="ending"):
        rig.hold.begin(OTHER, b"marker", FOREVER_S)


def test_nothing_is_acknowledged_behind_a_marker_while_it_is_held(rig: Rig, kernel: FuseKernel) -> None:
    """Writers run all the time; points are cut beneath them. Whatever was answered before a hold is before the marker,
    and while one lasts nothing is answered that lies behind it."""
    answered: list[tuple[int, int]] = []
    stop = threading.Event()

    def load() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            for at in range(4):
                kernel.send(abi.WRITE, NODE, write_request(at * BLOCK, os.urandom(BLOCK)))
            for _ in range(4):
                assert kernel.receive().error == 0
                answered.append((turn, rig.journal.appended_lsn))

    writer = threading.Thread(target=load)
    writer.start()
    cuts: list[int] = []
    try:
        for point in range(40):
            goal = len(answered) + 8
            wait_until(lambda goal=goal: len(answered) > goal)
            hold_id = f"{point:032x}"
            lsn = rig.hold.begin(hold_id, b"marker", FOREVER_S).lsn
            wait_until(lambda: rig.kept() >= 1)
            with rig.journal.lock:
                assert rig.journal.appended_lsn == lsn
            assert rig.hold.release(hold_id).holding
            cuts.append(lsn)
            wait_until(lambda: rig.journal.barred is None)
    finally:
        stop.set()
        writer.join()
    kinds = rig.kinds()
    assert [lsn for lsn, (kind, _) in enumerate(kinds, 1) if kind == Kind.MARKER] == cuts


def test_i6_a_fenced_machine_takes_no_changes_and_holds_nothing() -> None:
    rig = Rig()
    rig.disk.write(0, b"a" * BLOCK)
    rig.hold.fence(True)
    for change in (
        lambda: rig.disk.write(0, b"b" * BLOCK),
        lambda: rig.disk.zero(0, BLOCK),
        lambda: rig.disk.discard(0, BLOCK),
    ):
        with pytest.raises(OSError) as refused:
            change()
        assert refused.value.errno == errno.EROFS
    together = [(rig.disk, 0, WriteTogether.frame(memoryview(bytearray(64 + BLOCK))))]
    assert not WriteTogether(rig.journal)(together)
    assert rig.disk.read(0, BLOCK) == b"a" * BLOCK
    rig.disk.fill(0, BLOCK)  # and whatever is the machine's own
    with pytest.raises(RefusedError, match="superseded"):
        rig.hold.begin(POINT, b"\x80", 1.0)
    rig.hold.fence(False)
    rig.disk.write(0, b"c" * BLOCK)
    assert rig.disk.read(0, BLOCK) == b"c" * BLOCK
    rig.hold.end()
    rig.journal.close()


def test_i6_a_fence_that_comes_in_a_hold_stays_when_the_hold_ends() -> None:
    rig = Rig()
    marker = encode_marker(MarkerRecord(id=POINT))
    rig.hold.begin(POINT, marker, FOREVER_S)
    rig.hold.fence(True)
    rig.hold.release(POINT)
    with pytest.raises(OSError) as refused:
        rig.disk.write(0, b"b" * BLOCK)
    assert refused.value.errno == errno.EROFS
    rig.hold.end()
    rig.journal.close()


def test_i6_behind_the_fence_only_one_thread_writes_and_it_must_be_there(rig: Rig) -> None:
    with pytest.raises(RefusedError), rig.hold.passing():
        pytest.fail("nothing is fenced: guests write, too")
    rig.hold.fence(True)
    with rig.hold.passing():
        rig.disk.write(0, b"x" * BLOCK)
        rig.disk.discard(BLOCK, BLOCK)
        refused: list[int | None] = []

        def guest() -> None:
            try:
                rig.disk.write(0, b"y" * BLOCK)
            except OSError as error:
                refused.append(error.errno)

        thread = threading.Thread(target=guest)
        thread.start()
        thread.join()
        assert refused == [errno.EROFS]
        with pytest.raises(RefusedError), rig.hold.passing():
            pytest.fail("one at a time")
    with pytest.raises(OSError, match="takes no writes"):
        rig.disk.write(0, b"z" * BLOCK)
    assert rig.kinds() == [(Kind.WRITE, 0), (Kind.DISCARD, BLOCK)]
    assert rig.disk.read(0, 2 * BLOCK) == b"x" * BLOCK + bytes(BLOCK)
