"""Plans that are carried out: random plans, outcomes and deaths. What must hold is checked at every event."""

from __future__ import annotations

import random
import secrets
import threading
from collections import Counter
from pathlib import Path

import pytest

from asrfs.errors import AsrfsError, IntegrityError, NotFoundError, RefusedError
from replica_store.failover.plan import KINDS, Group, Pause, Plan, PlannedMachine, Script, check_plan, read_plan
from replica_store.failover.plan_executor import carry_out
from replica_store.failover.plan_journal import Head, PlanJournal
from replica_store.failover.plan_run import Event, PlanRun


class Died(BaseException):
    """What carried it out is gone, as by SIGKILL."""


class MemoryJournal:
    """Keeps events as a file would, and dies before or after one is durable."""

    def __init__(self, plan: Plan, kind: str, dies_at: int | None = None) -> None:
        self.plan, self.kind = plan, kind
        self.events: list[Event] = []
        self.dies_at = dies_at
        self.run_id = secrets.token_hex(16)

    @property
    def run(self) -> PlanRun:
        return PlanRun.replay(self.plan, self.kind, self.events)  # type: ignore[arg-type]

    def append(self, event: Event) -> None:
        if self.dies_at is not None and len(self.events) >= self.dies_at // 2:
            if self.dies_at % 2:
                self.events.append(event)
            self.dies_at = None
            raise Died
        self.events.append(event)


class TickingClock:
    def __init__(self) -> None:
        self._now = 0
        self._lock = threading.Lock()

    def time_ns(self) -> int:
        with self._lock:
            self._now += 1_000_000
            return self._now

    def monotonic(self) -> float:
        return self.time_ns() / 1e9


def random_plan(rng: random.Random) -> Plan:
    names = [f"g{n}" for n in range(rng.randint(1, 6))]

    def when() -> tuple[str, ...]:
        return KINDS if rng.random() < 0.8 else tuple(rng.sample(KINDS, rng.randint(1, 3)))

    def scripts(group: str) -> tuple[Script, ...]:
        return tuple(
            Script(
                name=f"{group}-{n}",
                command=("/bin/true",),
                critical=rng.random() < 0.6,
                repeatable=rng.random() < 0.7,
                when=when(),  # type: ignore[arg-type]
            )
            for n in range(rng.choice((0, 0, 1, 2)))
        )

    groups = []
    for at, name in enumerate(names):
        after = None if rng.random() < 0.4 else tuple(rng.sample(names[:at], rng.randint(0, at)))
        certain = names[at - 1 : at] if after is None and at else list(after or ())
        groups.append(
            Group(
                name=name,
                after=after,
                unless_failed=tuple(rng.sample(certain, min(len(certain), rng.choice((0, 0, 1))))),
                machines=tuple(
                    PlannedMachine(name=f"{name}-m{n}", critical=rng.random() < 0.6, when=when())  # type: ignore[arg-type]
                    for n in range(rng.randint(0 if at else 1, 3))
                ),
                pre=scripts(name),
                post=scripts(name),
                pause_before=Pause(text="look") if rng.random() < 0.15 else None,
                pause_after=Pause(text="look") if rng.random() < 0.15 else None,
                when=when(),  # type: ignore[arg-type]
            )
        )
    plan = Plan(name="p", groups=tuple(groups))
    check_plan(plan)
    return plan


def check(run: PlanRun, events: list[Event]) -> None:
    """Order, criticality and repetition, said again without the code under test."""
    before = run.plan.predecessors()
    step_of = {step.id: step for step in run.steps}
    order = [step.id for step in run.steps]
    ended: dict[str, str] = {}
    running: set[str] = set()
    begins: Counter[str] = Counter()
    for event in events:
        step = step_of[event.step]
        if event.what in ("begun", "skipped"):
            assert not [s for s, what in ended.items() if what == "failed" and step_of[s].is_critical], "it had stopped"
            for other in run.steps:
                if other.group in before[step.group]:
                    assert other.id in ended, f"{step.id} before {other.id}"
                same_part = other.part == step.part == "machine"
                if other.group == step.group and order.index(other.id) < order.index(step.id) and not same_part:
                    assert other.id in ended, f"{step.id} before {other.id}"
        if event.what == "begun":
            assert step.is_meant
            begins[step.id] += 1
            assert step.is_repeatable or begins[step.id] == 1, "it was done twice"
            running.add(step.id)
        elif event.what == "retried":
            assert ended.pop(step.id) == "failed"
            begins[step.id] = 0
        else:
            if event.what != "skipped":
                running.remove(step.id)
            if event.what != "interrupted":
                ended[step.id] = event.what
            elif not step.is_repeatable:
                ended[step.id] = "failed"


class Site:
    """Does what is asked, and fails where chance says so."""

    def __init__(self, rng: random.Random, failures: float) -> None:
        self._rng = rng
        self._failures = failures
        self._lock = threading.Lock()

    def carry_out(self) -> str:
        with self._lock:
            if self._rng.random() < self._failures:
                raise AsrfsError("no luck")
        return "up"


def play(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """One random plan to its end; how often it died and how often a person resumed it."""
    plan, kind = random_plan(rng), rng.choice(KINDS)
    site, clock = Site(rng, rng.choice((0.0, 0.1, 0.3))), TickingClock()
    run_script = "replica_store.failover.plan_executor.run_script"
    monkeypatch.setattr(run_script, lambda script, variables, mark: site.carry_out())
    journal = MemoryJournal(plan, kind)
    deaths = resumptions = 0
    while True:
        journal.dies_at = rng.randint(0, 12) + 2 * len(journal.events) if deaths < 5 else None
        try:
            run = carry_out(journal, lambda machine, seconds_max: site.carry_out(), clock)
        except Died:
            deaths += 1
            check(journal.run, journal.events)
            continue
        journal.dies_at = None
        check(run, journal.events)
        assert run.standing == journal.run.standing and not run.running()
        if run.state == "done" or resumptions > 20:
            return deaths, resumptions
        assert run.state in ("paused", "failed")
        resumptions += 1
        for event in run.resumption(clock.time_ns()):
            journal.append(event)


@pytest.mark.parametrize("part", range(3))
def test_any_plan_through_any_deaths_ends_in_a_stated_place(
    rng: random.Random, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    played = [play(rng, monkeypatch) for _ in range(40)]
    assert sum(deaths for deaths, _ in played) > 40 and sum(resumptions for _, resumptions in played) > 10


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    run = PlanRun.new(read_plan(EVERYTHING, "f"), "test")
    first, later = "a/pause_before/pause", "a/pre/one"
    for step, what, words in (
        ("no/such/step", "begun", "no step"),
        (later, "begun", "not due"),
        (later, "skipped", "not due"),
        (first, "done", "is waiting: done is refused; allowed: begun, skipped"),
        (first, "retried", "refused"),
    ):
        with pytest.raises(RefusedError, match=words):
            run.after(Event(step=step, what=what, time_ns=1))  # type: ignore[arg-type]
    assert run.standing == PlanRun.new(run.plan, "test").standing
    with pytest.raises(RefusedError, match="nothing to resume"):
        run.resumption(1)


EVERYTHING = """
name = "p"
[[groups]]
name = "a"
pause_before = { text = "ready?" }
pre = [{ name = "one", command = ["/bin/sh", "-c", "echo $ASRFS_STEP $ASRFS_KIND $ASRFS_GROUP $ASRFS_PLAN"] }]
machines = [{ name = "m1" }, { name = "m2", critical = false }, { name = "m3", when = ["planned"] }]
[[groups]]
name = "b"
unless_failed = ["a"]
machines = [{ name = "m4" }]
[[groups]]
name = "c"
machines = [{ name = "m5" }]
post = [{ name = "slow", command = ["/bin/sleep", "60"], timeout = "200ms", critical = false }]
"""


def standing(run: PlanRun) -> dict[str, str]:
    return {step: each.state for step, each in run.standing.items()}


def test_pauses_scripts_conditions_and_timeouts_in_a_file(scratch: Path) -> None:
    plan, path = read_plan(EVERYTHING, "f"), str(scratch / "run.jsonl")
    journal = PlanJournal.create(path, Head(id="1", kind="test", plan=plan))
    together = threading.Barrier(2)

    def bring_back(machine: PlannedMachine, seconds_max: float) -> str:
        assert seconds_max == 5400
        if machine.name in ("m1", "m2"):
            together.wait(10)  # passes only if both are under way at once
        if machine.name == "m2":
            raise AsrfsError("it has no luck")
        return f"{machine.name} is up"

    clock = TickingClock()
    assert carry_out(journal, bring_back, clock).state == "paused"
    journal.close()
    journal = PlanJournal.open(path)
    assert [step.id for step in journal.run.pauses()] == ["a/pause_before/pause"]
    for event in journal.run.resumption(clock.time_ns()):
        journal.append(event)
    run = carry_out(journal, bring_back, clock)
    assert run.state == "done"
    assert standing(run) == {
        "a/pause_before/pause": "done",
        "a/pre/one": "done",
        "a/machine/m1": "done",
        "a/machine/m2": "failed",
        "a/machine/m3": "skipped",
        "b/machine/m4": "skipped",
        "c/machine/m5": "done",
        "c/post/slow": "failed",
    }
    assert run.standing["a/pre/one"].text == "a/pre/one test a p"
    assert run.standing["a/machine/m2"].text == "it has no luck"
    assert "within 200ms" in run.standing["c/post/slow"].text
    assert all(each.seconds > 0 for each in run.standing.values() if each.state in ("done", "failed"))
    journal.close()
    assert PlanJournal.open(path).run.standing == run.standing


def test_a_journal_that_was_cut_or_changed(scratch: Path) -> None:
    plan, path = read_plan(EVERYTHING, "f"), scratch / "run.jsonl"
    journal = PlanJournal.create(str(path), Head(id="1", kind="test", plan=plan))
    journal.append(Event(step="a/pause_before/pause", what="begun", time_ns=5))
    journal.close()
    whole = path.read_bytes()
    with pytest.raises(RefusedError, match="already"):
        PlanJournal.create(str(path), Head(id="1", kind="test", plan=plan))
    path.write_bytes(whole + b'{"step":"a/pause_bef')
    cut = PlanJournal.open(str(path))
    assert standing(cut.run)["a/pause_before/pause"] == "begun"
    cut.append(Event(step="a/pause_before/pause", what="done", time_ns=9))
    cut.close()
    assert standing(PlanJournal.open(str(path)).run)["a/pause_before/pause"] == "done"
    for wrong in (
        whole + whole.splitlines(keepends=True)[1],
        whole + b'{"step":"c/machine/m5","what":"begun","time_ns":7}\n',
        b"",
        whole.replace(b'"test"', b'"tset"', 1),
    ):
        path.write_bytes(wrong)
        with pytest.raises(IntegrityError):
            PlanJournal.open(str(path))
    with pytest.raises(NotFoundError):
        PlanJournal.open(str(scratch / "none"))


def test_what_stopped_a_plan_lets_the_rest_end_and_is_tried_again(scratch: Path) -> None:
    text = (
        'name = "p"\n[[groups]]\nname = "a"\nmachines = [{ name = "m1" }, { name = "m2" }]\n'
        '[[groups]]\nname = "b"\nmachines = [{ name = "m3" }]\n'
    )
    journal, failed, is_broken = MemoryJournal(read_plan(text, "f"), "planned"), threading.Event(), True

    def bring_back(machine: PlannedMachine, seconds_max: float) -> str:
        if machine.name == "m1" and is_broken:
            failed.set()
            raise AsrfsError("broken")
        failed.wait(10)
        return ""

    run = carry_out(journal, bring_back, TickingClock())
    assert run.state == "failed" and standing(run) == {
        "a/machine/m1": "failed", "a/machine/m2": "done", "b/machine/m3": "waiting",
    }  # fmt: skip
    is_broken = False
    for event in run.resumption(1 << 40):
        journal.append(event)
    assert carry_out(journal, bring_back, TickingClock()).state == "done"
