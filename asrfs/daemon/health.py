"""What is wrong with a machine as seen from outside its agent, as alarms. PURE.

The agent raises what only it can know; these hold with and without one, so that nothing looks healthy because the
process that would complain is the one that is gone.
"""

from __future__ import annotations

from collections.abc import Mapping

from asrfs.model.policy import Policy
from asrfs.model.quantities import format_size
from asrfs.model.rpo_alarm import rpo_text
from asrfs.replication.alarms import Alarm, Severity

SPACE_WARNING = 0.80
SPACE_CRITICAL = 0.95
QUOTA_WARNING = 0.90


def process_alarms(processes: Mapping[str, int | None], *, has_mount: bool, agent_answers: bool) -> list[Alarm]:
    """Alarms for processes that are missing or hang. `processes`: pid or None by role; `has_mount`: a mount of ours
    is there, alive or dead."""
    supervisor, disk_server, agent = (processes.get(role) for role in ("supervisor", "disk_server", "agent"))
    if supervisor is None and disk_server is None and agent is None:
        if has_mount:
            text = "no process serves the disks, and their mount is still there: programs that use them get I/O errors"
            return [Alarm("not-served", "critical", f"{text}: start `asrfs serve` again")]
        text = "the machine is not being served: its disks are away, and nothing goes to the store"
        return [Alarm("not-served", "warning", f"{text}: start `asrfs serve`")]
    alarms = []
    if supervisor is None:
        text = "the supervisor is not running: nobody starts the others again if they die: start `asrfs serve` again"
        alarms.append(Alarm("supervisor", "warning", text))
    if disk_server is None:
        text = "the disk server is not running: whoever uses a disk waits for it"
        alarms.append(Alarm("disk-server", "critical", f"{text}: see log/disk_server.log"))
    if agent is None:
        text = "the agent is not running: nothing goes to the store, and the journal grows"
        alarms.append(Alarm("agent", "critical", f"{text}: see log/agent.log"))
    elif not agent_answers:
        text = f"the agent, process {agent}, does not answer: nothing may go to the store"
        alarms.append(Alarm("agent", "critical", f"{text}: kill it, another one is started"))
    return alarms


def quota_alarms(used_bytes: int, quota_bytes: int) -> list[Alarm]:
    """The alarm of a journal that comes near to its quota, or is over it."""
    if used_bytes <= quota_bytes * QUOTA_WARNING:
        return []
    text = f"the journal holds {format_size(used_bytes)}, its quota is {format_size(quota_bytes)}"
    if used_bytes <= quota_bytes:
        text = f"{text}: over that, what waits for the store is given up, and a resync will send what differs"
    else:
        text = f"{text}: it is given up as it gets into the images"
    return [Alarm("journal-over-quota", "warning", text)]


def rpo_alarms(achieved_rpo_s: float | None, policy: Policy) -> list[Alarm]:
    """The alarm of an RPO that is not kept."""
    said = rpo_text(achieved_rpo_s, policy)
    return [] if said is None else [Alarm("rpo", *said)]


def space_alarms(root: str, total_bytes: int, free_bytes: int) -> list[Alarm]:
    """The alarm of a filesystem that fills up, before it is full."""
    used = 1 - free_bytes / total_bytes if total_bytes else 1.0
    if used < SPACE_WARNING:
        return []
    text = f"the filesystem of {root} is {used:.0%} full, {format_size(free_bytes)} are left"
    severity: Severity = "critical" if used >= SPACE_CRITICAL else "warning"
    return [Alarm("space", severity, f"{text}: when it is full, writes fail with ENOSPC")]
