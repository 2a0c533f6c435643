"""Carrying out a plan: what may be begun is written down and begun, each in a thread, until nothing more can be.

It ends when all is done, when something critical has failed and the rest has ended, or when only a person can go on.
Called again, also after a SIGKILL, it goes on from what is written down. Nothing is decided here: `plan_run.py` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from asrfs.errors import AsrfsError
from asrfs.model.clock import Clock
from asrfs.model.quantities import parse_duration
from replica_store.failover.plan import Pause, PlannedMachine, Script
from replica_store.failover.plan_run import Event, PlanRun, Step
from replica_store.failover.plan_script import run_script

SIDE_BY_SIDE_MAX = 64
_TEXT_CHARACTERS_MAX = 300

BringBack = Callable[[PlannedMachine, float], str]
"""Brings one machine back within so many seconds; what is to be said of it. Idempotent: called again for a machine that
was half brought back it goes on. Raises AsrfsError."""


class Journal(Protocol):
    """See `plan_journal.PlanJournal`."""

    @property
    def run_id(self) -> str: ...

    @property
    def run(self) -> PlanRun: ...

    def append(self, event: Event) -> None: ...


def carry_out(
    journal: Journal,
    bring_back: BringBack,
    clock: Clock,
    report: Callable[[Event], None] = lambda event: None,
) -> PlanRun:
    """Go on until nothing more can be begun. Scripts have our environment, and are told what they are for.

    Raises OSError when what happens cannot be written down: nothing more is begun then.
    """
    run = journal.run
    working: dict[Future[str], Step] = {}

    def note(event: Event) -> None:
        nonlocal run
        following = run.after(event)
        journal.append(event)
        run = following
        report(event)

    for event in run.interruptions(clock.time_ns()):
        note(event)
    with ThreadPoolExecutor(SIDE_BY_SIDE_MAX, thread_name_prefix="plan") as pool:
        while True:
            while due := [
                (s, what) for s, what in run.next_steps() if len(working) < SIDE_BY_SIDE_MAX or what == "skip"
            ]:
                step, what = due[0]
                note(Event(step=step.id, what="begun" if what == "begin" else "skipped", time_ns=clock.time_ns()))
                if what == "begin" and not isinstance(step.item, Pause):
                    working[pool.submit(_do, journal.run_id, run, step, bring_back)] = step
            if not working:
                return run
            ended, _ = wait(working, return_when=FIRST_COMPLETED)
            for future in ended:
                note(_ended(working.pop(future), future, clock))


def _ended(step: Step, future: Future[str], clock: Clock) -> Event:
    try:
        text = future.result()
    except AsrfsError as error:
        return Event(step=step.id, what="failed", time_ns=clock.time_ns(), text=str(error)[:_TEXT_CHARACTERS_MAX])
    except Exception as error:  # a fault of ours in one step is that step's failure
        text = f"this is a fault of the program: {error!r}"[:_TEXT_CHARACTERS_MAX]
        return Event(step=step.id, what="failed", time_ns=clock.time_ns(), text=text)
    return Event(step=step.id, what="done", time_ns=clock.time_ns(), text=text[:_TEXT_CHARACTERS_MAX])


def _do(run_id: str, run: PlanRun, step: Step, bring_back: BringBack) -> str:
    item = step.item
    if isinstance(item, PlannedMachine):
        return bring_back(item, parse_duration(item.timeout))
    assert isinstance(item, Script)
    told = {"ASRFS_PLAN": run.plan.name, "ASRFS_KIND": run.kind, "ASRFS_GROUP": step.group, "ASRFS_STEP": step.id}
    return run_script(item, os.environ | told, f"{run_id}/{step.id}")
