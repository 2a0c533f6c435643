"""What is asked for when a failover begins. PURE but for resolving the directories that are compared."""

from __future__ import annotations

import os
from dataclasses import dataclass

from replica_store.vault.operations import Kind, Operation

TTL_S = 24 * 3600.0
HANDOVER_S = 3600


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for; directories None: the failover's own. `boots`: start the machine as its history says. `plan`:
    id of the run of a plan for which it is done."""

    machine: str
    selector: str
    state: str | None = None
    mount: str | None = None
    check_command: str | None = None
    accept_damage: bool = False
    ttl_s: float = TTL_S
    handover_s: int = HANDOVER_S
    space_limit_bytes: int | None = None
    boots: bool = True
    plan: str | None = None


def is_same(found: Operation, kind: Kind, wanted: Wanted) -> bool:
    """Whether a failover that died while it began is what is asked for again."""
    return (
        found.state == "preparing"
        and found.kind == kind
        and found.plan == wanted.plan
        and found.point.selector == wanted.selector
        and (wanted.state is None or os.path.realpath(wanted.state) == found.places.state)
        and (wanted.mount is None or os.path.realpath(wanted.mount) == found.places.mount)
    )
