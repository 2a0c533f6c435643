"""Power is lost at every operation of every scenario, in every way, and again while that is being recovered from.

A case is one scenario, played once and looked at after each operation of its storage. Each look is continued with
each fate of what was not synced; whatever is found is recovered twice, compared with the model byte for byte, goes
on, and for one operation of that loses power again (where host and store crash together, in a share of the cases).
What would find the same bytes with the same promises as before is left out and not counted. A round is every scenario
once; rounds differ by their randomness.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import count, zip_longest
from pathlib import Path
from typing import TypeVar

import pytest

from asrfs.errors import IntegrityError
from asrfs.format.segment import POSITION_MASK, POSITION_SHIFT
from asrfs.journal.reader import JournalReader
from asrfs.journal.recovery import recover
from asrfs.journal.segments import segment_name
from asrfs.model.positions import Positions
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.fakes.host_scenarios import SCENARIOS, Scenario, many_segments_one_sync
from tests.fakes.journal_world import MACHINE_ID, SEGMENT_BYTES, JournalWorld, Look
from tests.fakes.pair_scenarios import PAIR_SCENARIOS, PairScenario
from tests.fakes.power_loss import Seen, check_next_start, check_recovers_twice, distinct_starts, watch
from tests.fakes.rebuild_world import RebuildLook, check_rebuilt, new_rebuild_world, put_catalog, rebuild
from tests.fakes.replicated_world import PairLook, PairStart, ReplicatedWorld, starts_of
from tests.fakes.state_world import EditLook, EnrolLook, EnrolWorld, check_edited, edit_machine
from tests.fakes.store_power_loss import check_next_start as check_store_start
from tests.fakes.store_power_loss import check_starts_twice, new_world
from tests.fakes.vault_world import StoreLook, VaultWorld, make_vault
from tests.proof.level import Case, Context, Level, Notes

IN_RECOVERY = "in recovery"
DAMAGED = "damaged"
AGAIN_SHARE = 0.25
"""Of a pair's crashes, so many are followed by one in their recovery; of a lone host's all."""
FATES = list(Fate)
Play = Callable[[Path, random.Random, Notes], None]


AnyLook = TypeVar("AnyLook", Look, PairLook, StoreLook, RebuildLook, EditLook, EnrolLook)


@contextmanager
def crashed(
    number: int, look: Look | PairLook | StoreLook | RebuildLook | EditLook | EnrolLook, way: str
) -> Iterator[None]:
    """Whatever leaves this says at which operation and in which way."""
    try:
        yield
    except Exception as error:
        place = f"after operation {number} ({look.kind} {look.name}), {way}"
        raise AssertionError(f"{place}: {type(error).__name__}: {error}") from error


def note(notes: Notes, way: str) -> None:
    notes.count()
    for word in way.partition(" (")[0].replace(":", "").replace(",", "").split():
        if word in FAULTS:
            notes.fired(word)


@contextmanager
def crashed_again(
    number: int, way: str, again: list[AnyLook], rng: random.Random, notes: Notes
) -> Iterator[tuple[AnyLook, Fate]]:
    """After one operation of a recovery power is lost a second time: which one, and how. Counts it as a crash."""
    second, fate = rng.choice(again), rng.choice(FATES)
    with crashed(number, second, f"{way}, and {fate.value} in its recovery"):
        yield second, fate
    note(notes, fate.value)
    notes.fired(IN_RECOVERY)


# ---- host alone ----


def play_host(scenario: Scenario, scratch: Path, rng: random.Random, notes: Notes) -> None:
    seen: Seen = set()
    for number, look in enumerate(watch(scenario, rng)):
        promised = (look.model.promised_lsn, *map(id, look.model.records[: look.model.promised_lsn]))
        for way, found in distinct_starts(look.storage, rng, seen, promised):
            again: list[Look] = []
            with crashed(number, look, way):
                check_recovers_twice(found)
                check_next_start(found, look.model, again)
            note(notes, way)
            with crashed_again(number, way, again, rng, notes) as (second, fate):
                check_next_start(second.storage.crash(fate, rng), second.model)


def play_damage(scratch: Path, rng: random.Random, notes: Notes) -> None:
    """A record that was durable is damaged: that is said, and nothing is cut or changed."""
    world = many_segments_one_sync(JournalWorld(CrashStorage()), rng)
    world.close()
    durable = world.storage.crash(Fate.KEPT, rng)
    found = recover(durable.killed().below("journal"), Positions(), MACHINE_ID, segment_bytes=SEGMENT_BYTES)
    for lsn, record in enumerate(list(found.records())[: world.model.promised_lsn], 1):
        for at in (-20, rng.randrange(record.length)):
            storage = durable.killed()
            with closing(
                storage.open(f"journal/{segment_name(record.position >> POSITION_SHIFT)}", write=True)
            ) as file:
                place = (record.position & POSITION_MASK) + at
                file.write_at([bytes([file.read_at(1, place)[0] ^ 0x10])], place)
            before = storage.contents()
            with pytest.raises(IntegrityError):
                recover(storage.below("journal"), Positions(), MACHINE_ID, segment_bytes=SEGMENT_BYTES)
            assert storage.contents() == before, f"LSN {lsn} is damaged, and recovery changed something"
            check_found_by_index_or_reader(storage, lsn)
            notes.count()
            notes.fired(DAMAGED)


def check_found_by_index_or_reader(storage: CrashStorage, lsn: int) -> None:
    """Who recovers by indexes does not look at every record: then those who read it for use must."""
    journal = storage.below("journal")
    with pytest.raises(IntegrityError, match=f"LSN {lsn} is missing or damaged"):
        found = recover(journal, Positions(), MACHINE_ID, segment_bytes=SEGMENT_BYTES, by_indexes=True)
        with closing(JournalReader(journal, MACHINE_ID)) as reader:
            cursor = Positions().applied
            while cursor.lsn < found.last_lsn:
                cursor = reader.read(cursor, found.last_lsn, 1).cursor


# ---- host and store ----


def play_pair(scenario: PairScenario, scratch: Path, rng: random.Random, notes: Notes) -> None:
    store = VaultWorld.new(scratch / "vault", rng.getrandbits(30))
    pair = ReplicatedWorld.new(store, rng)
    looks: list[PairLook] = []
    try:
        pair.look_at_everything(looks)
        scenario(pair)
        pair.look_away()
        pair.go_on()
        seen: Seen = set()
        for number, look in enumerate(looks):
            for way, start in starts_of(look, rng, seen):
                again: list[PairLook] | None = [] if rng.random() < AGAIN_SHARE else None
                with crashed(number, look, way):
                    check_pair(store, look, start, rng, again)
                note(notes, way)
                if again is None:
                    continue
                with crashed_again(number, way, again, rng, notes) as (second, fate):
                    both = PairStart(second.host.killed(), second.store.killed(), second.catalogs[-1])
                    if second.side == "host":
                        both = both._replace(host=second.host.crash(fate, rng))
                    else:
                        both = both._replace(store=second.store.crash(fate, rng))
                    check_pair(store, second, both, rng)
    finally:
        pair.close()


def check_pair(
    store: VaultWorld, look: PairLook, start: PairStart, rng: random.Random, again: list[PairLook] | None = None
) -> None:
    """Both start, hold what was promised, find the same a second time, and go on to the end."""
    check_recovers_twice(start.host)
    pair = ReplicatedWorld.next_start(look, start.host, store.next_start(start.store, start.catalog), rng)
    try:
        if again is not None:
            pair.look_at_everything(again)
        pair.check_found()
        check_starts_twice(pair.store, start.catalog, rng)
        pair.go_on()
    finally:
        pair.close()


# ---- the store's objects and catalog ----


def play_ingest(scratch: Path, rng: random.Random, notes: Notes) -> None:
    world = new_world(scratch, rng)
    try:
        looks = world.look_at_everything()
        assert world.ingest(rng) == []
        world.look_away()
        seen: Seen = set()
        for number, look in enumerate(looks):
            for way, found in distinct_starts(look.storage, rng, seen, (look.acknowledged, id(look.catalogs[-1]))):
                again: list[StoreLook] = []
                which, catalog = some_catalog(look, rng)
                with crashed(number, look, f"{way}, catalog {which}"):
                    check_store_start(world, look, found, catalog, rng, again)
                note(notes, way)
                with crashed_again(number, way, again, rng, notes) as (second, fate):
                    catalog = some_catalog(second, rng)[1]
                    check_store_start(world, second, second.storage.crash(fate, rng), catalog, rng)
    finally:
        world.vault.close()


def some_catalog(look: StoreLook, rng: random.Random) -> tuple[int, bytes | None]:
    """Its number and the catalog that is found: mostly the newest, now and then an older one, or none (-1)."""
    newest = len(look.catalogs) - 1
    which = rng.choice((newest, newest, rng.randrange(newest + 1), -1)) if look.catalogs else -1
    return which, look.catalogs[which] if which >= 0 else None


def play_rebuild(scratch: Path, rng: random.Random, notes: Notes) -> None:
    world = new_rebuild_world(scratch, rng)
    try:
        looks: list[RebuildLook] = []
        rebuild(world, put_catalog(world.catalogs[-1]), world.storage.killed(), looks)
        seen: Seen = set()
        for number, look in enumerate(looks):
            for way, files in distinct_starts(look.files, rng, seen, (number if look.objects.is_settled() else 0,)):
                again: list[RebuildLook] = []
                with crashed(number, look, way):
                    check_rebuilt(world, look, files, look.objects.crash(rng.choice(FATES), rng), again)
                note(notes, way)
                with crashed_again(number, way, again, rng, notes) as (second, fate):
                    check_rebuilt(world, second, second.files.crash(fate, rng), second.objects.crash(fate, rng))
    finally:
        world.vault.close()


# ---- small files ----


def play_edits(scratch: Path, rng: random.Random, notes: Notes) -> None:
    looks: list[EditLook] = []
    edit_machine(scratch / "host", CrashStorage(), rng, looks)
    seen: Seen = set()
    for number, look in enumerate(looks):
        for way, found in distinct_starts(look.storage, rng, seen, look.allowed):
            again: list[EditLook] = []
            with crashed(number, look, way):
                check_edited(scratch / "host", found, look, rng, again)
            note(notes, way)
            with crashed_again(number, way, again, rng, notes) as (second, fate):
                check_edited(scratch / "host", second.storage.crash(fate, rng), second, rng)


def play_enrolment(scratch: Path, rng: random.Random, notes: Notes) -> None:
    make_vault(scratch / "vault")
    looks: list[EnrolLook] = []
    EnrolWorld(scratch, CrashStorage(), CrashStorage(), None).enrol_twice(looks)
    seen: Seen = set()
    for number, look in enumerate(looks):
        at_work = look.host if look.side == "host" else look.store
        promised = (look.side, id(look.catalog), len(look.replies), look.done)
        for way, one in distinct_starts(at_work, rng, seen, promised):
            host, store = (one, look.store.killed()) if look.side == "host" else (look.host.killed(), one)
            again: list[EnrolLook] = []
            with crashed(number, look, f"{look.side} {way}"):
                EnrolWorld(scratch, host, store, look.catalog).check(look, again)
            note(notes, way)
            with crashed_again(number, way, again, rng, notes) as (second, fate):
                host, store = second.host.crash(fate, rng), second.store.crash(fate, rng)
                EnrolWorld(scratch, host, store, second.catalog).check(second)


HOSTS: list[tuple[str, Play]] = [(each.__name__, partial(play_host, each)) for each in SCENARIOS]
PAIRS: list[tuple[str, Play]] = [(each.__name__, partial(play_pair, each)) for each in PAIR_SCENARIOS]
SMALL: list[tuple[str, Play]] = [
    ("ingest", play_ingest),
    ("rebuild", play_rebuild),
    ("damaged_records", play_damage),
    ("enrolment", play_enrolment),
    ("disks_added_and_removed", play_edits),
]
PLAYS: list[tuple[str, Play]] = []
for plays in zip_longest(HOSTS, SMALL, PAIRS):
    known = [play for play in plays if play is not None]
    PLAYS += reversed(known) if len(PLAYS) % 2 else known  # each kind in turn goes to each of two processes
FAULTS = ("killed", *(fate.value for fate in Fate), "both", IN_RECOVERY, DAMAGED)
"""And each scenario by its name: a run that did not come to one is none."""


def cases(context: Context) -> Iterator[Case]:
    for number in count():
        for name, play in PLAYS:
            label = f"{name} {number}"
            yield Case(label, partial(_play, context, label, name, play))


def _play(context: Context, label: str, name: str, play: Play, notes: Notes) -> None:
    scratch = context.scratch / label.replace(" ", "-")
    scratch.mkdir()
    before = notes.cases
    play(scratch, context.rng(label), notes)
    assert notes.cases > before, "nothing was tried"
    notes.fired(f"scenario {name}")


LEVEL = Level(
    name="crash",
    unit="crash points",
    submission=13_500,
    release=250_000,
    faults=(*FAULTS, *(f"scenario {name}" for name, _ in PLAYS)),
    cases=cases,
    round=len(PLAYS),
    is_divisible=True,
)
