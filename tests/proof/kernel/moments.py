"""Which moments of a host's power loss go together with which of its store's.

Each may be any, but for what was said between them. A store may not know records of a host that the host has lost, and
a host may not have been told of what its store had not yet promised: so between two notes of the witness, where nothing
was said, both are free.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from tests.proof.kernel.power import RecordedDevice
from tests.proof.kernel.witness import Instant, Seen

TRIES = 8
FOREVER = 1 << 62


class Answered(NamedTuple):
    """The fsync behind operation `done` was answered at this instant of the host's device."""

    done: int
    at: Instant


class Life(NamedTuple):
    """What was answered to whoever wrote, what the store was about to say, and where its device ended."""

    answered: list[Answered]
    seen: list[Seen]
    vault_end: Instant


class Loss(NamedTuple):
    """Both lose power. All operations up to `done` and all records up to `acknowledged` must have survived."""

    host: Instant
    vault: Instant
    done: int
    acknowledged: int


def done_at(answered: Sequence[Answered], at: Instant) -> int:
    """The last operation whose answer relied on nothing that was not flushed by then."""
    return max((each.done for each in answered if each.at.flushed <= at.flushed), default=0)


def draw_instant(device: RecordedDevice, lsns: range, rng: random.Random) -> Instant:
    """Any instant, rather one at which the device held much that was not flushed."""
    chosen = max((rng.choice(lsns) for _ in range(TRIES)), key=lambda lsn: lsn - device.flushed_lsn(lsn))
    return device.at(chosen)


def draw_losses(life: Life, host: RecordedDevice, vault: RecordedDevice, count: int, rng: random.Random) -> list[Loss]:
    """The last instants of both, then of the store in turn one at which it was about to promise something, any.

    Neither device has to write anything after an answer, so only at such an instant everything unsynced is lost.
    """
    last = life.answered[-1]
    losses = [_loss(life, last.at, life.vault_end)]
    promises = [each for each in life.seen if each.lsn]
    lsns = range(promises[0].vault.appended, life.vault_end.appended + 1)
    while len(losses) < count:
        at = rng.choice(promises).vault if len(losses) % 2 else draw_instant(vault, lsns, rng)
        losses.append(_loss(life, _draw_host(life, host, at, rng), at))
    return losses


def _loss(life: Life, host: Instant, vault: Instant) -> Loss:
    promised = max((each.lsn for each in life.seen if each.vault.flushed <= vault.flushed), default=0)
    return Loss(host, vault, done_at(life.answered, host), promised)


def _draw_host(life: Life, host: RecordedDevice, vault: Instant, rng: random.Random) -> Instant:
    """An instant of the host that goes together with this one of its store; half the time that of an answer."""
    came = [each.host for each in life.seen if not each.lsn and each.vault.appended < vault.appended]
    earliest = came[-1] if came else life.answered[0].at
    promised_later = [each.host.appended for each in life.seen if each.lsn and each.vault.flushed > vault.flushed]
    latest = promised_later[0] if promised_later else FOREVER
    answers = [each.at for each in life.answered if each.at.flushed >= earliest.flushed and each.at.appended <= latest]
    if answers and rng.random() < 0.5:
        return rng.choice(answers)
    end = min(latest, life.answered[-1].at.appended)
    begin = bisect_left(range(end + 1), earliest.flushed, lo=1, key=host.flushed_lsn)
    begin = max(begin, life.answered[0].at.appended)
    return draw_instant(host, range(begin, end + 1), rng) if begin <= end else earliest
