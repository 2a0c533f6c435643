"""Failing back on a real vault: of which machine, whoever dies at whichever step, and one by one of a plan. No machine
is started, and what the host does is a script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asrfs.errors import BadInputError, RefusedError
from asrfs.model.arrival import Arrival
from asrfs.storage.system_clock import SystemClock
from replica_store.cli import main
from replica_store.failover import actions
from replica_store.failover.actions import Failovers
from replica_store.failover.plan import KINDS, read_plan
from replica_store.failover.plan_facts import site_facts
from replica_store.failover.plan_runs import PlanRuns
from replica_store.failover.report import document
from replica_store.failover.wanted import Wanted
from replica_store.vault.arrivals import note_arrival
from replica_store.vault.operations import Checked, Operation, operations
from replica_store.vault.rebuild import rebuild
from replica_store.vault.vault import Vault
from tests.t4_sim.test_failover_actions import MACHINE, Recovery, clock, failovers, recovery, root, standing

__all__ = ["clock", "failovers", "recovery", "root"]  # fixtures

STEPS = ("resolve", "handover", "point", "serve", "report", "epoch", "committed")
PLAN = """
name = "shop"
[[groups]]
name = "all"
machines = [{ name = "web1", point = "latest-processed" }]
post = [{ name = "only-then", command = ["/bin/true"], when = ["failback"] }]
"""


class Died(BaseException):
    """As a SIGKILL: nothing is tidied up after it."""


def wanted(**more: Any) -> Wanted:
    return Wanted(**{"machine": MACHINE, "selector": "latest", **more})


def found_in(root: str) -> list[Operation]:
    with Vault.open(root) as vault:
        return operations(vault.catalog)


def arrive(root: str, *, away: bool) -> None:
    with Vault.open(root, writable=True) as vault, vault.catalog.transaction():
        said = Arrival(store_id="e" * 32, away=away, owner="e" * 32, policy="default")
        note_arrival(vault, vault.machine(MACHINE), said)


def test_it_comes_home_and_nothing_is_lost(failovers: Failovers, root: str) -> None:
    found = failovers.failback(wanted())
    told = document(found)
    assert (told["kind"], told["state"], told["data_loss_seconds"]) == ("failback", "commit-pending", 0.0)
    assert told["proof"] == {"lsn": found.point.lsn, "chunks_compared": 4, "chunks_different": 0}
    assert f"failover commit {found.id[:12]}" in told["next"]
    assert "reprotect" in document(failovers.commit(found.id))["next"] and standing(root) == "committed"
    rebuild(root)
    assert [each.kind for each in found_in(root)] == ["failback"]


def test_only_a_machine_that_is_away_comes_home(failovers: Failovers, root: str) -> None:
    arrive(root, away=False)
    with pytest.raises(RefusedError, match=r"runs at home.*allowed: failover planned"):
        failovers.failback(wanted())
    assert found_in(root) == [] and standing(root) == "protected"
    arrive(root, away=True)
    with pytest.raises(BadInputError, match="loses nothing"):
        failovers.failback(wanted(selector="lsn:1"))
    failovers.commit(failovers.unplanned(wanted()).id)
    with pytest.raises(RefusedError, match="committed: planned-failover is refused; allowed: reprotect"):
        failovers.failback(wanted())


@pytest.mark.parametrize("step", STEPS)
def test_whoever_dies_before_a_step_of_a_failback(
    root: str, recovery: Recovery, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What is there is legal and stated, and the same commands end where they would have."""

    def told(begun: str) -> None:
        if begun == step:
            raise Died

    with monkeypatch.context() as dying, pytest.raises(Died):
        dying.setattr(Failovers, "_give_up", lambda *_: None)
        dead = Failovers(root, SystemClock(), told)
        dead.commit(dead.failback(wanted()).id)
    left = found_in(root)
    assert standing(root) == ("failed-over" if left else "protected")
    again = Failovers(root, SystemClock())
    found = again.failback(wanted()) if not left or left[0].state == "preparing" else left[0]
    assert not left or found.id == left[0].id, "no second one"
    committed = again.commit(found.id)
    assert (committed.state, committed.kind, standing(root)) == ("committed", "failback", "committed")
    assert committed.handover is not None and committed.handover.lsn == committed.point.lsn


def test_another_one_is_not_begun_beside_it(failovers: Failovers, root: str) -> None:
    found = failovers.failback(wanted())
    for begin in (failovers.failback, failovers.planned, failovers.unplanned):
        with pytest.raises(RefusedError, match="failed-over"):
            begin(wanted())
    assert failovers.cancel(found.id).state == "cancelled" and standing(root) == "protected"
    assert failovers.failback(wanted()).id != found.id


@pytest.mark.parametrize(("kind", "last"), [("failback", "done"), ("planned", "skipped")])
def test_a_plan_is_handed_over(failovers: Failovers, root: str, kind: Any, last: str) -> None:
    """To what its machines hand over, whatever points it names for the day when they cannot."""
    journal = PlanRuns(root, SystemClock()).begin(read_plan(PLAN, "here"), kind)
    assert journal.run.state == "done"
    assert [each.state for each in journal.run.standing.values()] == ["done", last]
    (found,) = found_in(root)
    assert (found.kind, found.state, found.plan) == (kind, "commit-pending", journal.head.id)
    assert found.handover is not None and found.handover.lsn == found.point.lsn and found.data_loss_s == 0.0


def test_a_plan_whose_machine_was_not_handed_over_is_resumed(
    failovers: Failovers, root: str, recovery: Recovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = recovery.answer
    recovery.answer = msgspec.structs.replace(sound, outcome="taken-back", error="exit code 1")
    runs = PlanRuns(root, SystemClock())
    journal = runs.begin(read_plan(PLAN, "here"), "failback")
    assert journal.run.state == "failed" and standing(root) == "protected"
    recovery.answer = sound
    assert runs.resume(journal.head.id).run.state == "done" and standing(root) == "failed-over"


def test_the_command(root: str, recovery: Recovery, capsys: pytest.CaptureFixture[str], scratch: Path) -> None:
    def run(*words: str) -> int:
        return main.run(["--vault", root, "--json", *words])

    assert run("failback", "nobody") == 3
    assert run("failback", MACHINE, "--timeout", "0s") == 2
    file = scratch / "plan.toml"
    file.write_text(PLAN)
    assert run("plan", "create", str(file)) == 0
    for more in ("--commit", f"--state={scratch}/x"):
        assert run("failback", "shop", more) == 2
    for name in ("shop", MACHINE):
        assert run("failover", "planned", name, "--point", "lsn:3") == 2
    capsys.readouterr()
    assert run("failback", "shop") == 0
    (done,) = json.loads(capsys.readouterr().out)["machines"]
    assert done["kind"] == "failback" and run("failover", "cancel", done["plan"]) == 0
    capsys.readouterr()
    assert run("failback", MACHINE, "--commit") == 0
    committed = json.loads(capsys.readouterr().out)
    assert (committed["kind"], committed["state"], committed["epoch"]) == ("failback", "committed", 2)


def test_a_dry_run_says_what_cannot_be_handed_over(root: str, recovery: Recovery, scratch: Path) -> None:
    def facts(kind: Any) -> str | None:
        with Vault.open(root) as vault:
            return site_facts(vault, plan, kind, str(scratch)).machines[MACHINE].refused

    plan = read_plan(PLAN, "here")
    assert [facts(kind) for kind in KINDS] == [None] * len(KINDS)
    arrive(root, away=False)
    assert "runs at home" in str(facts("failback")) and facts("planned") is None
    Failovers(root, SystemClock()).unplanned(wanted())
    assert facts("test") is None
    for kind in ("planned", "unplanned", "failback"):
        assert "failed-over" in str(facts(kind))


def test_what_is_not_good_is_not_committed_at_once(
    root: str, recovery: Recovery, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound: Callable[..., Operation] = actions.prepare

    def prepare(*words: Any, **more: Any) -> Operation:
        checked = Checked(command="false", exit_code=1, output="no")
        return msgspec.structs.replace(sound(*words, **more), checked=checked)

    monkeypatch.setattr(actions, "prepare", prepare)
    assert main.run(["--vault", root, "--json", "failback", MACHINE, "--commit"]) == 1
    assert json.loads(capsys.readouterr().out)["state"] == "commit-pending" and standing(root) == "failed-over"
