"""The direct session against a kernel in memory: every request it answers, and what it does with those it cannot."""

from __future__ import annotations

import errno
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from asrfs.errors import IntegrityError
from asrfs.fuse import abi
from asrfs.fuse import channel as channel_room
from asrfs.fuse.channel import (
    HEAD_OFFSET,
    SLOTS,
    Channel,
    MountGoneError,
    PlainChannel,
    RingChannel,
    Slot,
    _make_slots,
    open_channel,
)
from asrfs.fuse.direct import DirectSession
from asrfs.fuse.ring import Ring
from asrfs.fuse.volume import SyncCallback, Volume
from tests.fakes.fuse_kernel import FuseKernel
from tests.fakes.memory_disk import MemoryDisk

ROOT = 1
SIZE = 3 * 4096 + 512
SLOT = 4
NODE = SLOT + 2


class Syncs:
    """Collects what waits for durability, for the test to finish."""

    def __init__(self) -> None:
        self.waiting: list[SyncCallback] = []

    def request(self, callback: SyncCallback) -> None:
        self.waiting.append(callback)


@pytest.fixture
def disk() -> MemoryDisk:
    return MemoryDisk(SIZE)


@pytest.fixture
def syncs() -> Syncs:
    return Syncs()


@pytest.fixture
def volume(disk: MemoryDisk, syncs: Syncs) -> Volume:
    volume = Volume(syncs.request)
    volume.add("root", SLOT, disk)
    return volume


@pytest.fixture(params=[PlainChannel, RingChannel])
def channel(request: pytest.FixtureRequest) -> Callable[[int], Channel]:
    """Whatever holds for one way to the kernel holds for the other."""
    chosen: Callable[[int], Channel] = request.param
    return chosen


@pytest.fixture
def kernel(volume: Volume, channel: Callable[[int], Channel]) -> Iterator[FuseKernel]:
    with FuseKernel(volume, channel) as kernel:
        yield kernel


def names_in(body: bytes) -> list[tuple[int, int, str]]:
    """`(cookie, node, name)` of a READDIR reply."""
    found = []
    at = 0
    while at < len(body):
        node, cookie, length, _ = struct.unpack_from("<QQII", body, at)
        found.append((cookie, node, body[at + 24 : at + 24 + length].decode()))
        at += -(-(24 + length) // 8) * 8
    return found


def read_directory(kernel: FuseKernel, after: int, size: int) -> list[tuple[int, int, str]]:
    return names_in(kernel.ask(abi.READDIR, ROOT, struct.pack("<QQIIQII", 0, after, size, 0, 0, 0, 0)).body)


def allocate(kernel: FuseKernel, offset: int, length: int, mode: int) -> int:
    return kernel.ask(abi.FALLOCATE, NODE, struct.pack("<QQQII", 0, offset, length, mode, 0)).error


def set_size(kernel: FuseKernel, size: int) -> int:
    head = struct.pack("<IIQQ", 1 << 3, 0, 0, size)
    return kernel.ask(abi.SETATTR, NODE, head.ljust(88, b"\0")).error


def test_what_is_written_is_read(kernel: FuseKernel, disk: MemoryDisk) -> None:
    payload = os.urandom(8192)
    reply = kernel.write(NODE, 4096, payload)
    assert reply.error == 0
    assert struct.unpack("<II", reply.body) == (8192, 0)
    assert disk.content[4096 : 4096 + 8192] == payload
    assert kernel.read(NODE, 4000, 1000).body == bytes(disk.content[4000:5000])


def test_the_largest_requests_arrive_whole(channel: Callable[[int], Channel]) -> None:
    disk = MemoryDisk(2 << 20)
    volume = Volume(Syncs().request)
    volume.add("root", SLOT, disk)
    payload = os.urandom(1 << 20)
    with FuseKernel(volume, channel) as kernel:
        assert struct.unpack("<II", kernel.write(NODE, 1 << 20, payload).body)[0] == 1 << 20
        assert kernel.read(NODE, 1 << 20, 1 << 20).body == payload
    assert disk.content[1 << 20 :] == payload


def test_many_requests_at_once_are_all_answered(kernel: FuseKernel, disk: MemoryDisk) -> None:
    """More than there are slots, of every sort, before the first reply is taken."""
    wanted: dict[int, bytes] = {}
    for turn in range(3 * SLOTS):
        content = bytes([turn]) * 512
        head = struct.pack("<QQIIQII", 0, turn % 8 * 512, 512, 0, 0, 0, 0)
        wanted[kernel.send(abi.WRITE, NODE, head + content)] = struct.pack("<II", 512, 0)
        wanted[kernel.send(abi.STATFS, ROOT)] = b""
        head = struct.pack("<QQIIQII", 0, SIZE - 512, 512, 0, 0, 0, 0)
        wanted[kernel.send(abi.READ, NODE, head)] = bytes(512)
    for _ in list(wanted):
        reply = kernel.receive()
        assert reply.error == 0
        expected = wanted.pop(reply.unique)
        assert not expected or reply.body == expected
    assert not wanted


def test_io_uring_is_used_where_it_may_be_and_not_missed(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    channels: list[Channel] = []

    def opened(fd: int) -> Channel:
        channels.append(open_channel(fd))
        return channels[-1]

    def forbidden(entries: int) -> Ring:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    for kind in (RingChannel, PlainChannel):
        with FuseKernel(volume, opened) as kernel:
            assert kernel.write(NODE, 0, b"x" * 512).error == 0
        assert type(channels[-1]) is kind
        monkeypatch.setattr(channel_room, "Ring", forbidden)


def test_end_of_the_disk_is_that_of_a_block_device(kernel: FuseKernel, disk: MemoryDisk) -> None:
    reply = kernel.write(NODE, SIZE - 512, b"x" * 4096)
    assert struct.unpack("<II", reply.body)[0] == 512
    assert disk.calls == [("write", SIZE - 512, 512)]
    assert kernel.write(NODE, SIZE, b"x").error == -errno.ENOSPC
    assert len(kernel.read(NODE, SIZE - 10, 4096).body) == 10
    assert kernel.read(NODE, SIZE, 4096).body == b""
    assert kernel.read(NODE, 1 << 62, 4096).body == b""


def test_lookup_and_attributes(kernel: FuseKernel) -> None:
    reply = kernel.ask(abi.LOOKUP, ROOT, b"root.img\0")
    node, _, entry_valid, attr_valid, _, _ = struct.unpack_from("<QQQQII", reply.body)
    assert node == NODE
    assert 0 < entry_valid <= 1
    assert 0 < attr_valid <= 1
    attributes = struct.unpack_from("<QQQQQQIIIIIIIIII", reply.body, 40)
    assert attributes[:3] == (NODE, SIZE, -(-SIZE // 512))
    assert attributes[9:13] == (0o100600, 1, 0, 0)
    assert len(reply.body) == 128
    for name in (b"root\0", b"ROOT.img\0", b"\0", b"x" * 255 + b"\0"):
        assert kernel.ask(abi.LOOKUP, ROOT, name).error == -errno.ENOENT
    assert kernel.ask(abi.LOOKUP, NODE, b"root.img\0").error == -errno.ENOENT
    top = kernel.ask(abi.GETATTR, ROOT, bytes(16))
    assert len(top.body) == 104
    assert struct.unpack_from("<I", top.body, 16 + 60)[0] == 0o040700
    assert kernel.ask(abi.GETATTR, NODE + 1, bytes(16)).error == -errno.ESTALE


def test_directory_goes_on_where_it_was_left(kernel: FuseKernel, volume: Volume) -> None:
    volume.add("data", SLOT + 3, MemoryDisk(512))
    assert kernel.ask(abi.OPENDIR, ROOT, bytes(8)).error == 0
    everything = read_directory(kernel, 0, 4096)
    assert [name for _, _, name in everything] == [".", "..", "root.img", "data.img"]
    piecewise: list[tuple[int, int, str]] = []
    while piece := read_directory(kernel, piecewise[-1][0] if piecewise else 0, 40):
        assert len(piece) == 1
        piecewise += piece
        volume.remove("root")  # what went away between two pieces is not missed by the others
    assert piecewise == [each for each in everything if each[2] != "root.img"]


def test_size_cannot_change_but_truncation_to_nothing_is_borne(kernel: FuseKernel, disk: MemoryDisk) -> None:
    assert set_size(kernel, 0) == 0
    assert set_size(kernel, SIZE) == 0
    assert set_size(kernel, SIZE - 512) == -errno.EINVAL
    assert set_size(kernel, SIZE + 512) == -errno.EINVAL
    assert kernel.ask(abi.SETATTR, NODE, bytes(88)).error == 0
    assert disk.calls == []


def test_fallocate(kernel: FuseKernel, disk: MemoryDisk) -> None:
    keep, punch, zero = 1, 2, 16
    assert allocate(kernel, 4096, 4096, punch | keep) == 0
    assert allocate(kernel, 0, 4096, zero) == 0
    assert allocate(kernel, 8192, 4096, zero | keep) == 0
    assert disk.calls == [("discard", 4096, 4096), ("zero", 0, 4096), ("zero", 8192, 4096)]
    disk.calls.clear()
    assert allocate(kernel, SIZE - 512, 1 << 40, punch | keep) == 0
    assert disk.calls == [("discard", SIZE - 512, 512)]
    assert allocate(kernel, 0, SIZE, 0) == 0
    assert allocate(kernel, 0, SIZE + 1, 0) == -errno.ENOSPC
    assert allocate(kernel, SIZE + 4096, 4096, punch | keep) == 0
    assert allocate(kernel, 0, 4096, 8 | keep) == -errno.EOPNOTSUPP
    assert disk.calls == [("discard", SIZE - 512, 512)]


@pytest.mark.parametrize("opcode", [abi.FSYNC, abi.FLUSH])
def test_i2_sync_is_answered_when_durable_and_not_before(kernel: FuseKernel, syncs: Syncs, opcode: int) -> None:
    unique = kernel.send(opcode, NODE, bytes(16))
    assert kernel.write(NODE, 0, b"x" * 512).error == 0, "writes go on meanwhile"
    (callback,) = syncs.waiting
    callback(None)
    assert kernel.receive() == (0, unique, b"")
    unique = kernel.send(opcode, NODE, bytes(16))
    assert kernel.read(NODE, 0, 512).error == 0
    syncs.waiting[-1](OSError(errno.EIO, "gone"))
    assert kernel.receive() == (-errno.EIO, unique, b"")


def test_statfs_gives_loop_devices_a_granularity(kernel: FuseKernel) -> None:
    body = kernel.ask(abi.STATFS, ROOT).body
    assert len(body) == 80
    blocks, _, _, files, _, block_size, name_max, fragment_size = struct.unpack_from("<QQQQQIII", body)
    assert (blocks, files, block_size, name_max, fragment_size) == (4, 1, 4096, 255, 4096)


def test_open_asks_for_direct_parallel_io(kernel: FuseKernel) -> None:
    body = kernel.ask(abi.OPEN, NODE, bytes(8)).body
    assert struct.unpack("<QIi", body) == (0, (1 << 0) | (1 << 6), 0)
    assert kernel.ask(abi.OPEN, NODE + 1, bytes(8)).error == -errno.ESTALE
    assert kernel.ask(abi.RELEASE, NODE, bytes(24)).error == 0


def test_what_is_not_answered_is_refused_in_the_right_words(kernel: FuseKernel) -> None:
    for opcode in (abi.CREATE, abi.UNLINK, abi.MKDIR, abi.RMDIR, abi.RENAME, abi.RENAME2, abi.LINK, abi.MKNOD):
        assert kernel.ask(opcode, ROOT, b"x\0".ljust(64, b"\0")).error == -errno.EPERM
    for opcode in (22, 34, 36, 39, 46, 4000):  # GETXATTR, ACCESS, INTERRUPT, IOCTL, LSEEK, and one of the future
        assert kernel.ask(opcode, NODE, bytes(64)).error == -errno.ENOSYS


def test_forget_is_not_answered(kernel: FuseKernel) -> None:
    kernel.send(abi.FORGET, NODE, bytes(8))
    kernel.send(abi.BATCH_FORGET, 0, bytes(24))
    assert kernel.ask(abi.DESTROY, ROOT).error == 0


def test_errors_of_the_disk_reach_the_kernel(kernel: FuseKernel, disk: MemoryDisk) -> None:
    for error, answer in (
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError("without a number"), errno.EIO),
        (IntegrityError("rotten"), errno.EIO),
    ):
        disk.fail_with = error
        assert kernel.write(NODE, 0, b"x" * 512).error == -answer
        assert kernel.read(NODE, 0, 512).error == -answer
    disk.fail_with = None
    assert kernel.write(NODE, 0, b"x" * 512).error == 0


def test_removed_disk_answers_eio(kernel: FuseKernel, volume: Volume) -> None:
    volume.remove("root")
    assert kernel.write(NODE, 0, b"x" * 512).error == -errno.EIO
    assert kernel.read(NODE, 0, 512).error == -errno.EIO
    assert allocate(kernel, 0, 512, 3) == -errno.EIO
    assert kernel.ask(abi.LOOKUP, ROOT, b"root.img\0").error == -errno.ENOENT


def test_request_that_breaks_the_session_is_left_to_the_next_one(
    volume: Volume, disk: MemoryDisk, channel: Callable[[int], Channel]
) -> None:
    disk.fail_with = ZeroDivisionError()
    with FuseKernel(volume, channel) as kernel:
        kernel.send(abi.WRITE, NODE, struct.pack("<QQIIQII", 0, 0, 512, 0, 0, 0, 0) + bytes(512))
        assert isinstance(kernel.wait_for_death(), ZeroDivisionError)
    again = abi.RESEND_BIT | 77
    with FuseKernel(volume, channel) as kernel:
        assert kernel.write(NODE, 0, b"x" * 512, again) == (-errno.EIO, again, b"")
        disk.fail_with = None
        assert kernel.write(NODE, 0, b"x" * 512, again).error == 0


class BreaksTogether:
    """Writes of a turn that nobody can do at once."""

    room = 64

    def __init__(self) -> None:
        self.tried = 0
        self.framed: list[int] = []

    def frame(self, whole: memoryview) -> object:
        self.framed.append(len(whole) - self.room)
        return None

    def __call__(self, writes: object) -> bool:
        self.tried += 1
        raise ZeroDivisionError


def turn_of(volume: Volume, requests: list[tuple[int, int, int]]) -> list[bytes]:
    """The replies to writes `(unique, offset, size)` that one turn brings; what breaks it leaves."""
    slots = _make_slots(len(requests))[0]
    replies: list[bytes] = []

    class OneTurn:
        def wait(self) -> list[Slot]:
            raise MountGoneError

        def reply(self, slot: Slot, length: int) -> None:
            replies.append(bytes(slot.reply[:length]))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    for slot, (unique, offset, size) in zip(slots, requests, strict=True):
        head = (abi.WRITE_HEADER_BYTES + size, abi.WRITE, unique, NODE, 0, offset, size)
        abi.REQUEST.pack_into(slot.request, HEAD_OFFSET, *head)
        slot.length = abi.WRITE_HEADER_BYTES + size
    DirectSession(0, volume, time_s=0)._answer(OneTurn(), slots)
    return replies


def test_writes_that_break_the_session_together_are_tried_one_by_one_when_they_come_again(volume: Volume) -> None:
    volume.write_together = together = BreaksTogether()
    with pytest.raises(ZeroDivisionError):
        turn_of(volume, [(1, 0, 4096), (2, 4096, 4096)])
    replies = turn_of(volume, [(1 | abi.RESEND_BIT, 0, 4096), (2 | abi.RESEND_BIT, 4096, 4096)])
    assert together.tried == 2
    assert [struct.unpack_from("<IiQ", reply)[1] for reply in replies] == [0, 0]


def test_only_writes_of_whole_pages_are_framed(volume: Volume) -> None:
    """What is made of a slot for a size is kept for good: there are as many as there are sizes."""
    volume.write_together = together = BreaksTogether()
    replies = turn_of(volume, [(unique, 0, 512 * unique) for unique in range(1, 8)])
    assert len(replies) == 7 and not together.framed


def test_resume_asks_for_unanswered_requests(kernel: FuseKernel) -> None:
    kernel.session.resume()
    assert kernel.receive() == (7, 0, b"")


def test_stop_ends_a_session_that_waits(volume: Volume, channel: Callable[[int], Channel]) -> None:
    kernel = FuseKernel(volume, channel)
    session = kernel.session
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGUSR1, lambda *_: session.stop_from_signal())
    done = threading.Event()

    def kick() -> None:
        while not done.wait(0.01):
            signal.pthread_kill(main, signal.SIGUSR1)

    kicker = threading.Thread(target=kick)
    kicker.start()
    try:
        assert session.run() is False
    finally:
        done.set()
        kicker.join()
        signal.signal(signal.SIGUSR1, before)
        with kernel:
            pass
