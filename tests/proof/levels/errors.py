"""Every operation of every scenario fails: EIO, ENOSPC, a short write, EINTR, once or for ever, reads too.

A case is one scenario with one kind of failure, played anew for each operation that fails. What a caller is told is
an OSError of that number or a typed error worth another try; calls that were interrupted or came short go on by
themselves and nobody is told. Where the failure was not final the same process goes on to the end; in every case
what it leaves is killed or loses power, starts while its disk still fails, starts again, and holds what was promised.
"""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, zip_longest
from pathlib import Path

import pytest

from asrfs.errors import AsrfsError
from tests.fakes.crash_storage import CHANGING, READING, CrashStorage, Fate, Fault
from tests.fakes.host_scenarios import BLOCK, SCENARIOS, Scenario
from tests.fakes.journal_world import JournalWorld, Model
from tests.fakes.pair_scenarios import PAIR_SCENARIOS, PairScenario
from tests.fakes.power_loss import check_next_start
from tests.fakes.replicated_world import PairLook, ReplicatedWorld, is_refusal
from tests.fakes.state_world import EditLook, EnrolLook, EnrolWorld, check_edited, edit_machine
from tests.fakes.vault_world import VaultWorld, make_vault
from tests.proof.level import Case, Context, Level, Notes

ANY = CHANGING | READING
NEVER = 1 << 60


@dataclass(frozen=True)
class Failure:
    """A kind of failure. `goes_on`: the caller is not told."""

    name: str
    error: int
    is_short: bool = False

    @property
    def goes_on(self) -> bool:
        return self.is_short or self.error == errno.EINTR

    def at(self, number: int, for_ever: bool, rng: random.Random) -> Fault:
        kinds = frozenset(("write",)) if self.is_short else ANY
        partial_share = rng.random() * 0.99
        return Fault(number, self.error, for_ever=for_ever, kinds=kinds, partial=partial_share, is_short=self.is_short)


FAILURES = (
    Failure("EIO", errno.EIO),
    Failure("ENOSPC", errno.ENOSPC),
    Failure("short write", 0, is_short=True),
    Failure("EINTR", errno.EINTR),
)
FOR_EVER = "for ever"
MODES = ("once", FOR_EVER)
FATES = list(Fate)
HOST_STEP = 2
PAIR_STEP = 12
SMALL_STEP = 5
"""Of so many operations in a row one fails, which one differs from round to round."""
IN_START = "in the next start"
FAULTS = (*(f"{failure.name} {mode}" for failure in FAILURES for mode in MODES), IN_START)


@contextmanager
def failing(number: int, failure: Failure, mode: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{failure.name} {mode} at operation {number}: {type(error).__name__}: {error}") from error


def note(notes: Notes, failure: Failure, mode: str) -> None:
    notes.count()
    notes.fired(f"{failure.name} {mode}")


def check_refusal(fault: Fault, error: OSError | AsrfsError) -> None:
    """What the caller was told is what it may be told."""
    assert not fault.goes_on, f"not for the caller: {error}"
    assert is_refusal(error), f"{type(error).__name__} is not what a failing disk may raise"
    assert not isinstance(error, OSError) or error.errno in (fault.error, errno.EIO), f"another error: {error}"


# ---- host alone ----


def fail_host(scenario: Scenario, failure: Failure, mode: str, scratch: Path, rng: random.Random, notes: Notes) -> None:
    seed = rng.random()
    world = JournalWorld(CrashStorage())
    probe = world.storage.inject(failure.at(NEVER, False, rng))
    scenario(world, random.Random(seed)).close()
    for number in range(rng.randrange(HOST_STEP), probe.seen, HOST_STEP):
        with failing(number, failure, mode):
            last = _play_host(scenario, seed, failure.at(number, mode == FOR_EVER, rng), rng)
            fate = rng.choice((None, rng.choice(FATES)))
            storage = last.storage.killed() if fate is None else last.storage.crash(fate, rng)
            last, has_failed = _start_while_failing(storage, last.model, failure.at(rng.randrange(12), False, rng))
            world = JournalWorld(last.storage.killed(), last.model.copy())
            world.check()
            world.close()
            check_next_start(world.storage.crash(rng.choice(FATES), rng), world.model)
        note(notes, failure, mode)
        if has_failed:
            notes.fired(IN_START)


def _play_host(scenario: Scenario, seed: float, fault: Fault, rng: random.Random) -> JournalWorld:
    """A scenario until the failure ends it; the life it ended in, closed."""
    world = JournalWorld(CrashStorage())
    world.storage.inject(fault)
    try:
        scenario(world, random.Random(seed))
    except OSError as error:
        check_refusal(fault, error)
    assert fault.fired, "the fault never fired"
    last = world.lives[-1]
    if (not fault.for_ever or fault.goes_on) and hasattr(last, "disks"):
        _go_on(last, rng)
    for life in world.lives:
        life.close()
    return last


def _go_on(world: JournalWorld, rng: random.Random) -> None:
    """After a failure that is over: I9, and either all goes on or nothing is ever acknowledged again."""
    if world.journal.failed is None:
        world.check()
        world.disks[0].write(0, rng.randbytes(2 * BLOCK))
        world.sync()
        world.check()
        return
    durable = world.journal.durable_lsn
    for call in (partial(world.disks[0].write, 0, rng.randbytes(BLOCK)), world.journal.sync):
        with pytest.raises(OSError, match=re.escape(world.journal.failed)):
            call()
    assert world.journal.durable_lsn == durable
    world.check()


def _start_while_failing(storage: CrashStorage, model: Model, fault: Fault) -> tuple[JournalWorld, bool]:
    """The next start on a disk that still fails: it says so, or it starts and holds what was promised."""
    storage.inject(fault)
    lives: list[JournalWorld] = []
    try:
        JournalWorld(storage, model.copy(), lives=lives).check()
    except OSError as error:
        check_refusal(fault, error)
    lives[-1].close()
    return lives[-1], fault.fired > 0


# ---- host and store ----


def fail_pair(
    scenario: PairScenario, failure: Failure, mode: str, scratch: Path, rng: random.Random, notes: Notes
) -> None:
    seed = rng.random()
    store = VaultWorld.new(scratch / "vault", 1)
    found, catalog = store.storage.killed(), store.catalogs[-1]
    for is_host in (True, False):
        pair = ReplicatedWorld.new(store.next_start(found.killed(), catalog), random.Random(seed))
        probe = _disk_of(pair, is_host).inject(failure.at(NEVER, False, rng))
        scenario(pair)
        pair.close()
        for number in range(rng.randrange(PAIR_STEP), probe.seen, PAIR_STEP):
            with failing(number, failure, f"{mode} {'of the host' if is_host else 'of the store'}"):
                pair = ReplicatedWorld.new(store.next_start(found.killed(), catalog), random.Random(seed))
                fault = _disk_of(pair, is_host).inject(failure.at(number, mode == FOR_EVER, rng))
                _play_pair(scenario, pair, fault)
                look = pair.look("host" if is_host else "store", "fault", str(number))
                pair.close()
                _check_pair(store, look, rng)
            note(notes, failure, mode)
    store.vault.close()


def _disk_of(pair: ReplicatedWorld, is_host: bool) -> CrashStorage:
    return pair.host.storage if is_host else pair.store.storage


def _play_pair(scenario: PairScenario, pair: ReplicatedWorld, fault: Fault) -> None:
    try:
        scenario(pair)
    except (OSError, AsrfsError) as error:
        check_refusal(fault, error)
    assert fault.fired, "the fault never fired"
    pair.session = None
    if (not fault.for_ever or fault.goes_on) and pair.is_alive and pair.host.journal.failed is None:
        pair.go_on()


def _check_pair(store: VaultWorld, look: PairLook, rng: random.Random) -> None:
    """Both lose power, start again and go on."""
    fates = rng.choice(FATES), rng.choice(FATES)
    after = store.next_start(look.store.crash(fates[1], rng), look.catalogs[-1])
    pair = ReplicatedWorld.next_start(look, look.host.crash(fates[0], rng), after, rng)
    try:
        pair.check_found()
        pair.go_on()
    finally:
        pair.close()


# ---- small files ----


def fail_edits(failure: Failure, mode: str, scratch: Path, rng: random.Random, notes: Notes) -> None:
    storage = CrashStorage()
    probe = storage.inject(failure.at(NEVER, False, rng))
    edit_machine(scratch / "host", storage, rng)
    for number in range(rng.randrange(SMALL_STEP), probe.seen, SMALL_STEP):
        with failing(number, failure, mode):
            storage, looks = CrashStorage(), list[EditLook]()
            fault = storage.inject(failure.at(number, mode == FOR_EVER, rng))
            with _refusing(fault):
                edit_machine(scratch / "host", storage, rng, looks)
            check_edited(scratch / "host", storage.crash(rng.choice(FATES), rng), looks[-1], rng)
        note(notes, failure, mode)


def fail_enrolment(failure: Failure, mode: str, scratch: Path, rng: random.Random, notes: Notes) -> None:
    make_vault(scratch / "vault")
    for is_host in (True, False):
        world = EnrolWorld(scratch, CrashStorage(), CrashStorage(), None)
        probe = (world.host if is_host else world.storage).inject(failure.at(NEVER, False, rng))
        world.enrol_twice()
        for number in range(rng.randrange(SMALL_STEP), probe.seen, SMALL_STEP):
            with failing(number, failure, mode):
                world, looks = EnrolWorld(scratch, CrashStorage(), CrashStorage(), None), list[EnrolLook]()
                fault = (world.host if is_host else world.storage).inject(failure.at(number, mode == FOR_EVER, rng))
                with _refusing(fault):
                    world.enrol_twice(looks)
                look, fates = looks[-1], (rng.choice(FATES), rng.choice(FATES))
                host, store = look.host.crash(fates[0], rng), look.store.crash(fates[1], rng)
                EnrolWorld(scratch, host, store, look.catalog).check(look)
            note(notes, failure, mode)


@contextmanager
def _refusing(fault: Fault) -> Iterator[None]:
    try:
        yield
    except (OSError, AsrfsError) as error:
        check_refusal(fault, error)
    assert fault.fired, "the fault never fired"


Fail = Callable[[Failure, str, Path, random.Random, Notes], None]
HOSTS: list[tuple[str, Fail]] = [(each.__name__, partial(fail_host, each)) for each in SCENARIOS]
PAIRS: list[tuple[str, Fail]] = [(each.__name__, partial(fail_pair, each)) for each in PAIR_SCENARIOS]
SMALL: list[tuple[str, Fail]] = [("disks_added_and_removed", fail_edits), ("enrolment", fail_enrolment)]
PLAYS = [play for plays in zip_longest(HOSTS, SMALL, PAIRS) for play in plays if play is not None]


def cases(context: Context) -> Iterator[Case]:
    for number in count():
        for name, play in PLAYS:
            for failure in FAILURES:
                for mode in MODES:
                    label = f"{name} {failure.name} {mode} {number}"
                    yield Case(label, partial(_play, context, label, play, failure, mode))


def _play(context: Context, label: str, play: Fail, failure: Failure, mode: str, notes: Notes) -> None:
    scratch = context.scratch / label.replace(" ", "-")
    scratch.mkdir()
    play(failure, mode, scratch, context.rng(label), notes)


LEVEL = Level(
    name="errors",
    unit="I/O errors",
    submission=4_800,  # a round: every scenario with every failure
    release=100_000,
    faults=FAULTS,
    cases=cases,
    is_divisible=True,
)
