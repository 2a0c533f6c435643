"""Making a point around which something is quiet: order, failures at every step, and claims that are taken back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from asrfs.consistency.hook_sequence import HookSequence
from asrfs.consistency.hooks import Hook
from asrfs.consistency.procedure import OnFailure, Outcome, PointOrder, Procedure
from asrfs.errors import RefusedError, TemporaryError
from asrfs.model.marker import Consistency, MarkerRecord
from asrfs.storage.system_clock import SystemClock
from tests.fakes.frozen_world import FrozenWorld, failing

ID = "0123456789abcdef0123456789abcdef"


def run(
    world: FrozenWorld,
    consistency: Consistency = "filesystem",
    on_failure: OnFailure = "crash",
    hooks: tuple[Hook, ...] = (),
    is_external: bool = False,
) -> Outcome:
    order = PointOrder(
        id=ID, machine="web1", consistency=consistency, on_failure=on_failure, deadline_s=10, is_external=is_external
    )
    sequence = HookSequence(hooks, {"MACHINE": "web1", "POINT": ID}, SystemClock())
    outcome = Procedure(order, lambda: sequence, world, world.clock).run()
    check_released(world)
    return outcome


def check_released(world: FrozenWorld) -> None:
    assert not world.frozen and not world.watched, "missing thaw"
    for fd in world.open_fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


@pytest.fixture
def trace(scratch: Path) -> Path:
    return scratch / "trace"


def hook(trace: Path, phase: str, order: int, code: int = 0) -> Hook:
    text = f"echo $ASRFS_PHASE-{order} >> {trace}; exit {code}"
    if phase == "hold":
        text = f"echo hold-{order} >> {trace}; echo holding; cat; echo let-go-{order} >> {trace}; exit {code}"
    argv = ("/bin/sh", "-c", text)
    return Hook(name=f"{phase}-{order}", phase=phase, argv=argv, order=order, timeout_s=10)  # type: ignore[arg-type]


def test_i5_a_filesystem_point_is_marked_while_all_is_frozen_and_says_how_long() -> None:
    world = FrozenWorld(levels=(0, 0))

    def at(step: str) -> None:
        world.clock.now += 0.25 if step.startswith(("freeze", "mark")) else 0

    world.at = at
    outcome = run(world)
    assert world.frozen_at_markers[0] == {"fs0", "fs1"} and world.frozen_at_markers[1] == set()
    first, word = world.markers
    assert (first.consistency, first.unfinished, first.freeze_ms) == ("filesystem", True, 500.0)
    assert (word.completes, word.hold_ms, word.failed, word.unfinished) == (1, 750.0, None, False)
    assert (outcome.lsn, outcome.marker.consistency, outcome.marker.wanted) == (1, "filesystem", None)
    assert world.steps[:2] == ["open", "watch"], "watched before anything is frozen"
    assert world.steps.index("watch freezing") < min(i for i, s in enumerate(world.steps) if s.startswith("freeze"))
    assert max(i for i, s in enumerate(world.steps) if s.startswith("sync")) < world.steps.index("watch freezing")


def test_what_lies_deeper_is_frozen_first_and_thawed_last() -> None:
    world = FrozenWorld(levels=(2, 1, 0))
    run(world)
    assert [s for s in world.steps if s.startswith(("freeze", "thaw"))] == [
        *("freeze fs0", "freeze fs1", "freeze fs2"),
        *("thaw fs2", "thaw fs1", "thaw fs0"),
    ]


@pytest.mark.parametrize(
    ("number", "why"),
    [(errno.EOPNOTSUPP, "does not support it"), (errno.EBUSY, "by somebody else"), (errno.EIO, "Input")],
)
def test_a_freeze_that_fails_on_the_second_of_three_thaws_the_first(number: int, why: str) -> None:
    world = FrozenWorld(levels=(2, 1, 0), at=failing("freeze fs1", OSError(number, os.strerror(number))))
    outcome = run(world)
    assert "freeze fs2" not in world.steps and world.steps.index("thaw fs0") < world.steps.index("mark crash")
    assert world.frozen_at_markers == [frozenset(), frozenset()]
    marker = outcome.marker
    assert (marker.consistency, marker.wanted) == ("crash", "filesystem")
    assert marker.failed is not None and "/fs1 (ext4)" in marker.failed and why in marker.failed


@pytest.mark.parametrize("step", ["open", "watch", "sync fs0", "watch freezing", "freeze fs0", "mark filesystem"])
def test_any_failure_makes_a_crash_point_that_says_so_or_none(step: str) -> None:
    outcome = run(FrozenWorld(at=failing(step)))
    assert (outcome.lsn, outcome.marker.consistency, outcome.marker.wanted) == (1, "crash", "filesystem")
    assert outcome.marker.failed is not None and f"{step} failed" in outcome.marker.failed
    world = FrozenWorld(at=failing(step))
    none = run(world, on_failure="none")
    assert none.lsn is None and none.marker.failed is not None and not world.markers


def test_a_fault_of_ours_thaws_all_the_same() -> None:
    world = FrozenWorld(levels=(0, 0), at=failing("mark filesystem", ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        run(world)
    check_released(world)


def test_where_nothing_is_mounted_a_filesystem_point_is_not_claimed() -> None:
    outcome = run(FrozenWorld(levels=()))
    assert outcome.marker.consistency == "crash" and "no filesystem" in str(outcome.marker.failed)


def test_i5_a_marker_after_the_deadline_claims_nothing() -> None:
    """The disk server refuses it, and the crash marker comes after the thaw."""
    world = FrozenWorld()

    def at(step: str) -> None:
        world.clock.now += 11 if step == "mark filesystem" else 0

    world.at = at
    outcome = run(world)
    assert [m.consistency for m in world.markers if m.completes is None] == ["crash"]
    assert "deadline" in str(outcome.marker.failed) and outcome.marker.wanted == "filesystem"


@pytest.mark.parametrize("meddle", ["thaw", "deadline"])
def test_i5_a_claim_is_taken_back_where_it_was_thawed_before_we_did(meddle: str) -> None:
    """By somebody else, or by the watchdog while the marker was on its way."""
    world = FrozenWorld()
    plain = world.mark

    def mark(payload: MarkerRecord, not_after: float | None) -> tuple[int, int]:
        place = plain(payload, not_after)
        if payload.completes is None:
            world.frozen.clear()
            world.clock.now += 11 if meddle == "deadline" else 0
        return place

    world.mark = mark  # type: ignore[method-assign]
    outcome = run(world)
    first, word = world.markers
    assert (first.consistency, word.consistency, word.completes) == ("filesystem", "crash", 1)
    assert outcome.marker.consistency == "crash" and outcome.marker.wanted == "filesystem"
    assert ("too early" if meddle == "thaw" else "freeze_deadline") in str(word.failed)


def test_hooks_run_around_the_freeze_in_order_and_backwards(trace: Path) -> None:
    world = FrozenWorld()
    kinds = [("pre", 10), ("post", 10), ("hold", 20), ("pre", 30), ("post", 30)]
    hooks = tuple(hook(trace, *kind) for kind in kinds)

    def at(step: str) -> None:
        with trace.open("a") as file:
            file.write(f"{step}\n")

    world.at = at
    outcome = run(world, "application", hooks=hooks)
    lines = trace.read_text().split("\n")
    begin, end = lines.index("mark application"), lines.index("thaw fs0")
    assert lines[:3] == ["pre-10", "hold-20", "pre-30"]
    assert lines[end + 1 : end + 5] == ["watch thawed", "post-30", "let-go-20", "post-10"] and begin < end
    assert [(r.name, r.phase, r.exit_code) for r in outcome.marker.hooks] == [
        *(("pre-10", "pre", 0), ("hold-20", "pre", 0), ("pre-30", "pre", 0)),
        *(("post-30", "post", 0), ("hold-20", "post", 0), ("post-10", "post", 0)),
    ]
    assert (outcome.marker.consistency, outcome.post_failures) == ("application", ())


def test_after_a_pre_hook_that_fails_nothing_is_frozen_and_every_post_hook_runs(trace: Path) -> None:
    world = FrozenWorld()
    hooks = (hook(trace, "pre", 10), hook(trace, "pre", 20, 3), hook(trace, "pre", 30), hook(trace, "post", 10))
    outcome = run(world, "application", hooks=(*hooks, hook(trace, "post", 40, 7)))
    assert trace.read_text().split() == ["pre-10", "pre-20", "post-40", "post-10"]
    assert world.steps == ["mark crash", "last word"]
    assert outcome.marker.wanted == "application" and "hook pre-20: exit code 3" in str(outcome.marker.failed)
    assert outcome.post_failures == ("hook post-40: exit code 7",), "which is no failure of the point"


def test_post_hooks_run_when_no_marker_could_be_appended_at_all(trace: Path) -> None:
    def at(step: str) -> None:
        if step.startswith("mark"):
            raise TemporaryError("the disk server is away")

    with pytest.raises(TemporaryError, match="away"):
        run(FrozenWorld(at=at), "application", hooks=(hook(trace, "pre", 1), hook(trace, "post", 1)))
    assert trace.read_text().split() == ["pre-1", "post-1"]


def test_a_hold_hook_that_lets_go_by_itself_is_no_application_point(trace: Path) -> None:
    quitting = Hook(name="lock", phase="hold", argv=("/bin/sh", "-c", "echo holding; exit 0"), timeout_s=10)
    outcome = run(FrozenWorld(), "application", hooks=(quitting,))
    assert outcome.marker.consistency == "crash"
    said = str(outcome.marker.failed)
    assert "hook lock" in said and ("too early" in said or "before it held" in said)


def test_a_hold_hook_that_finds_it_has_not_held_takes_the_claim_back(trace: Path) -> None:
    world = FrozenWorld()
    outcome = run(world, "application", hooks=(hook(trace, "hold", 5, 3), hook(trace, "post", 1)))
    assert [marker.consistency for marker in world.markers] == ["application", "crash"]
    assert outcome.marker.wanted == "application" and "hook hold-5: exit code 3" in str(outcome.marker.failed)
    assert trace.read_text().split() == ["hold-5", "let-go-5", "post-1"]


def test_an_application_point_without_hooks_is_a_filesystem_point_that_says_so() -> None:
    outcome = run(FrozenWorld(), "application")
    marker = outcome.marker
    assert (marker.consistency, marker.wanted) == ("filesystem", "application") and "asrfs hooks add" in str(
        marker.failed
    )
    assert run(FrozenWorld(), "application", on_failure="none").lsn is None


def test_somebody_else_may_append_the_marker_while_all_is_held() -> None:
    world = FrozenWorld()
    outcome = run(world, is_external=True)
    assert world.frozen_at_markers == [{"fs0"}] and not world.markers
    assert outcome.lsn is None and outcome.marker.consistency == "filesystem" and outcome.marker.hold_ms is not None
    refusing = FrozenWorld(at=failing("open", RefusedError("it holds the journal")))
    assert run(refusing, is_external=True).marker.failed == "it holds the journal"
    assert "external" not in refusing.steps and not refusing.markers
