"""PURE: a plan that is being carried out, as a state machine: events in, what may be begun next out.

    event       waiting → begun → ended well | ended badly | interrupted
                waiting → skipped;  a pause: waiting → begun → ended well, when a person resumes it

Every event is written down before its consequence is acted on. `replay` makes the same state of the same events, so a
run goes on after a SIGKILL: what was begun and has no end is `interrupted`, and is begun again where that does no harm.
An event that cannot be is refused and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from asrfs.errors import RefusedError
from replica_store.failover.plan import Group, Kind, Pause, Plan, PlannedMachine, Script

StepState = Literal["waiting", "begun", "done", "failed", "skipped"]
What = Literal["begun", "done", "failed", "skipped", "interrupted", "retried"]
RunState = Literal["running", "paused", "stopping", "failed", "done"]

_ENDED = ("done", "failed", "skipped")
INTERRUPTED = "it was interrupted, and may have been done: see to it, then resume"

ALLOWED: dict[StepState, dict[What, StepState]] = {
    "waiting": {"begun": "begun", "skipped": "skipped"},
    "begun": {"done": "done", "failed": "failed", "interrupted": "waiting"},
    "failed": {"retried": "waiting"},
    "done": {},
    "skipped": {},
}
"""The table: in which state of a step which event may come, and what it becomes."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to a step, when (nanoseconds since 1970), and in words."""

    step: str
    what: What
    time_ns: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do: a script, a machine or a pause. `id`: GROUP/PART/NAME."""

    id: str
    group: str
    part: Literal["pause_before", "pre", "machine", "post", "pause_after"]
    item: Script | PlannedMachine | Pause
    is_meant: bool

    @property
    def is_critical(self) -> bool:
        return isinstance(self.item, Pause) or self.item.critical

    @property
    def is_repeatable(self) -> bool:
        """Whether it may be begun again when it was interrupted: bringing a machine back goes on where it was."""
        return not isinstance(self.item, Script) or self.item.repeatable


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a step is. `begun_ns` is of its last begin, 0 for none."""

    state: StepState = "waiting"
    begun_ns: int = 0
    seconds: float = 0.0
    text: str = ""


@dataclass(frozen=True, slots=True)
class PlanRun:
    """A plan and what has happened. Immutable: `after` gives the next one."""

    plan: Plan
    kind: Kind
    steps: tuple[Step, ...]
    standing: dict[str, Standing]

    @classmethod
    def new(cls, plan: Plan, kind: Kind) -> PlanRun:
        steps = tuple(step for group in plan.groups for step in _steps_of(group, kind))
        return cls(plan, kind, steps, {step.id: Standing() for step in steps})

    @classmethod
    def replay(cls, plan: Plan, kind: Kind, events: Iterable[Event]) -> PlanRun:
        """Raises RefusedError for events that cannot be of this plan."""
        run = cls.new(plan, kind)
        for event in events:
            run = run.after(event)
        return run

    # ---- what is ----------------------------------------------------------------------------------------------------

    def step(self, step_id: str) -> Step:
        """Raises RefusedError."""
        for step in self.steps:
            if step.id == step_id:
                return step
        raise RefusedError(f"plan {self.plan.name} has no step {step_id[:200]!r}")

    @property
    def state(self) -> RunState:
        """Of the whole: `stopping` while something critical has failed and other steps still run."""
        is_busy = any(self._state(step) == "begun" and not isinstance(step.item, Pause) for step in self.steps)
        if self._has_stopped():
            return "stopping" if is_busy else "failed"
        if all(self._state(step) in _ENDED for step in self.steps):
            return "done"
        if not is_busy and not self._ready() and self.pauses():
            return "paused"
        return "running"

    def pauses(self) -> list[Step]:
        """Those that wait for a person."""
        return [step for step in self.steps if isinstance(step.item, Pause) and self._state(step) == "begun"]

    def running(self) -> list[Step]:
        """Scripts and machines that were begun and have not ended."""
        return [s for s in self.steps if self._state(s) == "begun" and not isinstance(s.item, Pause)]

    def failed_groups(self) -> set[str]:
        return {step.group for step in self.steps if self._state(step) == "failed"}

    # ---- what comes next --------------------------------------------------------------------------------------------

    def next_steps(self) -> list[tuple[Step, Literal["begin", "skip"]]]:
        """What may be begun, or is to be passed over, now; all at once. None while something critical has failed."""
        if self._has_stopped():
            return []
        return self._ready()

    def after(self, event: Event) -> PlanRun:
        """The run once the event has happened. Raises RefusedError where it cannot."""
        step = self.step(event.step)
        was = self.standing[step.id]
        becomes = ALLOWED[was.state].get(event.what)
        if becomes is None:
            allowed = ", ".join(ALLOWED[was.state]) or "nothing"
            raise RefusedError(f"step {step.id} is {was.state}: {event.what} is refused; allowed: {allowed}")
        if event.what in ("begun", "skipped") and step not in [each for each, _ in self.next_steps()]:
            raise RefusedError(f"step {step.id} is not due: {event.what} is refused")
        if event.what == "interrupted" and not step.is_repeatable:
            becomes = "failed"
        begun_ns = event.time_ns if becomes == "begun" else was.begun_ns
        seconds = max(0.0, (event.time_ns - was.begun_ns) / 1e9) if event.what in ("done", "failed") else 0.0
        text = event.text or (INTERRUPTED if event.what == "interrupted" and becomes == "failed" else "")
        return replace(self, standing=self.standing | {step.id: Standing(becomes, begun_ns, seconds, text)})

    def interruptions(self, time_ns: int) -> list[Event]:
        """What must be written down when whoever carried it out has died: nobody is at work on what was begun."""
        return [Event(step=step.id, what="interrupted", time_ns=time_ns) for step in self.running()]

    def resumption(self, time_ns: int) -> list[Event]:
        """What a person's `plan resume` means: pauses end, and what stopped the plan is tried again.

        Raises RefusedError where there is nothing to resume.
        """
        if self.state in ("running", "stopping", "done"):
            raise RefusedError(f"plan {self.plan.name} is {self.state}: there is nothing to resume")
        stopped = [s for s in self.steps if self._state(s) == "failed" and s.is_critical]
        if stopped:
            return [Event(step=step.id, what="retried", time_ns=time_ns) for step in stopped]
        return [Event(step=step.id, what="done", time_ns=time_ns) for step in self.pauses()]

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _state(self, step: Step) -> StepState:
        return self.standing[step.id].state

    def _has_stopped(self) -> bool:
        return any(self._state(step) == "failed" and step.is_critical for step in self.steps)

    def _ready(self) -> list[tuple[Step, Literal["begin", "skip"]]]:
        found: list[tuple[Step, Literal["begin", "skip"]]] = []
        before, of_group = self.plan.predecessors(), self._by_group()
        ended, failed = self._ended_groups(before, of_group), self.failed_groups()
        for group in self.plan.groups:
            if not ended.issuperset(before[group.name]):
                continue
            is_void = any(other in failed for other in group.unless_failed)
            for step in _first_not_ended(of_group[group.name], self.standing):
                if self._state(step) == "waiting":
                    found.append((step, "begin" if step.is_meant and not is_void else "skip"))
        return found

    def _by_group(self) -> dict[str, list[Step]]:
        found: dict[str, list[Step]] = {group.name: [] for group in self.plan.groups}
        for step in self.steps:
            found[step.group].append(step)
        return found

    def _ended_groups(self, before: dict[str, tuple[str, ...]], of_group: dict[str, list[Step]]) -> set[str]:
        """Groups whose steps have ended, as those of all before them: one without steps lets nobody through early."""
        own = {name for name, steps in of_group.items() if all(self._state(step) in _ENDED for step in steps)}
        ended: set[str] = set()
        while more := {name for name in own - ended if ended.issuperset(before[name])}:
            ended |= more
        return ended


def _first_not_ended(steps: Sequence[Step], standing: dict[str, Standing]) -> list[Step]:
    """The steps of a group that are due: one script or pause after the other, machines all at once."""
    for at, step in enumerate(steps):
        if standing[step.id].state not in _ENDED:
            if step.part != "machine":
                return [step]
            return [each for each in steps[at:] if each.part == "machine" and standing[each.id].state not in _ENDED]
    return []


def _steps_of(group: Group, kind: Kind) -> list[Step]:
    is_group_meant = kind in group.when

    def step(part: Literal["pause_before", "pre", "machine", "post", "pause_after"], name: str, item: object) -> Step:
        assert isinstance(item, Script | PlannedMachine | Pause)
        return Step(f"{group.name}/{part}/{name}", group.name, part, item, is_group_meant and kind in item.when)

    steps = [step("pause_before", "pause", group.pause_before)] if group.pause_before else []
    steps += [step("pre", script.name, script) for script in group.pre]
    steps += [step("machine", machine.name, machine) for machine in group.machines]
    steps += [step("post", script.name, script) for script in group.post]
    steps += [step("pause_after", "pause", group.pause_after)] if group.pause_after else []
    return steps
