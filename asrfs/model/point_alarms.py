"""The alarm of points that do not appear: how it is called and what people are told, the same on both sides."""

from __future__ import annotations

from asrfs.model.marker import Consistency
from asrfs.model.policy import Policy
from asrfs.model.quantities import format_duration

WATCHED: tuple[Consistency, ...] = ("crash", "filesystem", "application")
"""Kinds that are made on schedule, each of them at least what those before it are."""


def kinds_of(consistency: Consistency) -> tuple[Consistency, ...]:
    """All that a point of this consistency is: it will do for any of them."""
    return WATCHED[: WATCHED.index(consistency) + 1]


def alarm_id(kind: Consistency) -> str:
    return f"no-{kind}-point"


def missing_text(kind: Consistency, policy: Policy, waited_s: float, *, never: bool) -> str | None:
    """What to say `waited_s` after the last point of a kind, or, if there `never` was one, after the beginning.

    None: nothing, because it is not that long or no such points are scheduled.
    """
    interval_s = policy.intervals_s().get(kind)
    if interval_s is None or waited_s < policy.alarm_after_s(kind):
        return None
    due = f"one is due every {format_duration(interval_s)}"
    if never:
        return f"there has never been a {kind}-consistent point, and {due}"
    return f"no {kind}-consistent point has appeared for {format_duration(policy.alarm_after_s(kind))}, and {due}"
