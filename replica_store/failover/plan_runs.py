"""Runs of plans in a vault: begun, carried on with after any death or pause, and told as a document.

    VAULT/failover/plans/ID/    run.jsonl: what has happened (`plan_journal.py`)      lock: held by who carries it out

A machine's failover bears the run's id, so a run that goes on finds what it had begun: it takes up what was half made,
makes anew what was taken back, and leaves alone what is ready.
"""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Callable
from contextlib import closing

from asrfs.errors import BadInputError, NotFoundError
from asrfs.model.clock import Clock
from asrfs.storage.directory import DirectoryStorage
from replica_store.failover.actions import Failovers
from replica_store.failover.places import DIRECTORY
from replica_store.failover.plan import Kind, Plan, PlannedMachine, selector_for
from replica_store.failover.plan_executor import carry_out
from replica_store.failover.plan_journal import Head, PlanJournal
from replica_store.failover.plan_run import Event
from replica_store.failover.report import verdict
from replica_store.failover.wanted import TTL_S, Wanted
from replica_store.vault.lock import VaultLock
from replica_store.vault.operations import ENDED, Operation, operations
from replica_store.vault.vault import Vault

_PLANS = "plans"
_JOURNAL = "run.jsonl"
_ID_CHARACTERS = 12

Report = Callable[[Event], None]


class PlanRuns:
    """The runs of the vault at `root`. `report`: called with each event once it is written down."""

    def __init__(self, root: str, clock: Clock, report: Report = lambda event: None) -> None:
        self._root = os.path.abspath(root)
        self._directory = os.path.join(self._root, DIRECTORY, _PLANS)
        self._clock = clock
        self._report = report

    # ---- carrying out -----------------------------------------------------------------------------------------

    def begin(
        self,
        plan: Plan,
        kind: Kind,
        *,
        accept_damage: bool = False,
        ttl_s: float = TTL_S,
        boots: bool = True,
    ) -> PlanJournal:
        """Carry a plan out as far as it goes; what has happened."""
        run_id = secrets.token_hex(16)
        directory = os.path.join(self._directory, run_id[:_ID_CHARACTERS])
        os.makedirs(directory, mode=0o700)
        for each in (self._root, os.path.dirname(self._directory), self._directory):
            DirectoryStorage(each).sync_directory("")
        head = Head(id=run_id, kind=kind, plan=plan, accept_damage=accept_damage, ttl_s=ttl_s, boots=boots)
        with _lock(directory), closing(PlanJournal.create(os.path.join(directory, _JOURNAL), head)) as journal:
            self._carry_out(journal)
        return journal

    def resume(self, text: str) -> PlanJournal:
        """Go on with a run that was interrupted, waits for a person, or failed. Raises RefusedError when it is done.

        What turns out now to have been interrupted, and must not be begun again unseen, is only said: a person has not
        decided yet.
        """
        directory = self._find(text)
        with _lock(directory), closing(PlanJournal.open(os.path.join(directory, _JOURNAL))) as journal:
            found = journal.run.interruptions(self._clock.time_ns())
            for event in found:
                journal.append(event)
            is_news = any(journal.run.standing[event.step].state == "failed" for event in found)
            if journal.run.state != "running" and not is_news:
                for event in journal.run.resumption(self._clock.time_ns()):
                    journal.append(event)
            self._carry_out(journal)
        return journal

    def _carry_out(self, journal: PlanJournal) -> None:
        head = journal.head
        carry_out(
            journal, lambda machine, seconds: self._bring_back(head, machine, seconds), self._clock, report=self._report
        )

    def _bring_back(self, head: Head, machine: PlannedMachine, seconds: float) -> str:
        """See `plan_executor.BringBack`."""
        failovers = Failovers(self._root, self._clock, seconds_max=seconds)
        found = next((each for each in reversed(self.operations(head.id)) if _is_of(each, machine)), None)
        if found is not None and found.state == "serving" and verdict(found) is not None:
            failovers.cleanup(found.id, "its plan tries it again")
            found = None
        if found is not None:
            found = failovers.resume(found.id)
        else:
            wanted = Wanted(
                machine=machine.name,
                selector=selector_for(head.plan, machine, head.kind),
                accept_damage=head.accept_damage,
                ttl_s=head.ttl_s,
                boots=head.boots,
                plan=head.id,
                handover_s=max(1, math.floor(seconds)),
            )
            verbs = {"test": failovers.test, "planned": failovers.planned, "failback": failovers.failback}
            found = verbs.get(head.kind, failovers.unplanned)(wanted)
        if (wrong := verdict(found)) is not None:
            raise wrong
        took = "" if found.rto_s is None else f", {found.rto_s:.2f} s after"
        return f"failover {found.id[:12]} is {found.state} at LSN {found.point.lsn}{took}"

    # ---- looking ----------------------------------------------------------------------------------------------

    def journals(self) -> list[PlanJournal]:
        """Of all runs, oldest first. One that died before it was written down never was."""
        names = sorted(os.listdir(self._directory)) if os.path.isdir(self._directory) else []
        paths = [os.path.join(self._directory, name, _JOURNAL) for name in names]
        return sorted((PlanJournal.open(path) for path in paths if os.path.exists(path)), key=_begun_ns)

    def journal(self, text: str) -> PlanJournal:
        """Of one run. Raises NotFoundError, BadInputError."""
        return PlanJournal.open(os.path.join(self._find(text), _JOURNAL))

    def operations(self, run_id: str) -> list[Operation]:
        """The failovers of a run, oldest first."""
        with Vault.open(self._root) as vault:
            return [each for each in operations(vault.catalog) if each.plan == run_id]

    def _find(self, text: str) -> str:
        """The directory of a run by its id or the beginning of it."""
        missing = NotFoundError(f"there is no run {text[:40]!r} of a plan: see `replica-store plan runs`")
        if not re.fullmatch(r"[0-9a-f]{4,32}", text):
            raise missing
        found = [each.head.id for each in self.journals() if each.head.id.startswith(text)]
        if not found:
            raise missing
        if len(found) > 1:
            raise BadInputError(f"{len(found)} runs have an id that begins with {text}: give more of it")
        return os.path.join(self._directory, found[0][:_ID_CHARACTERS])


def _lock(directory: str) -> VaultLock:
    return VaultLock(os.path.join(directory, "lock"), "being carried out", "wait until that has ended")


def _is_of(found: Operation, machine: PlannedMachine) -> bool:
    return found.machine == machine.name and found.state not in ENDED


def _begun_ns(journal: PlanJournal) -> tuple[int, str]:
    times = [event.time_ns for event in journal.events]
    return (min(times) if times else 0, journal.head.id)
