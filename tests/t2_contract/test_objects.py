"""One contract for every place where a vault's objects can lie: the directory, on two storages, and the double."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from asrfs.errors import NoSpaceError, TemporaryError
from asrfs.storage.directory import DirectoryStorage
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.objects import ObjectExistsError, ObjectMissingError, Objects
from tests.fakes.crash_storage import CrashStorage, Fate, Fault
from tests.fakes.memory_objects import MemoryObjects

LOG = f"machines/{'a' * 32}/log/"
NAME = f"{LOG}00000001-0000000000000001-0000000000000005-0badcafe.obj"
OTHER = f"{LOG}00000001-0000000000000006-0000000000000007-0badcafe.obj"
MAKERS: dict[str, Callable[[Path], Objects]] = {
    "directory": lambda scratch: DirectoryObjects(DirectoryStorage(str(scratch)), str(scratch)),
    "directory in memory": lambda scratch: DirectoryObjects(CrashStorage(), "crash:"),
    "memory": lambda scratch: MemoryObjects(),
}


@pytest.fixture(params=MAKERS)
def objects(request: pytest.FixtureRequest, scratch: Path) -> Objects:
    return MAKERS[request.param](scratch)


def test_what_is_put_is_read_whole_and_in_ranges(objects: Objects) -> None:
    objects.put(NAME, [b"abc", bytearray(b"def"), memoryview(b"ghi")])
    assert objects.read(NAME) == b"abcdefghi"
    assert objects.size(NAME) == 9
    assert objects.read_range(NAME, 2, 4) == b"cdef"
    assert objects.read_range(NAME, 7, 100) == b"hi"
    assert objects.read_range(NAME, 9, 1) == b""


def test_a_put_never_replaces(objects: Objects) -> None:
    objects.put(NAME, [b"first"])
    with pytest.raises(ObjectExistsError):
        objects.put(NAME, [b"second"])
    assert objects.read(NAME) == b"first"
    assert objects.list("") == [NAME]


def test_of_many_puts_at_once_one_wins(objects: Objects) -> None:
    won: list[bytes] = []
    start = threading.Barrier(4)

    def put(content: bytes) -> None:
        start.wait()
        try:
            objects.put(NAME, [content])
        except (ObjectExistsError, TemporaryError):
            return
        won.append(content)

    threads = [threading.Thread(target=put, args=(bytes([i]) * 1000,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert objects.read(NAME) == won[0]


def test_what_is_missing_says_so(objects: Objects) -> None:
    with pytest.raises(ObjectMissingError, match="0badcafe"):
        objects.read(NAME)
    with pytest.raises(ObjectMissingError):
        objects.read_range(NAME, 0, 1)
    with pytest.raises(ObjectMissingError):
        objects.size(NAME)
    objects.delete(NAME)
    objects.settle(LOG)


def test_listing_by_prefix(objects: Objects) -> None:
    names = {NAME, OTHER, f"machines/{'a' * 32}/machine-00.obj", f"machines/{'b' * 32}/machine-01.obj"}
    assert objects.list("") == []
    for name in names:
        objects.put(name, [name.encode()])
    assert set(objects.list("")) == names
    assert set(objects.list(LOG)) == {NAME, OTHER}
    assert set(objects.list(f"machines/{'a' * 32}/machine-")) == {f"machines/{'a' * 32}/machine-00.obj"}
    assert set(objects.list(f"machines/{'b' * 32}")) == {f"machines/{'b' * 32}/machine-01.obj"}
    assert objects.list("machines/c") == []


def test_a_deleted_object_is_gone_and_its_name_free(objects: Objects) -> None:
    objects.put(NAME, [b"first"])
    objects.delete(NAME)
    assert objects.list(LOG) == []
    objects.put(NAME, [b"second"])
    assert objects.read(NAME) == b"second"


@pytest.mark.parametrize(
    "name", ["/etc/passwd.obj", "../x.obj", "a/../b.obj", "a.obj/b.obj", "A.obj", "x", "", "a//b.obj"]
)
def test_names_that_no_code_of_ours_makes_are_our_bug(objects: Objects, name: str) -> None:
    with pytest.raises(AssertionError):
        objects.put(name, [b""])
    with pytest.raises(AssertionError):
        objects.read(name)


# ---- what only a directory has -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", Fate)
def test_i3_what_was_put_survives_power_loss_and_nothing_is_half_there(fate: Fate, rng: random.Random) -> None:
    """Power is lost after each operation of two puts: what a put returned for is whole, all else whole or absent."""
    content = {NAME: rng.randbytes(9000), OTHER: rng.randbytes(5000)}
    points = 0
    crashed: list[tuple[int, CrashStorage]] = []
    storage = CrashStorage()
    done = 0
    storage.after_operation = lambda kind, name: crashed.append((done, storage.crash(fate, rng)))
    objects = DirectoryObjects(storage, "crash:")
    for done, (name, body) in enumerate(content.items()):  # noqa: B007 - the callback reads it
        objects.put(name, [body])
    done = 2
    crashed.append((done, storage.crash(fate, rng)))
    for count, found in crashed:
        points += 1
        after = DirectoryObjects(found, "crash:")
        after.sweep()
        there = after.list("")
        assert set(there) >= set(list(content)[:count]), "I3: a put that returned is there"
        assert all(after.read(name) == content[name] for name in there), "no object is half there"
        assert not found.exists(".incoming") or found.names(".incoming") == []
    assert points > 10


def test_what_a_killed_put_left_visible_is_made_durable_before_it_counts(rng: random.Random) -> None:
    storage = CrashStorage()
    seen: list[CrashStorage] = []
    storage.after_operation = lambda kind, name: seen.append(storage.killed()) if kind == "link" else None
    DirectoryObjects(storage, "crash:").put(NAME, [b"content"])
    (killed,) = seen
    assert NAME not in DirectoryObjects(killed.crash(Fate.LOST, rng), "crash:").list(""), "the link was not synced"
    DirectoryObjects(killed, "crash:").settle(LOG)
    assert DirectoryObjects(killed.crash(Fate.LOST, rng), "crash:").read(NAME) == b"content"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("at", range(6))
def test_a_failing_operation_makes_a_put_fail_and_the_next_one_works(at: int, code: int) -> None:
    storage = CrashStorage()
    objects = DirectoryObjects(storage, "crash:")
    objects.put(OTHER, [b"before"])
    storage.inject(Fault(at, code, partial=0.5))
    with pytest.raises(NoSpaceError if code == errno.ENOSPC else TemporaryError, match="crash:"):
        objects.put(NAME, [b"content" * 1000])
    storage.assert_fired()
    again = NAME.replace("0badcafe", "0badcaff")
    objects.put(again, [b"content" * 1000])
    assert objects.read(again) == b"content" * 1000
    assert objects.read(OTHER) == b"before"
    objects.sweep()
    assert storage.names(".incoming") == []
