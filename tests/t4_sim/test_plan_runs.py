"""Runs of plans on a real vault: what they begin, take up again after a death, and say. No machine is started."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asrfs.errors import IntegrityError, NotFoundError, RefusedError, TemporaryError
from asrfs.model.clock import Clock
from asrfs.storage.system_clock import SystemClock
from replica_store.cli import main
from replica_store.failover import actions, handing_over, processes, undoing
from replica_store.failover.actions import Failovers
from replica_store.failover.plan import Plan, read_plan
from replica_store.failover.plan_journal import PlanJournal
from replica_store.failover.plan_run import INTERRUPTED
from replica_store.failover.plan_runs import PlanRuns
from replica_store.failover.preparation import Stopwatch
from replica_store.failover.report import plan_document, plan_verdict
from replica_store.failover.wanted import Wanted
from replica_store.vault.operations import Booted, Operation, change, operation, operations
from replica_store.vault.vault import Vault
from tests.fakes.filled_vault import fill_vault
from tests.fakes.memory_history import random_history

PLAN = """
name = "shop"
point = "latest"
[[groups]]
name = "databases"
machines = [{ name = "web1", timeout = "20s" }]
pause_after = { text = "Are the orders there?", when = ["unplanned"] }
post = [{ name = "said", command = ["/bin/true"] }]
"""


class Died(BaseException):
    """As a SIGKILL: nothing is tidied up after it."""


class Recovery:
    """In the place of programs that are started and ended. `effect` is called where the machine would be made ready."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.back: list[str] = []
        self.booted: Booted | None = None
        self.effect: Callable[[], object] = lambda: None
        monkeypatch.setattr(actions, "prepare", self._prepare)
        monkeypatch.setattr(actions, "bring_back", self._bring_back)
        monkeypatch.setattr(undoing, "discard", lambda found: None)

    def _prepare(
        self, root: str, begun: Operation, chosen: object, epoch: int, watch: Stopwatch, **_: Any
    ) -> Operation:
        with watch.step("serve"):
            self.effect()
        self.made.append(begun.id)
        return msgspec.structs.replace(begun, steps=tuple(watch.steps), rto_s=watch.seconds, booted=self.booted)

    def _bring_back(self, root: str, found: Operation) -> Operation:
        self.back.append(found.id)
        return msgspec.structs.replace(found, booted=self.booted)


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch) -> Recovery:
    return Recovery(monkeypatch)


@pytest.fixture
def root(scratch: Path) -> str:
    history = random_history(7, records=20, disks={"root": 16 * 4096})
    history.marker(name="end")
    history.seal()
    fill_vault(scratch / "vault", history)
    return str(scratch / "vault")


@pytest.fixture
def runs(root: str, recovery: Recovery) -> PlanRuns:
    return PlanRuns(root, SystemClock())


@pytest.fixture
def plan() -> Plan:
    return read_plan(PLAN, "here")


def found_in(root: str) -> list[Operation]:
    with Vault.open(root) as vault:
        return operations(vault.catalog)


def told(runs: PlanRuns, journal: PlanJournal) -> dict[str, Any]:
    document = plan_document(journal, runs.operations(journal.head.id))
    json.dumps(document)
    return document


def test_a_plan_is_tried(runs: PlanRuns, plan: Plan, root: str) -> None:
    journal = runs.begin(plan, "test", ttl_s=50.0)
    document = told(runs, journal)
    assert (document["state"], document["kind"], document["plan"]) == ("done", "test", "shop")
    assert [step["state"] for step in document["steps"]] == ["done", "done", "skipped"]
    (made,) = found_in(root)
    assert (made.plan, made.kind, made.state) == (journal.head.id, "test", "serving")
    assert made.expires_ns == made.begun_ns + 50 * 10**9
    assert [each["id"] for each in document["machines"]] == [made.id]
    assert document["rto_seconds"] >= 0 and plan_verdict(journal) is None
    with pytest.raises(RefusedError, match="done: there is nothing to resume"):
        runs.resume(journal.head.id)
    assert told(runs, runs.journal(journal.head.id[:6])) == document


def test_a_plan_waits_for_a_person(runs: PlanRuns, plan: Plan, recovery: Recovery) -> None:
    journal = runs.begin(plan, "unplanned")
    document = told(runs, journal)
    assert (document["state"], document["waits_for"]) == ("paused", ["Are the orders there?"])
    assert document["machines"][0]["state"] == "commit-pending" and document["rto_seconds"] is None
    assert told(runs, runs.resume(journal.head.id))["state"] == "done"
    assert len(recovery.made) == 1


def test_what_died_in_the_middle_goes_on_where_it_was(
    runs: PlanRuns, plan: Plan, recovery: Recovery, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it was ready, and after that before it was written down: one failover, however often somebody dies."""

    def die() -> None:
        raise Died

    with monkeypatch.context() as patched:
        patched.setattr(Failovers, "_give_up", lambda *_: None)
        recovery.effect = die
        with pytest.raises(Died):
            runs.begin(plan, "unplanned")
        assert [each.state for each in found_in(root)] == ["preparing"]
        (journal,) = runs.journals()
        assert journal.run.state == "running"
        with pytest.raises(Died):
            runs.resume(journal.head.id)
    recovery.effect = lambda: None
    with monkeypatch.context() as patched:
        sound = Failovers.resume

        def ready_and_dead(self: Failovers, text: str) -> Operation:
            sound(self, text)
            raise Died

        patched.setattr(Failovers, "resume", ready_and_dead)
        with pytest.raises(Died):
            runs.resume(journal.head.id)
    assert told(runs, runs.resume(journal.head.id))["state"] == "paused"
    (made,) = found_in(root)
    assert made.state == "commit-pending" and recovery.made == [made.id] and recovery.back == [made.id]


def test_what_failed_is_tried_again(runs: PlanRuns, plan: Plan, recovery: Recovery, root: str) -> None:
    def fail() -> None:
        raise TemporaryError("no program")

    recovery.effect = fail
    journal = runs.begin(plan, "test")
    assert told(runs, journal)["state"] == "failed"
    said = plan_verdict(journal)
    assert isinstance(said, TemporaryError) and "no program" in str(said) and "plan resume" in str(said)
    recovery.effect = lambda: None
    recovery.booted = Booted(kind="qemu", failure="after 5m there was not 'login:' on the console")
    journal = runs.resume(journal.head.id)
    assert "login:" in str(plan_verdict(journal)), "its disks are there, and it does not run"
    recovery.booted = Booted(kind="qemu")
    assert told(runs, runs.resume(journal.head.id))["state"] == "done"
    assert [each.state for each in found_in(root)] == ["cleaned", "cleaned", "serving"]


def test_what_must_not_be_begun_again_unseen_is_said_before_it_is(runs: PlanRuns, scratch: Path) -> None:
    """The command died while such a script ran: a person, who may know of nothing, decides by asking twice."""
    ran = scratch / "ran"
    once = f'post = [{{ name = "said", command = ["/bin/touch", "{ran}"], repeatable = false }}]'
    plan = read_plan(PLAN.replace('post = [{ name = "said", command = ["/bin/true"] }]', once), "here")

    def die(*_: object, **__: object) -> None:
        raise Died

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("replica_store.failover.plan_executor.run_script", die)
        with pytest.raises(Died):
            runs.begin(plan, "unplanned")
    (died,) = runs.journals()
    document = told(runs, runs.resume(died.head.id))
    assert document["state"] == "failed" and not ran.exists()
    assert [step["text"] for step in document["steps"] if step["state"] == "failed"] == [INTERRUPTED]
    assert told(runs, runs.resume(died.head.id))["state"] == "paused" and ran.exists()


def test_a_machine_in_earnest_that_does_not_run_is_kept_and_started_again(
    runs: PlanRuns, plan: Plan, recovery: Recovery, root: str
) -> None:
    recovery.booted = Booted(kind="mount", failure="no such service")
    journal = runs.begin(plan, "unplanned")
    assert [each.state for each in found_in(root)] == ["commit-pending"]
    recovery.booted = Booted(kind="mount")
    assert told(runs, runs.resume(journal.head.id))["state"] == "paused"
    (made,) = found_in(root)
    assert made.booted == recovery.booted and recovery.back == [made.id]


def test_what_a_machine_may_take_is_kept(runs: PlanRuns, plan: Plan, recovery: Recovery, root: str) -> None:
    left: list[float] = []
    recovery.effect = lambda: left.append(processes._time_left(1e9))
    runs.begin(plan, "test")
    assert 0 < left[0] <= 20
    with processes.within(-1.0), pytest.raises(TemporaryError, match="its time is up"):
        processes.run("ab" * 16, ["true"])
    processes.run("ab" * 16, ["true"])


def test_a_handover_is_of_the_time_of_its_machine(
    runs: PlanRuns, root: str, recovery: Recovery, monkeypatch: pytest.MonkeyPatch, scratch: Path
) -> None:
    plan = read_plan(PLAN.replace('"20s"', '"1000s"'), "here")
    left: list[float] = []

    def handed_over(root: str, operation_id: str, clock: Clock) -> Operation:
        with Vault.open(root) as vault:
            found = operation(vault.catalog, operation_id)
            assert found.handover is not None and found.handover.seconds_max == 1000
            lsn = vault.received_lsn(found.machine_id)
        used_s.append(900.0)
        used = msgspec.structs.replace(found.handover, lsn=lsn)
        return change(root, operation_id, lambda vault, before: msgspec.structs.replace(before, handover=used))

    used_s: list[float] = []
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + sum(used_s))
    monkeypatch.setattr(handing_over, "check_present", lambda *_: None)
    monkeypatch.setattr(handing_over, "wait_answer", handed_over)
    recovery.effect = lambda: left.append(processes._time_left(1e9))
    runs.begin(plan, "planned")
    assert 0 < left[0] <= 100, "what the handover took is not there any more"
    file = scratch / "plan.toml"
    file.write_text(PLAN)
    assert run_cli(root, "plan", "create", str(file)) == 0
    assert run_cli(root, "failover", "planned", "shop", "--timeout", "5m") == 2, "each machine of a plan has its own"


def test_a_machine_that_somebody_else_brought_back_is_left_alone(
    runs: PlanRuns, plan: Plan, root: str, recovery: Recovery
) -> None:
    before = Failovers(root, SystemClock()).unplanned(Wanted(machine="web1", selector="latest"))
    journal = runs.begin(plan, "unplanned")
    assert "failed-over: unplanned-failover is refused" in str(plan_verdict(journal))
    assert found_in(root) == [before]


def test_bad_input(runs: PlanRuns, plan: Plan, root: str, capsys: pytest.CaptureFixture[str], scratch: Path) -> None:
    one, other = (runs.begin(plan, "test") for _ in range(2))
    for text in ("", "zz", "../../..", "f" * 32):
        with pytest.raises(NotFoundError):
            runs.resume(text)
    for journal in (one, other):
        path = Path(root, "failover/plans", journal.head.id[:12], "run.jsonl")
        assert path.exists()
    path.write_bytes(b"{}\n")
    with pytest.raises(IntegrityError):
        runs.journals()
    path.unlink()
    assert [each.head.id for each in runs.journals()] == [one.head.id]
    assert run_cli(root, "failover", "test", "nobody", "--point", "latest") == 3
    assert run_cli(root, "failover", "test", "web1") == 2
    file = scratch / "plan.toml"
    file.write_text(PLAN)
    assert run_cli(root, "plan", "create", str(file)) == 0
    assert run_cli(root, "failover", "test", "shop", "--state", str(scratch / "x")) == 2
    file.write_text(PLAN.replace('"shop"', '"web1"'))
    assert run_cli(root, "plan", "create", str(file)) == 4
    capsys.readouterr()
    assert run_cli(root, "failover", "test", "shop") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["state"] == "done" and run_cli(root, "plan", "runs", document["id"]) == 0
    assert run_cli(root, "plan", "resume", document["id"]) == 4
    capsys.readouterr()
    assert run_cli(root, "failover", "commit", document["id"]) == 4
    assert run_cli(root, "failover", "cleanup", document["id"][:12]) == 0
    (cleaned,) = json.loads(capsys.readouterr().out.partition("]\n")[2])
    assert (cleaned["plan"], cleaned["state"]) == (document["id"], "cleaned")


def run_cli(root: str, *words: str) -> int:
    return main.run(["--vault", root, "--json", *words])
