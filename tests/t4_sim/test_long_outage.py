"""The store is away for twenty-four hours: what a person sees hour by hour, what is tried when, and what it costs.

The host of `test_resync`, on a clock of its own day: the store goes at noon and is back at noon. Its status is made of
its parts as `asrfs status` makes it.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import structlog
import trio
import trio.testing

from asrfs.daemon.agent_status import Facts, OldestUnacknowledged, status
from asrfs.daemon.protection import standing_of
from asrfs.errors import IntegrityError
from asrfs.format.record import Kind
from asrfs.journal.reader import JournalReader
from asrfs.model.calendar import Window
from asrfs.model.machine import decode_disk
from asrfs.model.marker import decode_marker
from asrfs.model.policy import Policy
from asrfs.replication.dirty_map_file import load_dirty_map
from asrfs.replication.resyncer import ALARM
from asrfs.replication.trimmer import Limit
from asrfs.transport.backoff import CEILING_S
from tests.fakes.healing_host import check_marked
from tests.fakes.journal_world import MACHINE_ID, ModelRecord, put_record
from tests.fakes.scripted_store import GIVEN_UP
from tests.fakes.virtual_time import pass_time
from tests.t4_sim.test_resync import (
    BLOCK,
    CHUNK,
    QUOTA_BYTES,
    QUOTA_SEGMENTS,
    SIZES,
    Host,
    come_back,
    go_away,
    protected,
    small_runs,
)

__all__ = ["small_runs"]
HOUR_S = 3600
NOON = 12 * 60
WINDOW = Window(18 * 60 + 30, 6 * 60)
WRITTEN_CHUNKS = ((0, 1), (0, 4), (0, 5), (0, 11), (1, 2))
"""All that the guest writes to, as slot and chunk."""
WRITE_EVERY_S = 60.0


class Day:
    """What `asrfs status` says of a host whose day began at noon, what its guest does, and what its trimmer frees."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.began = trio.current_time()
        self.slowest_s = 0.0
        self.freed: list[int] = []
        host.tick_s = 15.0
        host.window = WINDOW
        host.resyncer.minute = self.minute
        host.world.journal._time_ns = self.time_ns
        host.shipper._log = structlog.wrap_logger(structlog.ReturnLogger(), processors=[])  # 35 000 tries, a line each
        self._oldest = OldestUnacknowledged(JournalReader(host.world.journal_storage, MACHINE_ID))
        self._check_whatever_is_freed()

    def minute(self) -> int:
        return (NOON + int((trio.current_time() - self.began) / 60)) % (24 * 60)

    def time_ns(self) -> int:
        return int((2_000_000_000 + trio.current_time()) * 1e9)

    def status(self) -> Any:
        host = self.host
        machine = host.healing.machine.load()
        durable = host.progress.durable
        return status(
            Facts(
                machine=machine,
                images={0: "images/0", 1: "images/1"},
                is_enrolled=True,
                positions=host.positions.current,
                appended_lsn=host.world.journal.appended_lsn,
                durable=durable,
                epoch=1,
                now_ns=self.time_ns(),
                first_unacknowledged_ns=self._oldest.time_ns(host.progress.acknowledged, durable),
                oldest_segment=host.trimmer.look(),
                quota_bytes=QUOTA_BYTES,
                healing=standing_of(
                    host.dirty.map, host.dirty.given_up, machine, host.resyncer.phase, host.resyncer.failure
                ),
                fence=None,
                link=host.shipper._link.state,
                link_reason=host.shipper._link.reason,
                policy=Policy(),
                alarms=host.alarms.now(),
            )
        )

    def alarms(self) -> set[str]:
        return {alarm["id"] for alarm in self.status()["alarms"]}

    async def go_on(self, seconds: float) -> None:
        """The guest writes, whatever is the matter: no write takes a moment longer (I8)."""
        host = self.host
        for _ in range(int(seconds / WRITE_EVERY_S)):
            slot, chunk = host.rng.choice(WRITTEN_CHUNKS)
            blocks = min(CHUNK, SIZES[slot] - chunk * CHUNK) // BLOCK
            began = trio.current_time()
            at = chunk * CHUNK + host.rng.randrange(blocks) * BLOCK
            host.world.disks[slot].write(at, host.rng.randbytes(BLOCK))
            self.slowest_s = max(self.slowest_s, trio.current_time() - began)
            await pass_time(WRITE_EVERY_S)
            host.segments_max = max(host.segments_max, len(host.segments()))

    async def go_on_until(self, hour: float) -> None:
        """`hour`: since noon of the first day."""
        await self.go_on(self.began + hour * HOUR_S - trio.current_time())

    def _check_whatever_is_freed(self) -> None:
        host, trim = self.host, self.host.trimmer.trim

        def checked(limit: Limit, now_s: float) -> list[int]:
            freed = trim(limit, now_s)
            if freed:
                self.freed += freed
                assert limit.lsn <= host.positions.saved.applied.lsn, "I4: freed and not applied"
                dirty, given_up = load_dirty_map(host.world.storage, "dirty.map")
                check_marked(host.world.model.records, host.store.acknowledged_lsn, limit.lsn, dirty, given_up)
            return freed

        host.trimmer.trim = checked  # type: ignore[method-assign]


@asynccontextmanager
async def day(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Day]:
    """A protected host at noon. Every gap is a large one."""
    monkeypatch.setattr("asrfs.model.healing.SMALL_BYTES", 0)
    async with protected(rng) as (host, _):
        yield Day(host)


def check_points(host: Host, names: set[str]) -> None:
    """I5, I9: a store lists exactly these, and each of them is what the disks were."""
    disks = [bytearray(size) for size in SIZES]
    gaps: set[int] = set()
    listed: set[str] = set()
    for lsn, each in enumerate(host.store.records, 1):
        put_record(disks, ModelRecord(each.kind, each.slot, each.offset, each.length, each.content))
        if each.kind == Kind.DISK:
            disk = decode_disk(each.content)
            gaps = gaps | {disk.slot} if disk.gap else gaps - {disk.slot}
        elif each is GIVEN_UP:
            gaps = {0, 1}
        elif each.kind == Kind.MARKER and not gaps:
            listed.add(decode_marker(each.content).note)
            assert disks == host.world.model.disks_at(lsn), f"I9: point at LSN {lsn}"
    assert listed == names, "I5: the points a store may list"


async def test_a_day_without_the_store(
    autojump_clock: trio.testing.MockClock, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disks fail, too, when the window begins: the night has time enough."""
    async with day(rng, monkeypatch) as now:
        host = now.host
        await host.healing.make_point("before")
        await host.until_whole()
        assert (now.status()["state"], now.alarms()) == ("protected", set())
        kept = list(host.store.records)
        await go_away(host)
        tries = len(host.store.tries)
        await _first_hours(now)
        await _the_rest_of_the_day(now)
        _check_tries(host.store.tries[tries:])
        assert host.store.records == kept, "I7: the replica stays where it is"
        wanted = await _until_the_window(now)
        failing = _break_disks(host)
        await now.go_on_until(33.0)
        _check_retries(now, failing)
        await now.go_on_until(34.0)  # mended by then, and tried again by itself
        await host.until_whole(1)
        _check_whole(now, kept, wanted)


async def _first_hours(now: Day) -> None:
    """The journal keeps everything: nothing is lost but time."""
    await now.go_on(2 * 60)
    said = now.status()
    assert (said["state"], said["link"]) == ("protected", "disconnected")
    assert now.alarms() == {"link"}
    await now.go_on(28 * 60)
    said = now.status()
    assert said["state"] == "protected"
    assert now.alarms() >= {"link", "rpo"}
    assert said["lag"]["records"] >= 30
    assert 29 * 60 <= said["achieved_rpo_seconds"] <= 31 * 60


async def _the_rest_of_the_day(now: Day) -> None:
    """The quota is reached: what was written is known by its chunks from now on."""
    host = now.host
    hours: list[tuple[str, bool]] = []
    for hour in range(1, 24):
        await now.go_on_until(hour)
        await host.healing.make_point(f"hour {hour}")
        said = now.status()
        hours.append((said["state"], "resync-required" in now.alarms()))
        assert "giving-up" not in now.alarms()
    assert hours[0] == ("protected", False)
    first = hours.index(("resync-required", True))
    assert set(hours[:first]) == {("protected", False)} and set(hours[first:]) == {("resync-required", True)}
    said = now.status()
    assert "came to its quota" in said["reason"] and "once the store is there" in said["reason"]
    assert host.segments_max <= QUOTA_SEGMENTS + 2, "within its quota, and what is open or being applied"
    assert len(now.freed) > 10
    assert now.slowest_s == 0, "I8: no write waits for the store"
    assert host.resyncer.failures == 0, "a store that is away is no failure of the resync"


def _check_tries(tries: list[float]) -> None:
    """A store that answers again is met within seconds, at any time of the day."""
    waits = [later - earlier for earlier, later in pairwise(tries)]
    assert tries[-1] - tries[0] > 22 * HOUR_S
    assert max(waits) <= CEILING_S
    assert CEILING_S * 0.45 < sum(waits) / len(waits) < CEILING_S * 0.55, "each waits as it happens, not in step"


async def _until_the_window(now: Day) -> int:
    """The store is back at noon, and the replica waits for the evening: bytes that are missing."""
    host = now.host
    await now.go_on_until(24.0)
    come_back(host)
    await now.go_on(5 * 60)
    said = now.status()
    assert (said["state"], said["link"]) == ("resync-required", "connected")
    assert "between 18:30 and 06:00" in said["reason"] and "asrfs resync --now" in said["reason"]
    assert now.alarms() == {"resync-required"}
    wanted = said["resync"]["bytes_left"]
    assert wanted == sum(min(CHUNK, SIZES[slot] - chunk * CHUNK) for slot, chunk in WRITTEN_CHUNKS)
    assert len(host.store.gaps) == 1
    await now.go_on_until(30.4)
    said = now.status()
    assert said["state"] == "resync-required" and said["resync"]["bytes_left"] == wanted
    assert said["achieved_rpo_seconds"] < 60, "new writes are at the store meanwhile"
    assert not any(each.kind == Kind.FILL for each in host.store.records)
    return int(wanted)


def _break_disks(host: Host) -> list[float]:
    """Reading for the resync fails for two hours and a half of the evening; when it was tried."""
    sound, tries = host.healing.server.fill, list[float]()
    mended = trio.current_time() + 2.6 * HOUR_S

    async def fill(slot: int, offset: int, length: int) -> int:
        if trio.current_time() >= mended:
            return await sound(slot, offset, length)
        tries.append(trio.current_time())
        raise IntegrityError("the image cannot be read")

    host.healing.server.fill = fill  # type: ignore[method-assign]
    return tries


def _check_retries(now: Day, tries: list[float]) -> None:
    minutes = [round((later - earlier) / 60) for earlier, later in pairwise(tries)]
    assert minutes == [1, 2, 4, 8, 10, 30, 30, 30, 30]
    first = (tries[0] - now.began) / 60 + NOON
    assert round(first) % (24 * 60) == 18 * 60 + 30, "the window begins"
    said = now.status()
    assert said["state"] == "resync-required" and "the image cannot be read" in said["reason"]
    (alarm,) = [alarm for alarm in said["alarms"] if alarm["id"] == ALARM]
    assert alarm["severity"] == "critical" and "10 times in a row" in alarm["text"]


def _check_whole(now: Day, kept: list[Any], wanted: int) -> None:
    host = now.host
    assert (now.status()["state"], now.alarms()) == ("protected", set())
    host.check_replica()
    fills = [each for each in host.store.records if each.kind == Kind.FILL]
    assert sum(each.length for each in fills) == wanted, "each chunk that was written to once, and nothing else"
    assert len({(each.slot, each.offset) for each in fills}) == len(fills)
    assert host.store.records[: len(kept)] == kept, "I7"
    assert now.slowest_s == 0, "I8"
    last = decode_marker(next(each.content for each in reversed(host.store.records) if each.kind == Kind.MARKER)).note
    check_points(host, {"before", last})


async def test_an_alarm_of_a_job_that_fails_comes_with_the_third_time(
    autojump_clock: trio.testing.MockClock, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with day(rng, monkeypatch) as now:
        host = now.host
        host.window = Window(0, 0)
        await go_away(host)
        await now.go_on(6 * HOUR_S)
        tries = _break_disks(host)
        come_back(host)
        alarmed: list[bool] = []
        while len(tries) < 4:
            if len(tries) > len(alarmed):
                await pass_time(1)
                alarmed.append(ALARM in now.alarms())
            await pass_time(5)
        assert alarmed == [False, False, True]
