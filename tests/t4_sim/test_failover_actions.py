"""What may be asked of a failover in which state, and what it leads to, on a real vault; no machine is started."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asrfs.errors import RefusedError, TemporaryError
from asrfs.model.clock import Clock
from asrfs.model.quantities import NS_PER_SECOND
from asrfs.protocol.messages import HandedOver
from asrfs.storage.system_clock import SystemClock
from replica_store.failover import actions, handing_over, undoing
from replica_store.failover.actions import Failovers
from replica_store.failover.preparation import Stopwatch
from replica_store.failover.wanted import Wanted
from replica_store.vault.enrolment import put_description
from replica_store.vault.handovers import note_answer
from replica_store.vault.operations import Operation, change, operation, operations
from replica_store.vault.protection import protection_of
from replica_store.vault.rebuild import rebuild
from replica_store.vault.vault import Vault
from tests.fakes.filled_vault import fill_vault
from tests.fakes.memory_history import random_history

MACHINE = "web1"
LIMIT_S = 100.0
VERBS: dict[str, Callable[[Failovers, str], Operation]] = {
    "change-point": lambda failovers, id: failovers.change_point(id, "latest-processed"),
    "cancel": lambda failovers, id: failovers.cancel(id),
    "commit": lambda failovers, id: failovers.commit(id),
    "cleanup": lambda failovers, id: failovers.cleanup(id),
    "resume": lambda failovers, id: failovers.resume(id),
}
STATES = {
    "test": ("preparing", "serving", "cleaned"),
    "unplanned": ("preparing", "commit-pending", "committed", "returned", "cancelled"),
    "planned": ("preparing", "commit-pending", "committed", "returned", "cancelled"),
}
LEADS_TO = {
    ("test", "preparing", "cleanup"): "cleaned",
    ("test", "preparing", "resume"): "serving",
    ("test", "serving", "cleanup"): "cleaned",
    ("test", "serving", "resume"): "serving",
    ("test", "cleaned", "cleanup"): "cleaned",
    ("test", "cleaned", "resume"): "cleaned",
    ("unplanned", "preparing", "change-point"): "commit-pending",
    ("unplanned", "preparing", "cancel"): "cancelled",
    ("unplanned", "preparing", "resume"): "commit-pending",
    ("unplanned", "commit-pending", "change-point"): "commit-pending",
    ("unplanned", "commit-pending", "cancel"): "cancelled",
    ("unplanned", "commit-pending", "commit"): "committed",
    ("unplanned", "commit-pending", "resume"): "commit-pending",
    ("unplanned", "committed", "resume"): "committed",
    ("unplanned", "returned", "cleanup"): "cleaned",
    ("unplanned", "cancelled", "resume"): "cancelled",
}
"""Everything else is refused."""
LEADS_TO |= {("planned", state, verb): to for (kind, state, verb), to in LEADS_TO.items() if kind == "unplanned"}


class ShiftedClock:
    """The system's, moved on by hand."""

    def __init__(self) -> None:
        self._shift_s = 0.0
        self._clock = SystemClock()

    def advance(self, seconds: float) -> None:
        self._shift_s += seconds

    def time_ns(self) -> int:
        return self._clock.time_ns() + int(self._shift_s * NS_PER_SECOND)

    def monotonic(self) -> float:
        return self._clock.monotonic() + self._shift_s


class Recovery:
    """In the place of programs that are started and ended: what they were asked for, and whether they fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails = False
        self.there: set[str] = set()
        self.answer = HandedOver(id="", outcome="handed-over", lsn=1, chunks_compared=4)
        """What hosts answer, `lsn` being all that is here."""
        monkeypatch.setattr(actions, "prepare", self._prepare)
        monkeypatch.setattr(actions, "bring_back", self._bring_back)
        monkeypatch.setattr(undoing, "discard", lambda found: self.there.discard(found.id))
        monkeypatch.setattr(handing_over, "check_present", lambda root, machine, clock: None)
        monkeypatch.setattr(handing_over, "wait_answer", partial(self._wait_answer, handing_over.wait_answer))

    def _wait_answer(
        self, sound: Callable[[str, str, Clock], Operation], root: str, operation_id: str, clock: Clock
    ) -> Operation:
        with Vault.open(root) as vault:
            machine_id = vault.machine(MACHINE).id
            lsn = vault.received_lsn(machine_id) if self.answer.outcome == "handed-over" else 0
            answer = msgspec.structs.replace(self.answer, id=operation_id, lsn=lsn)
            note_answer(vault, machine_id, answer, clock.time_ns())
        return sound(root, operation_id, clock)

    def _bring_back(self, root: str, found: Operation) -> Operation:
        self.there.add(found.id)
        return found

    def _prepare(
        self, root: str, begun: Operation, disks: object, epoch: int, watch: Stopwatch, *, examined: bool
    ) -> Operation:
        with watch.step("serve"):
            if self.fails:
                raise TemporaryError("no program")
            self.there.add(begun.id)
        return msgspec.structs.replace(begun, steps=tuple(watch.steps), rto_s=watch.seconds)


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch) -> Recovery:
    return Recovery(monkeypatch)


@pytest.fixture
def clock() -> ShiftedClock:
    return ShiftedClock()


@pytest.fixture
def root(scratch: Path) -> str:
    history = random_history(7, records=20, disks={"root": 16 * 4096})
    history.marker(name="end")
    history.seal()
    fill_vault(scratch / "vault", history)
    with Vault.open(str(scratch / "vault")) as vault:
        put_description(vault, vault.machine(MACHINE))
    return str(scratch / "vault")


@pytest.fixture
def failovers(root: str, clock: ShiftedClock, recovery: Recovery) -> Failovers:
    return Failovers(root, clock)


def wanted(**more: Any) -> Wanted:
    return Wanted(machine=MACHINE, selector="latest", ttl_s=LIMIT_S, **more)


def begun(failovers: Failovers, root: str, kind: str, state: str) -> Operation:
    """A failover in a state."""
    found: Operation = getattr(failovers, kind)(wanted())
    if state == "preparing":
        return change(root, found.id, lambda vault, before: before.to("preparing", 0, "it died"))
    if state == "returned":
        committed = failovers.commit(found.id)
        return change(root, committed.id, lambda vault, before: before.to("returned", 0, "the machine came back"))
    ways = {"cleaned": failovers.cleanup, "cancelled": failovers.cancel, "committed": failovers.commit}
    return ways[state](found.id) if state in ways else found


def standing(root: str) -> str:
    with Vault.open(root) as vault:
        return str(protection_of(vault, vault.machine(MACHINE)))


@pytest.mark.parametrize(
    ("kind", "state", "verb"),
    [(kind, state, verb) for kind, states in STATES.items() for state, verb in product(states, VERBS)],
)
def test_every_verb_in_every_state(
    failovers: Failovers, recovery: Recovery, root: str, kind: str, state: str, verb: str
) -> None:
    found = begun(failovers, root, kind, state)
    before = standing(root)
    expected = LEADS_TO.get((kind, state, verb))
    if expected is None:
        with pytest.raises(RefusedError, match="is refused; allowed: ") as refused:
            VERBS[verb](failovers, found.id)
        assert refused.value.exit_code == 4
        with Vault.open(root) as vault:
            assert operation(vault.catalog, found.id) == found
        assert standing(root) == before
        return
    after = VERBS[verb](failovers, found.id)
    assert after.state == expected
    assert (after.id in recovery.there) == after.remains == (expected not in ("cleaned", "cancelled"))
    if kind == "test":
        assert standing(root) == before == "protected"
    else:
        states = {"commit-pending": "failed-over", "committed": "committed"}
        states |= {"cancelled": "protected", "cleaned": "protected"}
        assert standing(root) == states[expected]
    rebuild(root)
    with Vault.open(root) as vault:
        assert operation(vault.catalog, found.id) == after


def test_i6_a_commit_has_raised_the_epoch_before_it_is_one(root: str, clock: ShiftedClock, recovery: Recovery) -> None:
    """And once it has begun, nothing but a commit is possible, whatever dies."""

    class Died(Exception):
        pass

    seen: dict[str, tuple[int, str]] = {}

    def told(step: str) -> None:
        with Vault.open(root) as vault:
            if found := operations(vault.catalog):
                seen[step] = vault.machine(MACHINE).epoch, found[-1].state
        if step == "committed":
            raise Died

    found = Failovers(root, clock).unplanned(wanted())
    with pytest.raises(Died):
        Failovers(root, clock, told).commit(found.id)
    failovers = Failovers(root, clock)
    assert seen["epoch"] == (1, "commit-pending")
    assert seen["committed"] == (2, "commit-pending")
    for verb in ("cancel", "change-point"):
        with pytest.raises(RefusedError, match="has begun"):
            VERBS[verb](failovers, found.id)
    committed = failovers.resume(found.id)
    with Vault.open(root) as vault:
        assert (committed.state, committed.epoch) == ("committed", vault.machine(MACHINE).epoch)


def test_what_cannot_be_prepared_is_taken_back(failovers: Failovers, recovery: Recovery, root: str) -> None:
    recovery.fails = True
    for kind, state in (("test", "cleaned"), ("unplanned", "cancelled")):
        with pytest.raises(TemporaryError, match="no program"):
            getattr(failovers, kind)(wanted())
        with Vault.open(root) as vault:
            last = operations(vault.catalog)[-1]
        assert (last.state, last.remains, last.causes[-1].text) == (state, False, "it failed: no program")
    assert standing(root) == "protected" and recovery.there == set()


def test_a_point_that_cannot_be_prepared_leaves_the_failover_to_another_try(
    failovers: Failovers, recovery: Recovery, root: str
) -> None:
    found = failovers.unplanned(wanted())
    recovery.fails = True
    with pytest.raises(TemporaryError):
        failovers.change_point(found.id, "latest-processed")
    assert standing(root) == "failed-over"
    recovery.fails = False
    assert failovers.change_point(found.id, "latest").state == "commit-pending"


def test_a_machine_has_one_failover_and_any_number_of_tests(failovers: Failovers, root: str) -> None:
    tests = [failovers.test(wanted()) for _ in range(3)]
    found = failovers.unplanned(wanted())
    tests.append(failovers.test(wanted()))
    with pytest.raises(RefusedError, match="failed-over: unplanned-failover is refused; allowed: change-point, cancel"):
        failovers.unplanned(wanted())
    failovers.cancel(found.id)
    again = failovers.unplanned(wanted())
    with pytest.raises(RefusedError, match=f"failover {found.id[:12]} is cancelled: commit is refused"):
        failovers.commit(found.id)
    assert failovers.commit(again.id).state == "committed"
    with pytest.raises(RefusedError, match="committed: unplanned-failover is refused"):
        failovers.unplanned(wanted())
    assert {failovers.cleanup(each.id).state for each in tests} == {"cleaned"}


def test_directories_of_one_are_not_given_to_another(failovers: Failovers, scratch: Path) -> None:
    places = {"state": str(scratch / "s"), "mount": str(scratch / "m")}
    found = failovers.test(wanted(**places))
    for other in (
        {"state": str(scratch / "s")},
        {"mount": str(scratch / "s" / "below")},
        {"state": str(scratch / "m")},
    ):
        with pytest.raises(RefusedError, match=f"test failover {found.id[:12]}"):
            failovers.test(wanted(**other))
    failovers.cleanup(found.id)
    assert failovers.test(wanted(**places)).state == "serving"


def test_what_is_due_is_ended_and_nothing_else(failovers: Failovers, clock: ShiftedClock, recovery: Recovery) -> None:
    first = failovers.test(wanted())
    clock.advance(LIMIT_S / 2)
    second, earnest = failovers.test(wanted()), failovers.unplanned(wanted())
    assert not failovers.is_anything_due() and failovers.sweep() == []
    clock.advance(LIMIT_S / 2)
    assert failovers.is_anything_due()
    (ended,) = failovers.sweep()
    assert (ended.id, ended.state) == (first.id, "cleaned") and "time was up" in ended.causes[-1].text
    assert not failovers.is_anything_due()
    clock.advance(10 * LIMIT_S)
    assert [each.id for each in failovers.sweep()] == [second.id]
    assert recovery.there == {earnest.id}


def test_a_random_walk_never_leaves_the_table(failovers: Failovers, root: str, rng: random.Random) -> None:
    found = failovers.unplanned(wanted())
    for _ in range(40):
        with Vault.open(root) as vault:
            found = operation(vault.catalog, found.id)
        verb = rng.choice(sorted(VERBS.keys() - {"commit"} if rng.random() < 0.9 else VERBS))
        expected = LEADS_TO.get(("unplanned", found.state, verb))
        try:
            assert VERBS[verb](failovers, found.id).state == expected
        except RefusedError:
            assert expected is None, (found.state, verb)
        if found.state == "cancelled":
            found = failovers.unplanned(wanted())
