"""PURE: a recovery plan as a person wrote it (TOML): groups of machines in an order, scripts and pauses around them.

    group: pause before → pre scripts, in order → its machines, side by side → post scripts, in order → pause after

A group begins when those named in `after` have ended; where that is left out, after the one written before it. What is
`critical` stops the plan when it fails: what runs is let end, nothing more is begun. What is not is noted and passed
over. `when` says for which kinds of failover something is meant; for others it is skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, get_args

import msgspec

from asrfs.errors import BadInputError
from asrfs.model.names import check_name
from asrfs.model.quantities import parse_duration

Kind = Literal["test", "planned", "unplanned", "failback"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PLAN_BYTES_MAX = 256 << 10
TIMEOUT_S_MAX = 7 * 86400.0
MACHINES_MAX = 1000
POINT_DEFAULT = "latest-processed"
_SELECTOR_CHARACTERS_MAX = 200

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
Command = Annotated[tuple[Text, ...], msgspec.Meta(min_length=1, max_length=64)]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Unknown fields are refused: what was misspelt would silently not hold."""


class Script(_Strict, frozen=True, kw_only=True):
    """A program to run at the recovery site. One that is not `repeatable` is never begun a second time by itself: when
    it was interrupted, a person decides."""

    name: str
    command: Command
    timeout: Text = "5m"
    critical: bool = True
    repeatable: bool = True
    when: tuple[Kind, ...] = KINDS


class PlannedMachine(_Strict, frozen=True, kw_only=True):
    """A machine to bring back. `point`: a selector, else the plan's."""

    name: str
    point: str | None = None
    timeout: Text = "90m"
    critical: bool = True
    when: tuple[Kind, ...] = KINDS


class Pause(_Strict, frozen=True, kw_only=True):
    """The plan waits until a person resumes it; `text` tells them what to see to."""

    text: Text
    when: tuple[Kind, ...] = KINDS


class Group(_Strict, frozen=True, kw_only=True):
    """`unless_failed`: it is skipped when one of these groups, which it comes after, has failed without stopping the
    plan."""

    name: str
    machines: tuple[PlannedMachine, ...] = ()
    after: tuple[str, ...] | None = None
    unless_failed: tuple[str, ...] = ()
    pause_before: Pause | None = None
    pre: tuple[Script, ...] = ()
    post: tuple[Script, ...] = ()
    pause_after: Pause | None = None
    when: tuple[Kind, ...] = KINDS


class Plan(_Strict, frozen=True, kw_only=True):
    """All of it. `point`: what is chosen for machines that say nothing else."""

    name: str
    description: str = ""
    point: str = POINT_DEFAULT
    groups: Annotated[tuple[Group, ...], msgspec.Meta(min_length=1, max_length=200)]

    def machines(self) -> list[PlannedMachine]:
        return [machine for group in self.groups for machine in group.machines]

    def predecessors(self) -> dict[str, tuple[str, ...]]:
        """By group, those that must have ended before it begins."""
        found: dict[str, tuple[str, ...]] = {}
        before: tuple[str, ...] = ()
        for group in self.groups:
            found[group.name] = before if group.after is None else group.after
            before = (group.name,)
        return found


def selector_for(plan: Plan, machine: PlannedMachine, kind: Kind) -> str:
    """What the machine goes on from: who is handed over goes to what that is, and loses nothing."""
    return "latest" if kind in ("planned", "failback") else machine.point or plan.point


def read_plan(text: str, where: str) -> Plan:
    """The plan a person wrote. Raises BadInputError naming `where`."""
    if len(text.encode(errors="replace")) > PLAN_BYTES_MAX:
        raise BadInputError(f"{where}: a plan has at most {PLAN_BYTES_MAX} bytes")
    try:
        plan = msgspec.toml.decode(text, type=Plan)
        check_plan(plan)
    except (msgspec.MsgspecError, ValueError, RecursionError, BadInputError) as error:
        raise BadInputError(f"{where}: {error}") from None
    return plan


def check_plan(plan: Plan) -> None:
    """Raise BadInputError for a plan that no site could carry out."""
    check_name(plan.name, "plan")
    _check_point(plan.point)
    names = [check_name(group.name, "group") for group in plan.groups]
    _check_distinct(names, "group")
    machines = plan.machines()
    _check_distinct([check_name(machine.name, "machine") for machine in machines], "machine")
    if not 0 < len(machines) <= MACHINES_MAX:
        raise BadInputError(f"a plan has 1 to {MACHINES_MAX} machines, and this one {len(machines)}")
    for machine in machines:
        _check_timeout(machine.timeout)
        _check_point(machine.point or plan.point)
    for group in plan.groups:
        _check_group(group, names)
    _check_order(plan)


def _check_group(group: Group, names: Sequence[str]) -> None:
    for scripts in (group.pre, group.post):
        _check_distinct([check_name(script.name, "script") for script in scripts], f"script of group {group.name}")
        for script in scripts:
            _check_timeout(script.timeout)
            if not script.command[0].startswith("/") or any("\0" in word for word in script.command):
                raise BadInputError(f"script {script.name}: name the program by its absolute path")
    for other in (*(group.after or ()), *group.unless_failed):
        if other not in names:
            raise BadInputError(f"group {group.name} comes after {other[:80]!r}, which the plan does not have")


def _check_order(plan: Plan) -> None:
    """No group comes after itself, however far around; and what it asks about has ended before it."""
    before = plan.predecessors()
    ended: dict[str, set[str]] = {}
    while len(ended) < len(before):
        ready = [name for name in before if name not in ended and all(each in ended for each in before[name])]
        if not ready:
            raise BadInputError(f"these groups wait for each other: {' → '.join(_cycle(before, ended))}")
        for name in ready:
            ended[name] = {*before[name], *(far for each in before[name] for far in ended[each])}
    for group in plan.groups:
        for other in group.unless_failed:
            if other not in ended[group.name]:
                raise BadInputError(f"group {group.name} asks whether {other} failed, but does not come after it")


def _cycle(before: dict[str, tuple[str, ...]], ended: dict[str, set[str]]) -> list[str]:
    """Groups each of which waits for the one before it, the first again at the end."""
    at = next(name for name in before if name not in ended)
    path: list[str] = []
    while at not in path:
        path.append(at)
        at = next(each for each in before[at] if each not in ended)
    return [*reversed(path[path.index(at) :]), path[-1]]


def _check_distinct(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BadInputError(f"{what} {name} is there twice: it may be in a plan once")
        seen.add(name)


def _check_timeout(text: str) -> None:
    if not 0 < parse_duration(text) <= TIMEOUT_S_MAX:
        raise BadInputError(f"timeout {text!r} is not between 0 and 7 days")


def _check_point(text: str) -> None:
    if not 0 < len(text) <= _SELECTOR_CHARACTERS_MAX or not text.isprintable():
        raise BadInputError(f"{text[:80]!r} is not a selector of a point")
