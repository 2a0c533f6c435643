"""What a disk server serves, with real files: DISK records before writes, verbs, restarts, a journal without space."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asrfs.daemon import served_machine
from asrfs.daemon.agent_hydration import without_base
from asrfs.daemon.boot_change import change_boot
from asrfs.daemon.disks import add_sized, remove, resize
from asrfs.daemon.final_apply import apply_everything
from asrfs.daemon.served_machine import FILL_BYTES_MAX, ServedMachine
from asrfs.daemon.state import HYDRATION_FILE, StateDirectory
from asrfs.disk.interface import AbsentError, HeldError, waiting
from asrfs.errors import BadInputError, FormatError, IntegrityError, NotFoundError, RefusedError, TemporaryError
from asrfs.format.record import Kind, RecordHeader
from asrfs.journal.reader import JournalReader
from asrfs.journal.recovery import Recovered
from asrfs.journal.writer import Journal
from asrfs.model.boot import BootSettings, QemuBoot, decode_boot
from asrfs.model.machine import MachineConfig, decode_disk
from asrfs.model.marker import MarkerRecord, decode_marker, encode_marker
from asrfs.model.names import id_bytes
from asrfs.model.positions import Cursor
from asrfs.model.recovered import RecoveredDisk, RecoveredMachine
from asrfs.replication.hydration_file import HydrationFile
from asrfs.storage.directory import DirectoryStorage, open_path
from asrfs.storage.system_clock import SystemClock
from tests.waiting import wait_until

Open = Callable[[], ServedMachine]
HOLD = "f" * 32


@pytest.fixture
def state(scratch: Path) -> StateDirectory:
    state = StateDirectory.create(str(scratch / "state"), "web1")
    add_sized(state, "root", 1 << 20)
    add_sized(state, "data", (1 << 20) + 512)
    return state


@pytest.fixture
def serve(state: StateDirectory) -> Iterator[Open]:
    """Opens the machine as the next disk server would, after the sudden end of the one before."""
    opened: list[ServedMachine] = []

    def end() -> None:
        if opened:
            last = opened.pop()
            last.journal.close()
            last.close()

    def serve() -> ServedMachine:
        end()
        opened.append(ServedMachine(state, SystemClock()))
        return opened[-1]

    yield serve
    end()


def history(state: StateDirectory, machine: ServedMachine) -> list[tuple[RecordHeader, bytes]]:
    """All records, made durable first."""
    machine.journal.sync()
    reader = JournalReader(DirectoryStorage(state.journal), id_bytes(state.load_machine().id))
    try:
        records: list[tuple[RecordHeader, bytes]] = []
        cursor = Cursor()
        while cursor.lsn < machine.journal.durable_lsn:
            batch = reader.read(cursor, machine.journal.durable_lsn, 16 << 20)
            records += [(header, bytes(payload)) for header, payload in batch.records]
            cursor = batch.cursor
        return records
    finally:
        reader.close()


def disk_of(machine: ServedMachine, name: str) -> int:
    return machine.volume.nodes[f"{name}.img".encode()]


def read(machine: ServedMachine, name: str, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    machine.volume.disks[disk_of(machine, name)].read_into(offset, memoryview(buffer))
    return bytes(buffer)


def write(machine: ServedMachine, name: str, offset: int, payload: bytes) -> None:
    machine.volume.disks[disk_of(machine, name)].write(offset, payload)


def test_every_disk_is_in_the_history_before_its_writes(state: StateDirectory, serve: Open) -> None:
    machine = serve()
    write(machine, "data", 0, b"x" * 4096)
    add_sized(state, "hot", 4096)
    machine.disks({})
    write(machine, "hot", 0, b"y" * 4096)
    machine.disks({})
    remove(state, "hot", lambda: None)
    machine.disks({})
    records = history(state, machine)
    disks = {header.lsn: decode_disk(payload) for header, payload in records if header.kind == Kind.DISK}
    assert [header.kind for header, _ in records] == [Kind.DISK] * 2 + [Kind.WRITE, Kind.DISK, Kind.WRITE, Kind.DISK]
    assert [(lsn, disk.name, disk.removed) for lsn, disk in disks.items()] == [
        (1, "root", False), (2, "data", False), (4, "hot", False), (6, "hot", True),
    ]  # fmt: skip
    assert b"hot.img" not in machine.volume.nodes


def test_next_disk_server_finds_what_was_written_and_says_again_which_disks_there_are(
    state: StateDirectory, serve: Open
) -> None:
    machine = serve()
    write(machine, "root", 8192, b"journaled" * 1000)
    remove(state, "data", lambda: None)
    machine = serve()
    assert read(machine, "root", 8192, 9000) == b"journaled" * 1000
    kinds = [(header.kind, header.slot) for header, _ in history(state, machine)]
    assert kinds == [(5, 0), (5, 1), (1, 0), (5, 0), (5, 1)]
    assert list(machine.volume.nodes) == [b"root.img"]


def test_too_few_files_for_a_map_of_each_segment(
    state: StateDirectory, serve: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = serve()
    machine.volume.disks[disk_of(machine, "root")].write(0, b"r" * 4096)
    machine.journal.sync()
    asked: list[bool] = []
    sound = served_machine.recover

    def recover(*given: Any, by_indexes: bool) -> Recovered:
        asked.append(by_indexes)
        if by_indexes:
            raise OSError(errno.EMFILE, "too many open files")
        return sound(*given, by_indexes=by_indexes)

    monkeypatch.setattr(served_machine, "recover", recover)
    machine = serve()
    assert asked == [True, False]
    assert read(machine, "root", 0, 4096) == b"r" * 4096


def test_i7_the_image_of_a_removed_disk_is_held_until_it_is_released(state: StateDirectory, serve: Open) -> None:
    """The applier may still write to it: nobody else may have it meanwhile, block devices included."""
    machine = serve()
    image = open_path(state.image_path(state.load_machine().disk("data")))

    def check_held() -> None:
        machine.disks({})
        assert list(machine.volume.nodes) == [b"root.img"]
        with pytest.raises(BlockingIOError):
            fcntl.flock(image.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def fail() -> None:
        check_held()
        raise TemporaryError("not now")

    with pytest.raises(TemporaryError, match="not now"):
        remove(state, "data", fail)
    machine = serve()
    remove(state, "data", check_held)
    machine.disks({})
    fcntl.flock(image.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    image.close()


def test_i7_an_older_state_is_never_taken_over_after_a_newer_one(
    state: StateDirectory, serve: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two verbs at once: what one of them read must not wait while the other one reads and acts."""
    machine = serve()
    reads = []

    def load(self: StateDirectory) -> MachineConfig:
        reads.append(machine._changing.locked())
        return real(self)

    real = StateDirectory.load_machine
    monkeypatch.setattr(StateDirectory, "load_machine", load)
    machine.disks({})
    assert reads == [True]


def test_positions_are_those_of_one_instant(serve: Open) -> None:
    machine = serve()
    write(machine, "root", 0, b"x" * 4096)
    before = machine.positions({})
    assert (before["appended"], before["applied"], before["epoch"], before["failed"]) == (3, 0, 1, None)
    after = machine.sync({})
    assert after["durable"] == after["appended"] == 3
    assert (after["segment"], after["offset"]) == (before["segment"], before["offset"])


def test_positions_say_how_long_requests_took(serve: Open) -> None:
    """Of the thread that serves them, which is the main one."""
    machine = serve()
    before = machine.positions({})["served_s"]
    thread = threading.Thread(target=lambda: sum(range(2_000_000)))
    thread.start()
    thread.join()
    of_others = machine.positions({})["served_s"] - before
    write(machine, "root", 0, b"x" * 4096)
    sum(range(2_000_000))
    assert machine.positions({})["served_s"] - before > 5 * of_others > 0


def test_marker_is_durable_when_it_is_answered(state: StateDirectory, serve: Open) -> None:
    machine = serve()
    marker = MarkerRecord(id=uuid.uuid4().hex, name="before-upgrade")
    answer = machine.marker({"payload": encode_marker(marker)})
    assert answer["lsn"] == machine.journal.durable_lsn
    header, payload = history(state, machine)[-1]
    assert (header.kind, header.slot, header.lsn, header.time_ns) == (4, 0xFFFF, answer["lsn"], answer["time_ns"])
    assert decode_marker(payload) == marker
    with pytest.raises(FormatError):
        machine.marker({"payload": b"garbage"})
    assert machine.journal.appended_lsn == answer["lsn"]


def test_fill_puts_present_content_into_the_history(state: StateDirectory, serve: Open) -> None:
    machine = serve()
    write(machine, "data", 4096, b"z" * 4096)
    answer = machine.fill({"slot": 1, "offset": 0, "length": 12288})
    header, payload = history(state, machine)[-1]
    assert (header.kind, header.slot, header.offset, header.length, header.lsn) == (6, 1, 0, 12288, answer["lsn"])
    assert payload == bytes(4096) + b"z" * 4096 + bytes(4096)
    with pytest.raises(NotFoundError):
        machine.fill({"slot": 9, "offset": 0, "length": 4096})
    for length in (0, -1, FILL_BYTES_MAX + 1):
        with pytest.raises(BadInputError):
            machine.fill({"slot": 1, "offset": 0, "length": length})


def test_applied_segments_are_read_from_the_image(state: StateDirectory, serve: Open) -> None:
    machine = serve()
    write(machine, "root", 0, b"a" * 4096)
    first = machine.journal.segment
    machine = serve()
    write(machine, "root", 4096, b"b" * 4096)
    image = Path(state.image_path(state.load_machine().disk("root")))
    with image.open("r+b") as file:
        file.write(b"A" * 8192)
    machine.applied({"lsn": 3, "segment": first})
    assert read(machine, "root", 0, 8192) == b"A" * 4096 + b"b" * 4096
    assert machine.positions({})["applied"] == 3


def test_image_that_is_missing_short_or_taken_is_named(state: StateDirectory, serve: Open) -> None:
    disk = state.load_machine().disk("root")
    image = Path(state.image_path(disk))
    machine = serve()
    with pytest.raises(RefusedError, match=f"{image} of disk root is in use"):
        ServedMachine(state, SystemClock())
    del machine
    serve().disks({})
    with image.open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(IntegrityError, match="has 4096 bytes instead of 1048576"):
        serve()
    image.unlink()
    with pytest.raises(NotFoundError, match="does not exist"):
        serve()


def test_disk_is_announced_late_where_the_journal_has_no_space(
    state: StateDirectory, serve: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disks appear all the same, and the first write that finds space brings the DISK record before itself."""
    machine = serve()
    write(machine, "root", 0, b"kept" * 1024)
    full = True
    append = Journal.append_locked

    def append_or_fail(self: Journal, *arguments: object) -> int:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Journal, "append_locked", append_or_fail)
    machine = serve()
    assert read(machine, "root", 0, 4096) == b"kept" * 1024
    disk = machine.volume.disks[disk_of(machine, "root")]
    with pytest.raises(OSError, match="No space left"):
        disk.write(0, b"x" * 4096)
    with pytest.raises(OSError, match="No space left"):
        disk.zero(0, 4096)
    with pytest.raises(OSError, match="No space left"):
        disk.discard(0, 4096)
    with pytest.raises(OSError, match="No space left"):
        machine.fill({"slot": 0, "offset": 0, "length": 4096})
    machine.disks({})  # another disk that comes meanwhile appears in the same way
    assert read(machine, "root", 0, 4096) == b"kept" * 1024
    full = False
    write(machine, "root", 0, b"x" * 4096)
    machine.fill({"slot": 1, "offset": 0, "length": 4096})
    machine.disks({})
    kinds = [(header.kind, header.slot) for header, _ in history(state, machine)]
    assert kinds == [(5, 0), (5, 1), (1, 0), (5, 0), (1, 0), (5, 1), (Kind.ZERO, 1)]
    assert read(machine, "root", 0, 4096) == b"x" * 4096


def test_gap_is_closed_by_a_disk_record(state: StateDirectory, serve: Open) -> None:
    machine = serve()

    def with_gap(gap: bool) -> None:
        config = state.load_machine()
        disks = (msgspec.structs.replace(config.disks[0], gap=gap), *config.disks[1:])
        state.edit_machine(lambda _: msgspec.structs.replace(config, disks=disks))

    with_gap(True)
    machine.disks({})
    with_gap(False)
    machine.disks({})
    disks = [decode_disk(payload) for header, payload in history(state, machine) if header.slot == 0]
    assert [disk.gap for disk in disks] == [False, True, False]


@pytest.mark.parametrize("bytes_more", [512, 4096 - 512, 4096, 3 * 4096 + 1024])
@pytest.mark.parametrize("is_applied", [False, True])
def test_a_disk_grows_and_its_uneven_end_with_it(
    state: StateDirectory, serve: Open, bytes_more: int, is_applied: bool
) -> None:
    """Disk `data` ends 512 bytes into a block: what was journaled of that block is short and not to be read as more."""
    machine, old = serve(), (1 << 20) + 512
    write(machine, "data", old - 512, b"e" * 512)
    write(machine, "root", 0, b"behind it in the segment" * 200)
    if is_applied:
        machine.journal.sync()
        apply_everything(state)
        machine = serve()
    resize(state, "data", old + bytes_more)
    machine.disks({})
    new = b"e" * 512 + bytes(bytes_more)
    assert read(machine, "data", old - 512, 512 + bytes_more) == new
    write(machine, "data", old, b"n" * 512)
    new = new[:512] + b"n" * 512 + new[1024:]
    for _ in range(2):
        machine = serve()
        assert read(machine, "data", old - 512, 512 + bytes_more) == new
        write(machine, "data", old - 512, b"e" * 512)
    assert state.load_machine().disk("data").growing_from is None
    sizes = [decode_disk(payload).size_bytes for header, payload in history(state, machine) if header.kind == Kind.DISK]
    assert old + bytes_more in sizes
    apply_everything(state)
    assert Path(state.image_path(state.load_machine().disk("data"))).read_bytes()[old - 512 :] == new


def test_the_new_end_of_a_disk_is_not_used_before_its_last_block_is_durable(
    state: StateDirectory, serve: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, old = serve(), (1 << 20) + 512
    write(machine, "data", old - 512, b"e" * 512)
    resize(state, "data", old + 1024)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "sync failed")

    with monkeypatch.context() as patch:
        patch.setattr(machine.journal, "sync", fail)
        with pytest.raises(OSError, match="sync failed"):
            machine.disks({})
    assert machine.volume.disks[disk_of(machine, "data")].size_bytes == old
    write(machine, "data", old - 512, b"f" * 512)  # as long as the block is by now
    machine = serve()
    assert machine.volume.disks[disk_of(machine, "data")].size_bytes == old + 1024
    assert read(machine, "data", old - 512, 1536) == b"f" * 512 + bytes(1024)


def test_writes_are_held_between_the_verbs_hold_and_release(serve: Open) -> None:
    machine = serve()
    marker = encode_marker(MarkerRecord(id=HOLD, group="shop", group_point=HOLD, members=(HOLD,)))
    machine.arm({"id": HOLD, "payload": marker, "seconds": 60})
    write(machine, "data", 4096, b"x" * 4096)
    held = machine.begin_hold({"id": HOLD})
    assert held["lsn"] == machine.positions({})["appended"]
    with pytest.raises(HeldError):
        write(machine, "data", 0, b"x" * 4096)
    released = machine.release({"id": HOLD})
    assert released["holding"] is True
    assert released["hold_ms"] >= 0
    wait_until(lambda: machine.journal.barred is None)
    write(machine, "data", 0, b"x" * 4096)


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": "x"},
        {"id": None},
        {"seconds": "1"},
        {"seconds": 0},
        {"seconds": 3600},
        {"seconds": float("nan")},
        {"not_after": "now"},
        {"payload": b"junk"},
    ],
)
def test_holds_that_cannot_be_hold_nothing(serve: Open, wrong: dict[str, object]) -> None:
    machine = serve()
    marker = encode_marker(MarkerRecord(id=HOLD))
    with pytest.raises((BadInputError, FormatError)):
        machine.arm({"id": HOLD, "payload": marker, "seconds": 1.0} | wrong)
    with pytest.raises(RefusedError, match="not made ready"):
        machine.begin_hold({"id": HOLD})
    write(machine, "data", 0, b"x" * 4096)


@pytest.mark.parametrize("may", [True, False])
def test_a_thread_that_others_are_held_for_is_urgent_until_the_release(
    serve: Open, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel lets it. While it waits for other machines to be frozen it is not: that may take a minute."""
    asked: list[int] = []

    def set_scheduler(_pid: int, policy: int, parameter: os.sched_param) -> None:
        assert (policy & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO) == (parameter.sched_priority > 0)
        asked.append(parameter.sched_priority)
        if not may:
            raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", set_scheduler)
    machine = serve()
    request = {"id": HOLD, "payload": encode_marker(MarkerRecord(id=HOLD)), "seconds": 60}
    machine.arm(request)
    machine.begin_hold({"id": HOLD})
    assert asked == [1, 3]
    assert machine.release({"id": HOLD})["holding"] is True
    assert asked == [1, 3, 0]
    machine.arm(request | {"not_after": SystemClock().monotonic() + 60})
    assert asked == [1, 3, 0]
    machine.begin_hold({"id": HOLD})
    machine.release({"id": HOLD})
    assert asked == [1, 3, 0, 3, 0]


def test_an_end_in_a_hold_lets_go_and_keeps_what_was_written(state: StateDirectory, serve: Open) -> None:
    machine = serve()
    write(machine, "data", 0, b"x" * 4096)
    machine.arm({"id": HOLD, "payload": encode_marker(MarkerRecord(id=HOLD)), "seconds": 60})
    machine.begin_hold({"id": HOLD})
    machine.hold.end()
    assert machine.release({"id": HOLD})["holding"] is False
    assert read(serve(), "data", 0, 4096) == b"x" * 4096


def test_how_the_machine_is_started_is_in_the_history_and_said_again(state: StateDirectory, serve: Open) -> None:
    machine = serve()
    change_boot(state, BootSettings(kind="qemu", qemu=QemuBoot(disks=("root",))))
    machine.disks({})
    change_boot(state, BootSettings(kind="none"))
    machine.disks({})
    machine.disks({})
    with pytest.raises(NotFoundError, match="gone"):
        change_boot(state, BootSettings(kind="qemu", qemu=QemuBoot(disks=("gone",))))
    serve().disks({})
    found = [decode_disk(payload) for header, payload in history(state, serve()) if header.kind == Kind.DISK]
    kinds = [(record.name, decode_boot(record.boot).kind) for record in found]
    first = [("root", "none"), ("data", "none")]
    assert kinds[:4] == [*first, ("root", "qemu"), ("data", "qemu")]
    assert kinds[4:6] == first and set(kinds[6:]) <= set(first), "every start says what holds"
    assert [record.boot for record in found[:2]] == [b"", b""]


def test_disk_over_a_base(scratch: Path) -> None:
    """Until it is whole: what is not here is told, never waited for; a doubt holds until something later is applied."""
    size_bytes, block = 64 * 4096 + 512, 4096
    content = os.urandom(size_bytes)
    (scratch / "base").write_bytes(content)
    disk = RecoveredDisk(slot=3, id="d" * 32, name="root", size_bytes=size_bytes, base=str(scratch / "base"))
    described = RecoveredMachine(machine_id="a" * 32, name="db1", epoch=2, lsn=90, time_ns=1, disks=(disk,))
    state = StateDirectory.create_recovered(str(scratch / "recovered"), described)
    machine = ServedMachine(state, SystemClock())
    try:
        (served,) = machine.volume.disks.values()
        assert (machine.journal.epoch, machine.journal.appended_lsn) == (2, 91)
        buffer = memoryview(bytearray(block))
        with pytest.raises(AbsentError):
            served.read_into(block, buffer)
        with pytest.raises(AbsentError):
            served.write(block + 1, b"x")
        assert machine.journal.appended_lsn == 91
        waiting(lambda: served.read_into(block, buffer))
        assert buffer == content[block : 2 * block]
        served.write(block, b"y" * block)
        served.write(block + 1, b"x")
        lsn = machine.fill({"slot": 3, "offset": 0, "length": 4 * block})["lsn"]
        assert machine.journal.appended_lsn == lsn == 94
        served.read_into(3 * block, buffer)
        assert buffer == content[3 * block : 4 * block]

        image = open_path(state.image_path(state.load_machine().disk("root")), write=True)
        image.write_at([b"torn" * 1024], 9 * block)
        machine.verbs()["hydrating"]({"slot": 3, "applied_lsn": 90, "extents": [[9 * block, 10 * block]]})
        waiting(lambda: served.read_into(9 * block, buffer))
        assert buffer == content[9 * block : 10 * block]
        machine.applied({"lsn": 90, "segment": 0})
        with pytest.raises(AbsentError):
            served.read_into(9 * block, buffer)
        machine.applied({"lsn": 91, "segment": 0})
        served.read_into(9 * block, buffer)
        assert buffer == b"torn" * 1024
        image.write_at([content], 0)
        image.close()
        state.edit_machine(lambda each: without_base(each, 3))
        (scratch / "base").unlink()
        machine.reconcile()
        served.read_into(20 * block, buffer)
        assert buffer == content[20 * block : 21 * block]
        for bad in (
            {"slot": "x", "applied_lsn": 1, "extents": []},
            {"slot": 3, "applied_lsn": 1, "extents": [[0, 1]] * 5000},
        ):
            with pytest.raises(BadInputError):
                machine.verbs()["hydrating"](bad)
    finally:
        machine.flush()
        machine.close()


def test_disk_server_that_starts_knows_what_is_in_doubt(scratch: Path) -> None:
    size_bytes, block = 16 * 4096, 4096
    content = os.urandom(size_bytes)
    (scratch / "base").write_bytes(content)
    disk = RecoveredDisk(slot=0, id="d" * 32, name="root", size_bytes=size_bytes, base=str(scratch / "base"))
    described = RecoveredMachine(machine_id="a" * 32, name="db1", epoch=2, lsn=90, time_ns=1, disks=(disk,))
    state = StateDirectory.create_recovered(str(scratch / "recovered"), described)
    file = HydrationFile(DirectoryStorage(state.root), HYDRATION_FILE, lambda: 90)
    file.begin("d" * 32, 0, [(0, 2 * block)])
    image = open_path(state.image_path(state.load_machine().disk("root")), write=True)
    image.write_at([b"torn" * 1024], 0)
    image.close()
    machine = ServedMachine(state, SystemClock())
    try:
        found = memoryview(bytearray(size_bytes))
        waiting(lambda: machine.volume.disks[2].read_into(0, found))
        assert found == content
    finally:
        machine.flush()
        machine.close()
    apply_everything(state)
    assert os.stat(state.image_path(state.load_machine().disk("root"))).st_blocks == 0, "it was not taken back"
