"""One contract for every storage: the real filesystem and the double that can lose power.

What a power loss does is asked of the double alone, at the end; a real kernel's answer is asked in the system layer.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asrfs.storage import directory
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import File, Storage, read_whole, write_atomically
from tests.fakes.crash_storage import CHANGING, READING, CrashStorage, Fate, Fault
from tests.fakes.short_system import ShortSystem

MiB = 1 << 20


KINDS = ("directory", "directory-short", "crash", "crash-short", "crash-interrupted", "below")


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest) -> Storage:
    """`short`: each read and write does only a part of what is asked; `interrupted`: each call is, once."""
    if request.param.startswith("directory"):
        if request.param == "directory-short":
            request.getfixturevalue("monkeypatch").setattr(directory, "os", ShortSystem())
        scratch: Path = request.getfixturevalue("scratch")
        return DirectoryStorage(str(scratch / "root"))
    storage = CrashStorage()
    if request.param == "crash-short":
        storage.inject(Fault(0, for_ever=True, kinds=frozenset(("write",)), partial=0.6, is_short=True))
    if request.param == "crash-interrupted":
        storage.inject(Fault(0, errno.EINTR, for_ever=True, kinds=CHANGING | READING, partial=0.4))
    return storage.below("a/b") if request.param == "below" else storage


@pytest.fixture
def file(storage: Storage) -> Iterator[File]:
    made = storage.create("file")
    yield made
    made.close()


def put(storage: Storage, name: str, content: bytes) -> None:
    file = storage.create(name)
    file.write_at([content], 0)
    file.close()


# ---- files ----


def test_a_new_file_is_empty_and_its_name_is_taken(storage: Storage, file: File) -> None:
    assert file.size() == 0
    assert file.read_at(10, 0) == b""
    assert storage.exists("file")
    with pytest.raises(FileExistsError):
        storage.create("file")


def test_buffers_are_written_one_after_the_other(file: File) -> None:
    file.write_at([b"one", bytearray(b"two"), memoryview(b"three")], 5)
    assert file.read_at(100, 0) == b"\0" * 5 + b"onetwothree"
    assert file.size() == 16


def test_a_write_that_is_larger_than_a_call_arrives_whole(file: File, rng: random.Random) -> None:
    """However its buffers lie to where one call ends."""
    piece = directory.PIECE_BYTES
    for sizes in ([3 * piece + 7], [piece, piece], [piece - 1, 1, 1, 2 * piece, 0, 5], [9] * 1000 + [piece, 11]):
        buffers = [rng.randbytes(size) for size in sizes]
        file.write_at([bytearray(each) if i % 2 else memoryview(each) for i, each in enumerate(buffers)], 13)
        whole = b"".join(buffers)
        assert file.read_at(len(whole) + 1, 13)[: len(whole)] == whole


def test_a_write_is_seen_at_once_by_every_reader(storage: Storage, file: File) -> None:
    other = storage.open("file")
    file.write_at([b"x" * 100], 0)
    assert other.read_at(100, 0) == b"x" * 100
    other.close()


def test_reads_are_short_only_at_the_end(file: File) -> None:
    content = random.Random(1).randbytes(3 * MiB + 77)
    file.write_at([content], 0)
    assert file.read_at(len(content) + 5, 0) == content
    assert file.read_at(100, len(content) - 7) == content[-7:]
    assert file.read_at(1, len(content)) == b""
    buffer = bytearray(b"?" * 10)
    assert file.read_into(buffer, len(content) - 4) == 4
    assert buffer == content[-4:] + b"?" * 6
    assert file.read_into(memoryview(buffer)[2:5], 0) == 3
    assert buffer[2:5] == content[:3]


def test_size_follows_truncate_and_new_bytes_are_zeros(file: File) -> None:
    file.write_at([b"abcdef"], 0)
    file.truncate(3)
    file.truncate(10)
    assert file.size() == 10
    assert file.read_at(20, 0) == b"abc" + bytes(7)


def test_allocate_grows_and_never_shrinks(file: File) -> None:
    file.allocate(8192)
    assert file.size() == 8192
    file.write_at([b"x"], 8191)
    file.allocate(4096)
    assert file.size() == 8192
    assert file.read_at(1, 8191) == b"x"
    assert not any(file.read_at(8191, 0))


def test_punched_bytes_read_as_zeros_and_the_size_stays(file: File) -> None:
    file.write_at([b"\xff" * 16384], 0)
    file.punch(4096, 8192)
    file.punch(16000, 100_000)
    assert file.size() == 16384
    assert file.read_at(16384, 0) == b"\xff" * 4096 + bytes(8192) + b"\xff" * (16000 - 12288) + bytes(384)


def test_data_extents_cover_all_that_is_not_zeros_in_order(file: File) -> None:
    file.truncate(4 * MiB)
    assert list(file.data_extents()) == []
    for at in (0, MiB, 3 * MiB + 4096):
        file.write_at([b"\xff" * 4096], at)
    file.datasync()
    extents = list(file.data_extents())
    assert extents == sorted(extents)
    for at in (0, MiB, 3 * MiB + 4096):
        assert any(start <= at and at + 4096 <= start + length for start, length in extents)
    assert sum(length for _, length in extents) < 2 * MiB
    assert all(start + length <= 4 * MiB for start, length in extents)
    for begin in (0, 1, 4096, MiB, MiB + 512, 2 * MiB, 4 * MiB, 5 * MiB):
        rest = list(file.data_extents(begin))
        assert rest == sorted(rest)
        assert all(start >= begin for start, _ in rest)
        covered = {at for start, length in rest for at in range(start, start + length, 512)}
        assert covered >= {at for at in (0, MiB, MiB + 512, 3 * MiB + 4096) if at >= begin}


def test_a_file_opened_to_read_cannot_be_written(storage: Storage, file: File) -> None:
    reader = storage.open("file")
    changes: list[Callable[[], None]] = [lambda: reader.write_at([b"x"], 0)]
    for change in changes:
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EBADF
    reader.close()
    writer = storage.open("file", write=True)
    writer.write_at([b"x"], 0)
    writer.datasync()
    writer.close()
    assert file.read_at(1, 0) == b"x"


# ---- names ----


def test_what_is_not_there(storage: Storage) -> None:
    storage.make_directory("d")
    put(storage, "there", b"")
    for call in (
        lambda: storage.open("no"),
        lambda: storage.unlink("no"),
        lambda: storage.rename("no", "other"),
        lambda: storage.link("no", "other"),
        lambda: storage.create("nodir/file"),
        lambda: storage.rename("there", "nodir/there"),
        lambda: storage.names("nodir"),
        lambda: storage.sync_directory("nodir"),
    ):
        with pytest.raises(FileNotFoundError):
            call()
    assert not storage.exists("no")
    assert storage.names("d") == []


def test_rename_replaces_and_an_open_file_stays_usable(storage: Storage) -> None:
    put(storage, "old", b"old")
    put(storage, "new", b"new")
    replaced = storage.open("new")
    moved = storage.open("old", write=True)
    storage.rename("old", "new")
    assert not storage.exists("old")
    assert replaced.read_at(3, 0) == b"new"
    moved.write_at([b"!"], 3)
    assert read_whole(storage, "new") == b"old!"
    for file in (replaced, moved):
        file.close()


def test_rename_to_itself_changes_nothing(storage: Storage) -> None:
    put(storage, "a", b"a")
    storage.rename("a", "a")
    assert read_whole(storage, "a") == b"a"


def test_link_is_a_second_name_and_never_replaces(storage: Storage) -> None:
    put(storage, "a", b"a")
    storage.link("a", "b")
    with pytest.raises(FileExistsError):
        storage.link("a", "b")
    storage.unlink("a")
    assert read_whole(storage, "b") == b"a"


def test_an_unlinked_file_lives_as_long_as_it_is_open(storage: Storage) -> None:
    put(storage, "a", b"a")
    file = storage.open("a")
    storage.unlink("a")
    assert not storage.exists("a")
    assert file.read_at(1, 0) == b"a"
    file.close()


def test_names_are_sorted_and_of_one_directory(storage: Storage) -> None:
    storage.make_directory("d/e")
    storage.make_directory("d/e")
    for name in ("b", "a", "d/z", "d/y"):
        put(storage, name, b"")
    assert storage.names("") == ["a", "b", "d"]
    assert storage.names("d") == ["e", "y", "z"]
    storage.rename("d/z", "c")
    assert storage.names("d") == ["e", "y"]
    assert storage.names("") == ["a", "b", "c", "d"]
    storage.sync_directory("d")
    storage.sync_directory("")
    assert storage.exists("d")


def test_a_directory_is_no_file_and_a_file_no_directory(storage: Storage) -> None:
    storage.make_directory("d")
    put(storage, "f", b"")
    with pytest.raises(IsADirectoryError):
        storage.open("d", write=True)
    with pytest.raises(OSError):
        storage.make_directory("f")


def test_atomic_replacement(storage: Storage) -> None:
    storage.make_directory("d")
    for content in (b"one", b"two" * 1000, b""):
        write_atomically(storage, "d/f", content)
        write_atomically(storage, "g", content)
        assert read_whole(storage, "d/f") == read_whole(storage, "g") == content
    assert storage.names("d") == ["f"]


def test_free_space_is_some(storage: Storage) -> None:
    assert storage.free_bytes() > 0


# ---- what the double does on a power loss: the rules of the interface ----


def file_after(storage: CrashStorage, fate: Fate, seed: int = 0) -> bytes:
    return read_whole(storage.crash(fate, random.Random(seed)), "f")


def begun() -> tuple[CrashStorage, File]:
    """A file of four old blocks, durable with its name."""
    storage = CrashStorage()
    file = storage.create("f")
    file.write_at([b"o" * 16384], 0)
    file.datasync()
    storage.sync_directory("")
    return storage, file


def test_unsynced_writes_are_kept_lost_torn_or_some_of_them() -> None:
    storage, file = begun()
    for i in range(4):
        file.write_at([b"n" * 4096], i * 4096)
    assert file_after(storage, Fate.KEPT) == b"n" * 16384
    assert file_after(storage, Fate.LOST) == b"o" * 16384
    subsets = {file_after(storage, Fate.SUBSET, seed) for seed in range(200)}
    assert len(subsets) == 16
    assert all(len(set(content[at : at + 4096])) == 1 for content in subsets for at in range(0, 16384, 4096))
    torn = file_after(storage, Fate.TORN, 3)
    assert set(torn) == set(b"no")
    assert all(len(set(torn[at : at + 512])) == 1 for at in range(0, 16384, 512))
    file.datasync()
    assert all(file_after(storage, fate) == b"n" * 16384 for fate in Fate)
    assert storage.unsynced_bytes("f") == 0


def test_size_and_holes_become_durable_with_the_bytes() -> None:
    storage, file = begun()
    file.punch(0, 4096)
    file.truncate(8192)
    assert file_after(storage, Fate.LOST) == b"o" * 16384
    assert len({file_after(storage, Fate.SUBSET, seed) for seed in range(50)}) == 4
    file.datasync()
    assert file_after(storage, Fate.LOST) == bytes(4096) + b"o" * 4096


def test_a_sync_of_one_file_does_nothing_for_another() -> None:
    storage, file = begun()
    other = storage.create("g")
    other.write_at([b"x"], 0)
    file.write_at([b"n"], 0)
    other.datasync()
    assert file_after(storage, Fate.LOST)[:1] == b"o"
    assert not storage.crash(Fate.LOST, random.Random(0)).exists("g")


def test_names_may_be_undone_one_by_one_until_their_directory_is_synced() -> None:
    storage, _ = begun()
    storage.make_directory("d")
    for name in ("a", "b"):
        put(storage, name, name.encode())
    storage.rename("f", "d/moved")
    seen = set()
    for seed in range(100):
        after = storage.crash(Fate.SUBSET, random.Random(seed))
        there = tuple(name for name in ("a", "b", "f", "d/moved") if after.exists(name))
        seen.add(there)
        assert ("f" in there) != ("d/moved" in there), "a rename is never half-done"
    assert len(seen) == 8
    storage.sync_directory("")
    after = storage.crash(Fate.LOST, random.Random(0))
    assert after.names("") == ["a", "b", "d", "f"]
    storage.sync_directory("d")
    assert storage.crash(Fate.LOST, random.Random(0)).names("d") == ["moved"]


def test_a_rename_may_stay_although_the_one_before_it_was_undone() -> None:
    storage, _ = begun()
    storage.rename("f", "g")
    storage.rename("g", "h")
    seen = {tuple(storage.crash(Fate.SUBSET, random.Random(seed)).names("")) for seed in range(100)}
    assert seen == {("f",), ("g",), ("h",)}


def test_an_atomic_replacement_is_the_old_file_or_the_new_one(rng: random.Random) -> None:
    storage, _ = begun()
    looks: list[CrashStorage] = []
    storage.after_operation = lambda kind, name: looks.append(storage.killed())
    write_atomically(storage, "f", b"new")
    storage.after_operation = None
    assert len(looks) == 5
    found = {read_whole(look.crash(fate, rng), "f") for look in looks for fate in Fate for _ in range(5)}
    assert found == {b"o" * 16384, b"new"}
    assert file_after(storage, Fate.LOST) == b"new"


def test_a_kill_loses_nothing_and_makes_nothing_durable() -> None:
    storage, file = begun()
    file.write_at([b"n"], 0)
    put(storage, "g", b"g")
    after = storage.killed()
    assert read_whole(after, "f")[:1] == b"n"
    assert after.names("") == ["f", "g"]
    lost = after.crash(Fate.LOST, random.Random(0))
    assert read_whole(lost, "f")[:1] == b"o"
    assert lost.names("") == ["f"]
    file.write_at([b"later"], 0)
    assert read_whole(after, "f")[:1] == b"n", "a copy does not follow its original"


def test_faults_fire_by_number_once_or_for_ever() -> None:
    storage, file = begun()
    once = storage.inject(Fault(at=1, error=errno.ENOSPC, kinds=frozenset(["write"]), partial=0.5))
    file.write_at([b"1" * 1024], 0)
    with pytest.raises(OSError) as caught:
        file.write_at([b"2" * 1024], 0)
    assert caught.value.errno == errno.ENOSPC
    assert file.read_at(1024, 0) == b"2" * 512 + b"1" * 512
    file.write_at([b"3"], 0)
    assert once.fired == 1
    for_ever = storage.inject(Fault(at=0, for_ever=True, kinds=frozenset(["write"])))
    for _ in range(3):
        with pytest.raises(OSError):
            file.write_at([b"4"], 0)
    assert for_ever.fired == 3
    storage.assert_fired()
    storage.inject(Fault(at=99))
    with pytest.raises(AssertionError, match="never fired"):
        storage.assert_fired()


def test_a_failed_datasync_makes_nothing_durable_and_is_not_tried_again() -> None:
    storage, file = begun()
    file.write_at([b"n"], 0)
    storage.inject(Fault(at=0, kinds=frozenset(["datasync"])))
    with pytest.raises(OSError):
        file.datasync()
    assert file_after(storage, Fate.LOST)[:1] == b"o"
    with pytest.raises(AssertionError, match="tried again"):
        file.datasync()


def test_a_full_disk_takes_what_fits() -> None:
    storage = CrashStorage(capacity=10_000)
    file = storage.create("f")
    file.write_at([b"x" * 8000], 0)
    with pytest.raises(OSError) as caught:
        file.write_at([b"y" * 8000], 8000)
    assert caught.value.errno == errno.ENOSPC
    assert file.size() == 10_000
    assert storage.free_bytes() == 0
    file.write_at([b"z" * 8000], 0)
    with pytest.raises(OSError):
        file.allocate(10_001)
    file.truncate(0)
    file.allocate(10_000)
