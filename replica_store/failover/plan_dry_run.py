"""PURE: what would stand in the way of a plan at this site, said before anything is done.

The facts are gathered by the caller, who does nothing else; so a dry run changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from asrfs.model.boot import BootSettings
from asrfs.model.quantities import format_size
from replica_store.failover.plan import Kind, Plan, PlannedMachine


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """Of one machine, with the point that the plan chooses.

    `no_point`: why there is none, None where there is. `refused`: why the protection state does not allow this kind of
    failover, None where it does. `bytes_needed`: of space until all its disks are hydrated.
    """

    no_point: str | None = None
    refused: str | None = None
    disks: tuple[str, ...] = ()
    bytes_needed: int = 0
    boot: BootSettings | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SiteFacts:
    """`programs`: by path, whether it can be run. `ports_in_use`: of TCP on this machine. `paths_in_use`: directories
    on which something is mounted."""

    machines: Mapping[str, MachineFacts]
    bytes_free: int
    programs: Mapping[str, bool] = field(default_factory=dict)
    ports_in_use: frozenset[int] = frozenset()
    paths_in_use: frozenset[str] = frozenset()


class Finding(NamedTuple):
    """`where`: the machine or script it is about. An `error` would make the plan fail, a `warning` might."""

    severity: Literal["error", "warning"]
    where: str
    text: str


def programs_of(plan: Plan) -> list[str]:
    """Whose being there is to be found out for `SiteFacts.programs`."""
    scripts = [script for group in plan.groups for script in (*group.pre, *group.post)]
    return sorted({script.command[0] for script in scripts})


def findings(plan: Plan, kind: Kind, site: SiteFacts) -> list[Finding]:
    """In the order of the plan; none: nothing stands in the way."""
    found: list[Finding] = []
    meant = [
        machine for group in plan.groups if kind in group.when for machine in group.machines if kind in machine.when
    ]
    for group in plan.groups:
        if kind not in group.when:
            continue
        for script in (*group.pre, *group.post):
            if kind in script.when and not site.programs.get(script.command[0], False):
                text = f"{script.command[0]} is not a program that can be run here"
                found.append(Finding(_severity(script.critical), f"{group.name}/{script.name}", text))
    if not meant:
        found.append(Finding("error", plan.name, f"no machine of the plan is meant for {kind}"))
    for machine in meant:
        found += _of_machine(machine, site)
    found += _of_ports_and_paths(meant, kind, site)
    needed = sum(site.machines[m.name].bytes_needed for m in meant if m.name in site.machines)
    if needed > site.bytes_free:
        text = f"all disks need {format_size(needed)} once they are whole, and {format_size(site.bytes_free)} are free"
        found.append(Finding("error", plan.name, text))
    return found


def _of_machine(machine: PlannedMachine, site: SiteFacts) -> list[Finding]:
    facts = site.machines.get(machine.name)
    severity = _severity(machine.critical)
    if facts is None:
        return [Finding(severity, machine.name, "this vault has no such machine")]
    found = [Finding("warning", machine.name, text) for text in facts.warnings]
    found += [Finding(severity, machine.name, text) for text in (facts.no_point, facts.refused) if text is not None]
    if facts.no_point is None and not facts.disks:
        found.append(Finding(severity, machine.name, "it has no disk at that point"))
    if facts.boot is not None:
        missing = [name for name in facts.boot.disk_names() if name not in facts.disks]
        found += [Finding(severity, machine.name, f"its boot settings name disk {name!r}") for name in missing]
    return found


def _of_ports_and_paths(meant: list[PlannedMachine], kind: Kind, site: SiteFacts) -> list[Finding]:
    """Machines in `mount` mode share this machine's ports and, but for tests, its paths."""
    found: list[Finding] = []
    ports: dict[int, str] = {}
    paths: dict[str, str] = {}
    for machine in meant:
        facts = site.machines.get(machine.name)
        if facts is None or facts.boot is None or facts.boot.mount is None:
            continue
        severity, health = _severity(machine.critical), facts.boot.health
        if health is not None and health.port is not None:
            holder = ports.setdefault(health.port, machine.name)
            if holder != machine.name or health.port in site.ports_in_use:
                whose = f"machine {holder}" if holder != machine.name else "somebody else"
                found.append(Finding(severity, machine.name, f"port {health.port} is taken by {whose}"))
        for filesystem in facts.boot.mount.filesystems if kind != "test" else ():
            path = filesystem.path.rstrip("/")
            holder = paths.setdefault(path, machine.name)
            if holder != machine.name or path in site.paths_in_use:
                whose = f"machine {holder}" if holder != machine.name else "somebody else"
                found.append(Finding(severity, machine.name, f"{path} is taken by {whose}"))
    return found


def _severity(critical: bool) -> Literal["error", "warning"]:
    return "error" if critical else "warning"
