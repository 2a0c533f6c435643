"""What a dry run has to know of this site: looked at and not touched."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from asrfs.errors import AsrfsError, IntegrityError, RefusedError
from replica_store.failover.choice import check_may_begin
from replica_store.failover.mounts import mounted
from replica_store.failover.plan import Kind, Plan, PlannedMachine, selector_for
from replica_store.failover.plan_dry_run import MachineFacts, SiteFacts, programs_of
from replica_store.points.builder import disks_of, open_disks, resolve
from replica_store.points.point_disk import FrameCache
from replica_store.vault.vault import Vault

_LISTENING = "0A"


def site_facts(vault: Vault, plan: Plan, kind: Kind, directory: str) -> SiteFacts:
    """`directory`: where recovered disks will be kept, or the nearest one above it that is there. Raises
    IntegrityError for a vault that cannot be read at all."""
    known = {machine.name for machine in vault.machines()}
    return SiteFacts(
        machines={
            machine.name: machine_facts(vault, plan, machine, kind)
            for group in plan.groups
            for machine in group.machines
            if machine.name in known and kind in group.when and kind in machine.when
        },
        bytes_free=shutil.disk_usage(_existing(directory)).free,
        programs={path: os.path.isfile(path) and os.access(path, os.X_OK) for path in programs_of(plan)},
        ports_in_use=ports_in_use(),
        paths_in_use=paths_in_use(),
    )


def machine_facts(vault: Vault, plan: Plan, machine: PlannedMachine, kind: Kind) -> MachineFacts:
    """What is known without doing anything. Its indexes are read, as a failover would."""
    try:
        cut = resolve(vault, machine.name, selector_for(plan, machine, kind))
        names = [disk.name for disk in disks_of(vault, cut)]
        opened = open_disks(vault, cut, names, FrameCache(vault))
        boot = vault.boot_at(cut.machine.id, cut.lsn)
    except IntegrityError as error:
        return MachineFacts(no_point=f"its history is damaged: {error}")
    except AsrfsError as error:
        return MachineFacts(no_point=str(error))
    needed = sum(min(disk.size_bytes, disk.state.layers.bytes_max) for disk in opened.values())
    refused = _refused(vault, machine.name, kind)
    return MachineFacts(refused=refused, disks=tuple(names), bytes_needed=needed, boot=boot)


def _refused(vault: Vault, machine: str, kind: Kind) -> str | None:
    """Why such a failover would not even begin; None where it would."""
    try:
        check_may_begin(vault, kind, machine)
    except RefusedError as error:
        return str(error)
    return None


def ports_in_use() -> frozenset[int]:
    """TCP ports on which somebody listens here."""
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENING:
                found.add(int(fields[1].rpartition(":")[2], 16))
    return frozenset(found)


def paths_in_use() -> frozenset[str]:
    """Directories on which something is mounted."""
    return frozenset(each.target for each in mounted())


def _existing(directory: str) -> str:
    at = os.path.abspath(directory)
    while not os.path.isdir(at):
        at = os.path.dirname(at)
    return at
