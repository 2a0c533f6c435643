"""Policies: what each key means, what it may be, and what a whole policy may not be. Pure.

A policy is kept as the texts a person wrote, so a better default of a later version reaches everyone who did not
choose. A default gives way to what was chosen: `retention=1h` alone makes application points more frequent than that,
`rpo_critical=5m` warns no later.

`parse_policy` tells all that is wrong at once, with the nearest key for one that does not exist. The host
follows a policy it was told by `follow_policy`: what it cannot read it leaves at the default and says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import msgspec

from asrfs.errors import BadInputError
from asrfs.model.calendar import BandwidthCalendar, Window, parse_bandwidth, parse_window
from asrfs.model.marker import Consistency
from asrfs.model.quantities import format_duration, parse_duration

OnFailure = Literal["crash", "none"]

CRASH_INTERVAL_S_MIN, CRASH_INTERVAL_S_MAX = 1.0, 86400.0
QUIETED_INTERVAL_S_MIN = 1.0
QUIET_INTERVAL_S_MIN = 60.0
"""Nobody's filesystems are frozen more often than that without being asked for."""
RETENTION_S_MIN, RETENTION_S_MAX = 1.0, 365 * 86400.0
POINT_ALARM_S, POINT_ALARM_S_MAX = 3600.0, 30 * 86400.0
RPO_S_MIN, RPO_S_MAX = 1.0, 30 * 86400.0
GRID_STEPS_MAX = 16


class RetentionStep(NamedTuple):
    """Points younger than `age_s` are kept, of those in each `every_s` the newest; 0: all of them."""

    age_s: float
    every_s: float = 0.0


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for a machine. Durations in seconds; an interval of 0: no such points.

    `retention`: by age, the last step is the longest. `point_alarm_s` None: nobody chose, see `alarm_after_s`.
    """

    crash_interval_s: float = 300.0
    filesystem_interval_s: float = 0.0
    application_interval_s: float = 4 * 3600.0
    retention: tuple[RetentionStep, ...] = (RetentionStep(86400.0),)
    rpo_warning_s: float = 900.0
    rpo_critical_s: float = 3600.0
    resync_window: Window = Window(18 * 60 + 30, 6 * 60)
    bandwidth: BandwidthCalendar = BandwidthCalendar()
    on_failure: OnFailure = "crash"
    point_alarm_s: float | None = None
    partial_points: bool = False

    @property
    def retention_s(self) -> float:
        """The age at which the last point goes."""
        return self.retention[-1].age_s

    def intervals_s(self) -> dict[Consistency, float]:
        """Seconds between scheduled points, by kind, without those that are off."""
        intervals: dict[Consistency, float] = {"crash": self.crash_interval_s}
        if self.filesystem_interval_s:
            intervals["filesystem"] = self.filesystem_interval_s
        if self.application_interval_s:
            intervals["application"] = self.application_interval_s
        return intervals

    def alarm_after_s(self, kind: Consistency) -> float:
        """So long after the last point of a kind there should have been another.

        The alarm is for points that do not come, so it leaves a longer interval its time. Where somebody chose the
        alarm, that is meant as it is said for crash points, which every point is.
        """
        interval_s = self.intervals_s().get(kind, 0.0)
        alarm_s = POINT_ALARM_S if self.point_alarm_s is None else self.point_alarm_s
        is_meant = self.point_alarm_s is not None or interval_s < alarm_s
        return alarm_s if kind == "crash" and is_meant else interval_s + alarm_s


DEFAULT_TEXTS = {
    "crash_interval": "300s",
    "filesystem_interval": "0",
    "application_interval": "4h",
    "retention": "24h",
    "rpo_warning": "15m",
    "rpo_critical": "60m",
    "resync_window": "18:30-06:00",
    "bandwidth_limit": "none",
    "on_failure": "crash",
    "point_alarm": "60m",
    "partial_points": "no",
}
"""Every key with its default, as it would be written."""

STORE_KEYS = frozenset(("retention", "partial_points"))
"""What the store decides: a host cannot set these for itself."""


def parse_policy(texts: Mapping[str, str]) -> Policy:
    """The policy that sets these. Raises BadInputError with everything that is wrong, each with its key."""
    values, errors = _parse(texts)
    policy = _policy(values)
    errors += [text for _, text in _contradictions(policy)]
    if errors:
        raise BadInputError("; ".join(errors))
    return policy


def texts_in_force(texts: Mapping[str, str]) -> dict[str, str]:
    """Every key with what it is at, of a policy that can be parsed: as it was written, else the default."""
    policy = _policy(_parse(texts)[0])
    defaults = DEFAULT_TEXTS | {
        "application_interval": format_duration(policy.application_interval_s),
        "rpo_warning": format_duration(policy.rpo_warning_s),
        "rpo_critical": format_duration(policy.rpo_critical_s),
    }
    return {key: texts.get(key, default) for key, default in defaults.items()}


def follow_policy(texts: Mapping[str, str]) -> tuple[Policy, list[str]]:
    """The policy as far as it can be followed, and what of it cannot: by a host, whatever the store told it."""
    values, errors = _follow(texts)
    return _policy(values), errors


def followed_texts(texts: Mapping[str, str]) -> dict[str, str]:
    """Those of the texts that `follow_policy` follows."""
    values, _ = _follow(texts)
    return {key: text for key, text in texts.items() if _FIELDS.get(key) in values}


def _follow(texts: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    values, errors = _parse(texts)
    while found := _contradictions(_policy(values)):
        keys, text = found[0]
        errors.append(text)
        for key in keys:
            values.pop(_FIELDS[key], None)
    return values, errors


def parse_key(key: str, text: str) -> Any:
    """What one key is at, by itself. Raises BadInputError that names it, or the nearest."""
    if key not in _PARSERS:
        raise BadInputError(unknown_key(key, DEFAULT_TEXTS))
    try:
        return _PARSERS[key](text)
    except BadInputError as error:
        raise BadInputError(f"{key}={text[:60]}: {error}") from None


def unknown_key(key: str, keys: Mapping[str, object]) -> str:
    """What to say of a key there is not."""
    near = difflib.get_close_matches(key.lower(), keys, n=1, cutoff=0.5)
    said = f"did you mean {near[0]}?" if near else f"choose from {', '.join(sorted(keys))}"
    return f"there is no key {key[:40]!r}: {said}"


def _parse(texts: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Values of `Policy`, and one line for each key that has none."""
    values: dict[str, Any] = {}
    errors = []
    for key, text in texts.items():
        try:
            values[_FIELDS.get(key, "")] = parse_key(key, text)
        except BadInputError as error:
            errors.append(str(error))
    return values, errors


def _policy(values: Mapping[str, Any]) -> Policy:
    """With defaults that give way to what was chosen."""
    policy = Policy(**values)
    given_way: dict[str, Any] = {}
    if "application_interval_s" not in values and policy.application_interval_s >= policy.retention_s:
        half_s = policy.retention_s / 2
        given_way["application_interval_s"] = half_s if half_s >= QUIET_INTERVAL_S_MIN else 0.0
    if "rpo_warning_s" not in values:
        given_way["rpo_warning_s"] = min(policy.rpo_warning_s, policy.rpo_critical_s)
    elif "rpo_critical_s" not in values:
        given_way["rpo_critical_s"] = max(policy.rpo_warning_s, policy.rpo_critical_s)
    return msgspec.structs.replace(policy, **given_way)


def _contradictions(policy: Policy) -> list[tuple[tuple[str, ...], str]]:
    """Keys that cannot stand together, and why."""
    found: list[tuple[tuple[str, ...], str]] = []
    for key, interval_s in (
        ("filesystem_interval", policy.filesystem_interval_s),
        ("application_interval", policy.application_interval_s),
    ):
        if interval_s >= policy.retention_s:
            found.append(
                (
                    (key, "retention"),
                    f"{key} of {format_duration(interval_s)} is not shorter than retention of "
                    f"{format_duration(policy.retention_s)}: each would be gone before the next",
                )
            )
    if policy.crash_interval_s > policy.retention_s:
        found.append(
            (
                ("crash_interval", "retention"),
                f"crash_interval of {format_duration(policy.crash_interval_s)} is longer than retention of "
                f"{format_duration(policy.retention_s)}: every point would be gone before the next",
            )
        )
    if policy.rpo_warning_s > policy.rpo_critical_s:
        found.append(
            (
                ("rpo_warning", "rpo_critical"),
                f"rpo_warning of {format_duration(policy.rpo_warning_s)} is more than rpo_critical of "
                f"{format_duration(policy.rpo_critical_s)}",
            )
        )
    return found


def _duration(least: float, most: float, *, zero: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        seconds = 0.0 if zero and text.strip().lower() in ("off", "none") else parse_duration(text)
        if not (least <= seconds <= most or (zero and seconds == 0)):
            no_points = ", or 0 for none" if zero else ""
            raise BadInputError(f"from {format_duration(least)} to {format_duration(most)}{no_points}")
        return seconds

    return parse


def _retention(text: str) -> tuple[RetentionStep, ...]:
    """`24h`, or a grid that thins out: `24h, 7d/1h, 30d/1d`."""
    steps = []
    for part in text.split(","):
        age, slash, every = part.partition("/")
        steps.append(RetentionStep(parse_duration(age), parse_duration(every) if slash else 0.0))
        if not RETENTION_S_MIN <= steps[-1].age_s <= RETENTION_S_MAX:
            raise BadInputError(f"from {format_duration(RETENTION_S_MIN)} to {format_duration(RETENTION_S_MAX)}")
        if slash and not 0 < steps[-1].every_s < steps[-1].age_s:
            raise BadInputError(f"{part.strip()}: one point is kept in more than nothing and less than the whole time")
    if len(steps) > GRID_STEPS_MAX:
        raise BadInputError(f"at most {GRID_STEPS_MAX} steps")
    for before, after in pairwise(steps):
        if after.age_s <= before.age_s or after.every_s <= before.every_s:
            raise BadInputError("each step goes further back than the one before, and keeps fewer points")
    return tuple(steps)


def _choice(choices: Mapping[str, Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text.strip().lower() not in choices:
            raise BadInputError(f"choose from {', '.join(choices)}")
        return choices[text.strip().lower()]

    return parse


_YES_NO = {"yes": True, "no": False, "on": True, "off": False, "true": True, "false": False}
_PARSERS: dict[str, Callable[[str], Any]] = {
    "crash_interval": _duration(CRASH_INTERVAL_S_MIN, CRASH_INTERVAL_S_MAX),
    "filesystem_interval": _duration(QUIETED_INTERVAL_S_MIN, RETENTION_S_MAX, zero=True),
    "application_interval": _duration(QUIETED_INTERVAL_S_MIN, RETENTION_S_MAX, zero=True),
    "retention": _retention,
    "rpo_warning": _duration(RPO_S_MIN, RPO_S_MAX),
    "rpo_critical": _duration(RPO_S_MIN, RPO_S_MAX),
    "resync_window": parse_window,
    "bandwidth_limit": parse_bandwidth,
    "on_failure": _choice({"crash": "crash", "none": "none"}),
    "point_alarm": _duration(1.0, POINT_ALARM_S_MAX),
    "partial_points": _choice(_YES_NO),
}
_FIELDS = {
    "crash_interval": "crash_interval_s",
    "filesystem_interval": "filesystem_interval_s",
    "application_interval": "application_interval_s",
    "retention": "retention",
    "rpo_warning": "rpo_warning_s",
    "rpo_critical": "rpo_critical_s",
    "resync_window": "resync_window",
    "bandwidth_limit": "bandwidth",
    "on_failure": "on_failure",
    "point_alarm": "point_alarm_s",
    "partial_points": "partial_points",
}
