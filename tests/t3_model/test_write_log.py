"""`asrfs inspect --log-writes`: whoever replays the log has the disk, at its end and at every mark and flush."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from asrfs.cli import main
from asrfs.format.record import Kind
from asrfs.journal.block_map import BlockMap
from asrfs.journal.disk import JournaledDisk
from asrfs.journal.recovery import recover
from asrfs.journal.writer import Journal
from asrfs.model.machine import NO_SLOT
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.model.positions import Positions
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.system_clock import SystemClock
from tests.fakes.log_writes_replay import DISCARD, FLUSH, MARK, entries, put

MACHINE_ID = b"machine-of-tests"
SIZE = 40 * 4096 + 512
SEGMENT_BYTES = 256 << 10


class History:
    """Two disks on a journal of small segments. `at_flush`, `at_mark`: disk 0 when each happened."""

    def __init__(self, scratch: Path, rng: random.Random) -> None:
        self.path = scratch / "journal"
        self.rng = rng
        storage = DirectoryStorage(str(self.path))
        recovered = recover(storage, Positions(), MACHINE_ID, segment_bytes=SEGMENT_BYTES)
        self.journal = Journal(
            storage, MACHINE_ID, recovered, SystemClock(), segment_bytes=SEGMENT_BYTES, prepare_ahead=False
        )
        self.images = [DirectoryStorage(str(scratch / "images")).create(str(slot)) for slot in range(2)]
        for image in self.images:
            image.truncate(SIZE)
        self.disks = [JournaledDisk(slot, SIZE, self.images[slot], self.journal, BlockMap()) for slot in range(2)]
        self.model = bytearray(SIZE)
        self.at_flush: list[bytes] = []
        self.at_mark: dict[str, bytes] = {}
        self.syncs: set[int] = set()

    def step(self) -> bool:
        """Do something; whether it changed disk 0."""
        rng = self.rng
        slot = rng.choice((0, 0, 0, 1))
        disk = self.disks[slot]
        offset = 512 * rng.randrange(SIZE // 512)
        length = min(512 * rng.randint(1, 40), SIZE - offset)
        what = rng.choices(("write", "zero", "discard", "sync", "mark"), (8, 1, 1, 2, 1))[0]
        content = rng.randbytes(length) if what == "write" else bytes(length)
        if what == "write":
            disk.write(offset, content)
        elif what == "zero":
            disk.zero(offset, length)
        elif what == "discard":
            disk.discard(offset, length)
        elif what == "sync":
            # Only a flush that a later record tells of is in the journal.
            self.journal.sync()
            self.syncs.add(self.journal.appended_lsn)
            return False
        else:
            name = f"m{len(self.at_mark)}"
            self.journal.append(Kind.MARKER, NO_SLOT, 0, 0, encode_marker(MarkerRecord(id="0" * 32, name=name)))
            self.at_mark[name] = bytes(self.model)
            return False
        if slot == 0:
            self.model[offset : offset + length] = content
        return slot == 0

    def run(self, steps_min: int) -> None:
        """The last step changes disk 0, so that there is something of it in the last segment too."""
        seen = steps = 0
        has_changed = False
        while steps < steps_min or not has_changed:
            steps += 1
            before, state = self.journal.appended_lsn, bytes(self.model)
            has_changed = self.step()
            durable_before = max((lsn for lsn in self.syncs if lsn <= before), default=0)
            if self.journal.appended_lsn > before and durable_before > seen:
                assert durable_before == before
                seen = durable_before
                self.at_flush.append(state)

    def close(self) -> None:
        self.journal.close()
        for image in self.images:
            image.close()


@pytest.fixture
def history(scratch: Path, rng: random.Random) -> History:
    history = History(scratch, rng)
    history.run(400)
    history.close()
    return history


def export(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, object]:
    assert main.run(["inspect", "--json", *map(str, words)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def test_i9_a_replayed_write_log_is_the_disk(
    history: History, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = scratch / "disk.log"
    said = export(capsys, history.path, "--log-writes", log, "--slot", "0")
    device = bytearray(SIZE)
    at_flush: list[bytes] = []
    seen: Counter[str] = Counter()
    for entry in entries(log):
        put(device, entry)
        if entry.flags & FLUSH:
            at_flush.append(bytes(device))
        elif entry.flags & MARK:
            assert device == history.at_mark[entry.mark], f"I9: at mark {entry.mark}"
        seen[
            "flushes"
            if entry.flags & FLUSH
            else "marks"
            if entry.flags & MARK
            else "discards"
            if entry.flags & DISCARD
            else "writes"
        ] += 1
    assert device == history.model
    assert at_flush == history.at_flush
    assert {what: said[what] for what in seen} == dict(seen)
    assert set(seen) == {"writes", "flushes", "discards", "marks"}
    assert (said["first_lsn"], said["last_lsn"], said["slot"]) == (1, history.journal.appended_lsn, 0)
    assert said["bytes"] == log.stat().st_size
    assert len(list(history.path.glob("*.segment"))) > 3


def test_the_logs_of_single_segments_follow_one_another(
    history: History, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = bytearray(SIZE)
    expected = 1
    for number, segment in enumerate(sorted(history.path.glob("*.segment"))):
        said = export(capsys, segment, "--log-writes", scratch / f"{number}.log", "--slot", "0")
        assert said["first_lsn"] == expected
        expected = int(str(said["last_lsn"])) + 1
        for entry in entries(scratch / f"{number}.log"):
            put(device, entry)
    assert device == history.model


def test_what_cannot_be_exported_leaves_nothing(
    history: History, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = scratch / "disk.log"

    def code(*words: str | Path) -> int:
        done = main.run(["inspect", *map(str, words)])
        assert capsys.readouterr().out == ""
        return done

    assert code(history.path, "--log-writes", log) == 2, "there are two disks"
    assert code(history.path, "--log-writes", log, "--slot", "7") == 2
    assert code(history.path, "--slot", "0") == 2
    assert code(scratch / "none", "--log-writes", log) == 3
    assert code(history.path, "--log-writes", scratch / "none" / "x") == 3
    assert code(scratch, "--log-writes", log) == 5, "no journal"
    first = sorted(history.path.glob("*.segment"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:20_000] + bytes(8192) + whole[28_192:])
    assert code(history.path, "--log-writes", log, "--slot", "0") == 5
    first.write_bytes(whole)
    assert not log.exists()
    log.write_text("mine")
    assert code(history.path, "--log-writes", log, "--slot", "0") == 4
    assert log.read_text() == "mine"
