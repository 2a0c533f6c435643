"""PURE: failovers as documents: one, a list, and the history of drills with its trend."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from asrfs.errors import AsrfsError, IntegrityError, TemporaryError
from asrfs.model.quantities import NS_PER_SECOND, format_time
from replica_store.failover.plan import Pause
from replica_store.failover.plan_journal import PlanJournal
from replica_store.vault.operations import Operation

TREND_LEAST = 3
"""So many drills before the last one, fewer say nothing of a trend."""


def document(operation: Operation) -> dict[str, Any]:
    """A failover as commands print it."""
    point, where = operation.point, operation.places
    verdicts = {each.disk: each for each in operation.examined}
    disks = []
    for name in operation.disks:
        verdict = verdicts.get(name)
        disks.append(
            {
                "name": name,
                "path": f"{where.mount}/{name}.img",
                "filesystem": verdict.filesystem if verdict else None,
                "fsck": verdict.result if verdict else None,
                "fsck_text": verdict.text if verdict else None,
                "journal_replayed": verdict.replayed if verdict else None,
            }
        )
    checked = operation.checked
    return {
        "id": operation.id,
        "kind": operation.kind,
        "machine": operation.machine,
        "point": point.id,
        "selector": point.selector,
        "lsn": point.lsn,
        "time": format_time(point.time_ns),
        "consistency": point.consistency,
        "state": operation.state,
        "state_directory": where.state,
        "mount": where.mount,
        "network": where.namespace,
        "disks": disks,
        "steps": [{"name": step.name, "seconds": step.seconds} for step in operation.steps],
        "rto_seconds": operation.rto_s,
        "data_loss_seconds": operation.data_loss_s,
        "check": None
        if checked is None
        else {"command": checked.command, "exit_code": checked.exit_code, "output": checked.output},
        "boot": None
        if operation.booted is None
        else {"kind": operation.booted.kind, "runs": not operation.booted.failure, "failure": operation.booted.failure},
        "begun": format_time(operation.begun_ns),
        "expires": None if operation.expires_ns is None else format_time(operation.expires_ns),
        "epoch": operation.epoch,
        "proof": _proof(operation),
        "handover": _handover(operation),
        "remains": operation.remains,
        "plan": operation.plan,
        "reprotection": None
        if operation.reprotection is None
        else {
            "store": operation.reprotection.store,
            "begun": format_time(operation.reprotection.begun_ns),
            "enrolled": operation.reprotection.enrolled,
            "done": None if operation.reprotection.done_ns is None else format_time(operation.reprotection.done_ns),
        },
        "warnings": list(operation.warnings),
        "log": [
            {"time": format_time(cause.time_ns), "state": cause.state, "cause": cause.text}
            for cause in operation.causes
        ],
    }


def _proof(operation: Operation) -> dict[str, Any] | None:
    """That a planned failover lost nothing; None of another point than what was handed over."""
    handover = operation.handover
    if handover is None or handover.lsn is None or not handover.is_used or handover.lsn != operation.point.lsn:
        return None
    return {"lsn": handover.lsn, "chunks_compared": handover.chunks_compared, "chunks_different": 0}


def _handover(operation: Operation) -> dict[str, Any] | None:
    """What the host did for a planned failover."""
    handover = operation.handover
    if handover is None:
        return None
    return {"lsn": handover.lsn, "error": handover.error, "taken_back": handover.is_back}


def plan_document(journal: PlanJournal, found: Iterable[Operation]) -> dict[str, Any]:
    """A run of a plan as commands print it. `found`: its failovers; those that a later one replaced are left out.

    `rto_seconds`: from its beginning to the end of its last step, pauses and all; None until it is done.
    """
    head, run = journal.head, journal.run
    times = [event.time_ns for event in journal.events]
    newest = {each.machine: each for each in found}
    losses = [each.data_loss_s for each in newest.values() if each.data_loss_s is not None]
    is_done = run.state == "done"
    return {
        "id": head.id,
        "plan": head.plan.name,
        "kind": head.kind,
        "state": run.state,
        "begun": format_time(min(times)) if times else None,
        "ended": format_time(max(times)) if times and is_done else None,
        "rto_seconds": round((max(times) - min(times)) / NS_PER_SECOND, 4) if times and is_done else None,
        "data_loss_seconds": max(losses, default=None),
        "waits_for": [step.item.text for step in run.pauses() if isinstance(step.item, Pause)],
        "steps": [
            {
                "name": step.id,
                "state": run.standing[step.id].state,
                "critical": step.is_critical,
                "seconds": round(run.standing[step.id].seconds, 4),
                "text": run.standing[step.id].text,
            }
            for step in run.steps
        ],
        "machines": [document(each) for each in newest.values()],
    }


def plan_verdict(journal: PlanJournal) -> AsrfsError | None:
    """What has stopped a plan."""
    head, run = journal.head, journal.run
    for step in run.steps:
        standing = run.standing[step.id]
        if standing.state == "failed" and step.is_critical:
            return TemporaryError(
                f"plan {head.plan.name} stopped at {step.id}: {standing.text}; see to it, then go on with "
                f"`replica-store plan resume {head.id[:12]}`"
            )
    return None


def verdict(operation: Operation) -> AsrfsError | None:
    """What of the recovered machine is not as it should be: a filesystem, what the check command said, its start."""
    for each in operation.examined:
        if each.result == "damaged":
            return IntegrityError(
                f"disk {each.disk} of failover {operation.id[:12]}: fsck found its {each.filesystem} damaged: "
                f"{each.text}"
            )
    checked = operation.checked
    if checked is not None and checked.exit_code != 0:
        last = (checked.output.strip().splitlines() or ["it said nothing"])[-1]
        return TemporaryError(
            f"the check command of failover {operation.id[:12]} ended with exit code {checked.exit_code}: {last[:200]}"
        )
    if operation.booted is not None and operation.booted.failure:
        return TemporaryError(
            f"the disks of failover {operation.id[:12]} are there, but the machine does not run: "
            f"{operation.booted.failure}; `replica-store failover resume {operation.id[:12]}` starts it again"
        )
    return None


def drills(operations: Iterable[Operation]) -> list[dict[str, Any]]:
    """By machine: how often it was tried, with what result, and whether it gets slower. Those that never were ready
    count as failed."""
    by_machine: dict[str, list[Operation]] = {}
    for each in operations:
        if each.kind == "test" and each.state != "preparing":
            by_machine.setdefault(each.machine, []).append(each)
    return [_drills_of(machine, each) for machine, each in sorted(by_machine.items())]


def _drills_of(machine: str, tests: list[Operation]) -> dict[str, Any]:
    ready = [each for each in tests if each.rto_s is not None]
    passed = [each for each in ready if verdict(each) is None]
    times = [each.rto_s for each in ready if each.rto_s is not None]
    before = times[:-1]
    usual = median(before) if len(before) >= TREND_LEAST else None
    return {
        "machine": machine,
        "drills": len(tests),
        "passed": len(passed),
        "last": format_time(tests[-1].begun_ns),
        "last_passed": format_time(passed[-1].begun_ns) if passed else None,
        "last_rto_seconds": times[-1] if times else None,
        "best_rto_seconds": min(times, default=None),
        "median_rto_seconds": round(median(times), 4) if times else None,
        "worst_rto_seconds": max(times, default=None),
        "trend": round(times[-1] / usual - 1.0, 3) if usual else None,
        "runs": [
            {
                "id": each.id,
                "time": format_time(each.begun_ns),
                "lsn": each.point.lsn,
                "rto_seconds": each.rto_s,
                "data_loss_seconds": each.data_loss_s,
                "passed": each.rto_s is not None and verdict(each) is None,
            }
            for each in tests
        ],
    }
