"""Calls that come short, are interrupted or find no room: the same promises from the real filesystem and the double."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from asrfs.storage import directory
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import read_whole
from tests.fakes.crash_storage import CHANGING, CrashStorage, Fate, Fault
from tests.fakes.short_system import ShortSystem

WRITES = """
import os, sys
from asrfs.storage.directory import DirectoryStorage
storage = DirectoryStorage(sys.argv[1])
file = storage.create("f")
file.allocate(1 << 20)
pieces = [os.urandom(5000) for _ in range(40)]
for at in range(3):
    file.write_at(pieces, at * 200_000)
    file.punch(at * 200_000 + 4096, 8192)
    file.datasync()
    storage.sync_directory("")
buffer = bytearray(200_000)
expected = bytearray(b"".join(pieces))
expected[4096 : 4096 + 8192] = bytes(8192)
assert file.read_into(buffer, 400_000) == 200_000 and buffer == expected
file.truncate(600_000)
file.close()
"""


def test_short_reads_and_writes_of_the_system_are_gone_on_with(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = ShortSystem()
    monkeypatch.setattr(directory, "os", system)
    storage = DirectoryStorage(str(scratch))
    file = storage.create("f")
    pieces = [os.urandom(5000) for _ in range(7)]
    file.write_at([pieces[0], bytearray(pieces[1]), *map(memoryview, pieces[2:])], 123)
    file.close()
    assert read_whole(storage, "f") == bytes(123) + b"".join(pieces)
    assert system.cut > 10


def test_interrupted_system_calls_are_made_again(scratch: Path) -> None:
    """Every second call is interrupted by the kernel, through strace."""
    strace = shutil.which("strace")
    assert strace, "strace is one of the packages the tests need"
    calls = "pwritev,pwritev2,pwrite64,preadv,preadv2,fdatasync,fsync,fallocate,ftruncate"
    trace = scratch / "trace"
    inject = ("-e", f"trace={calls}", "-e", f"inject={calls}:error=EINTR:when=1+2")
    command = (strace, "-f", "-o", str(trace), *inject, sys.executable, "-c", WRITES, str(scratch / "root"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line for line in trace.read_text().splitlines() if "(INJECTED)" in line]
    struck = {line.split("(")[0].split()[-1].rstrip("2") for line in lines}
    assert {"pwritev", "preadv", "fdatasync", "fsync", "fallocate", "ftruncate"} <= struck


LIMITED = """
import os, resource, sys
from asrfs.storage.directory import DirectoryStorage
storage = DirectoryStorage(sys.argv[1])
file = storage.create("f")
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    file.write_at([b"a" * 6000, b"b" * 6000], 0)
except OSError as error:
    print(error.errno, file.size(), file.read_at(20_000, 0) == b"a" * 6000 + b"b" * 4000)
"""


def test_a_write_that_comes_short_for_want_of_room_raises(scratch: Path) -> None:
    """The kernel writes what fits, then refuses the rest: the caller hears of it, and the first part is there."""
    command = (sys.executable, "-c", LIMITED, str(scratch / "root"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(errno.EFBIG), "10000", "True"]


# ---- the double: declared, and each really strikes ----


def old_and_new(fault: Fault) -> tuple[CrashStorage, list[CrashStorage]]:
    """A durable file of old bytes, written over under the fault; the disk after each operation of that."""
    storage = CrashStorage()
    file = storage.create("f")
    file.write_at([b"o" * 4096], 0)
    file.datasync()
    storage.sync_directory("")
    storage.inject(fault)
    looks: list[CrashStorage] = []
    storage.after_operation = lambda kind, name: looks.append(storage.killed())
    file.write_at([b"n" * 4096], 0)
    file.datasync()
    storage.assert_fired()
    return storage, looks


@pytest.mark.parametrize(
    "fault",
    [
        Fault(0, kinds=frozenset(("write",)), partial=0.5, is_short=True),
        Fault(0, errno.EINTR, kinds=frozenset(("write",)), partial=0.5),
    ],
    ids=["short", "interrupted"],
)
def test_a_crash_may_come_in_the_middle_of_a_call_that_goes_on(fault: Fault, rng: random.Random) -> None:
    storage, looks = old_and_new(fault)
    assert read_whole(looks[0], "f") == b"n" * 2048 + b"o" * 2048
    assert read_whole(looks[1], "f") == b"n" * 4096
    assert {read_whole(looks[1].crash(Fate.SUBSET, random.Random(seed)), "f") for seed in range(60)} == {
        first * 2048 + second * 2048 for first in (b"o", b"n") for second in (b"o", b"n")
    }
    assert read_whole(storage.crash(Fate.LOST, rng), "f") == b"n" * 4096


def test_a_call_is_interrupted_once_however_long_that_lasts() -> None:
    fault = Fault(0, errno.EINTR, for_ever=True, kinds=CHANGING)
    storage, _ = old_and_new(fault)
    storage.make_directory("d")
    storage.rename("f", "d/g")
    storage.sync_directory("d")
    storage.unlink("d/g")
    assert fault.fired == 5


def test_unsynced_writes_may_reach_the_disk_in_another_order() -> None:
    storage = CrashStorage()
    file = storage.create("f")
    storage.sync_directory("")
    for byte in b"ab":
        file.write_at([bytes([byte]) * 512], 0)
    found = {fate: {_first(storage, fate, seed) for seed in range(60)} for fate in (Fate.SUBSET, Fate.REORDERED)}
    assert found[Fate.SUBSET] == found[Fate.REORDERED] == {b"", b"a", b"b"}
    file.datasync()
    assert {_first(storage, Fate.REORDERED, seed) for seed in range(20)} == {b"b"}


def test_what_is_shared_with_a_copy_does_not_change_under_it() -> None:
    storage = CrashStorage()
    file = storage.create("f")
    file.write_at([b"one"], 0)
    before = storage.killed()
    file.write_at([b"two"], 0)
    again = before.open("f", write=True)
    again.write_at([b"!"], 3)
    assert read_whole(storage, "f") == b"two"
    assert read_whole(before, "f") == b"one!"
    assert before.contents() == {"f": b"one!"}


def test_settled_means_that_no_fate_takes_anything() -> None:
    storage = CrashStorage()
    assert storage.is_settled()
    file = storage.create("f")
    assert not storage.is_settled()
    storage.sync_directory("")
    file.write_at([b"x"], 0)
    assert not storage.is_settled()
    file.datasync()
    assert storage.is_settled()
    file.write_at([b"y"], 0)
    storage.inject(Fault(0, kinds=frozenset(("datasync",))))
    with pytest.raises(OSError):
        file.datasync()
    assert not storage.is_settled()


def _first(storage: CrashStorage, fate: Fate, seed: int) -> bytes:
    return read_whole(storage.crash(fate, random.Random(seed)), "f")[:1]
