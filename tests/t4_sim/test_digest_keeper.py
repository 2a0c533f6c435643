"""How many workers digest at a store: one, and more only when that one has no rest."""

from __future__ import annotations

from typing import ClassVar

import pytest
import trio
import trio.testing

from asrfs.errors import TemporaryError
from asrfs.protocol.frames import FrameType
from asrfs.protocol.messages import Compare, Compared, decode_message, encode_message
from replica_store.daemon import digest_keeper
from replica_store.daemon.digest_keeper import AT_ONCE, PATIENCE_S, DigestKeeper

MACHINE = "a" * 32
START_S = 0.3


class Worker:
    """Answers after `seconds`. `died`: so many more answers do not come."""

    seconds = 0.001
    died = 0
    started: ClassVar[list[float]] = []
    at_work: ClassVar[list[int]] = []

    def __init__(self) -> None:
        self.is_good = True

    @classmethod
    async def start(cls, *_: object) -> Worker:
        cls.started.append(trio.current_time())
        await trio.sleep(START_S)  # sleep: virtual
        return cls()

    async def ask(self, request: bytes) -> bytes:
        self.at_work[0] += 1
        try:
            await trio.sleep(self.seconds)  # sleep: virtual
        finally:
            self.at_work[0] -= 1
        if Worker.died:
            Worker.died -= 1
            self.is_good = False
            raise TemporaryError("it is gone")
        wanted = decode_message(FrameType.COMPARE, request[32:])
        assert isinstance(wanted, Compare)
        return encode_message(Compared(number=wanted.number))

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> type[Worker]:
    monkeypatch.setattr(digest_keeper, "Worker", Worker)
    monkeypatch.setattr(Worker, "started", [])
    monkeypatch.setattr(Worker, "at_work", [0])
    monkeypatch.setattr(digest_keeper.os, "cpu_count", lambda: 2)
    return Worker


async def ask_all(keeper: DigestKeeper, count: int, every_s: float) -> list[Compared]:
    """A host that digests a region every so often, and waits when too many are unanswered."""
    answers: list[Compared] = []
    turns = trio.Semaphore(AT_ONCE)

    async def ask(number: int) -> None:
        wanted = Compare(number=number, slot=0, disk_id="0" * 32, size_bytes=512, first=0, digests=bytes(32))
        answers.append(await keeper.compare(MACHINE, wanted))
        turns.release()

    async with trio.open_nursery() as nursery:
        for number in range(count):
            await turns.acquire()
            nursery.start_soon(ask, number)
            await trio.sleep(every_s)  # sleep: virtual
    assert sorted(answer.number for answer in answers) == list(range(count))
    return answers


async def test_one_worker_is_enough_for_what_is_kept(
    workers: type[Worker], autojump_clock: trio.testing.MockClock
) -> None:
    """Also where many waited while it was being started."""
    await ask_all(DigestKeeper("vault"), 200, 0.02)
    assert len(workers.started) == 1


async def test_another_one_helps_when_the_first_has_no_rest(
    workers: type[Worker], autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "seconds", 0.075)
    began = trio.current_time()
    await ask_all(DigestKeeper("vault"), 100, 0.02)
    assert len(workers.started) == 2
    assert PATIENCE_S <= workers.started[1] - began <= PATIENCE_S + 0.1


async def test_workers_that_end_are_replaced_and_nobody_waits_for_ever(
    workers: type[Worker], autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "died", 5)
    answers = await ask_all(DigestKeeper("vault"), 50, 0.02)
    assert sum(answer.exit_code == TemporaryError.exit_code for answer in answers) == 5
    assert len(workers.started) >= 6
    assert workers.at_work == [0]
