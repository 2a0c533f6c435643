"""Which failovers are to be ended without anybody asking, and why. Reads the clock it is given, and the filesystem."""

from __future__ import annotations

import os

from asrfs.model.quantities import NS_PER_SECOND, format_duration, format_size
from replica_store.failover.choice import free_bytes
from replica_store.failover.mounts import allocated_bytes
from replica_store.vault.operations import Operation

FREE_LEAST = 128 << 20
"""On the filesystem of a test: the vault may lie there, too."""


def cause_to_end(found: Operation, now_ns: int) -> str | None:
    """Why a failover that has not ended is due to be: a test that outlived its time or its room, a handover nobody
    waits for any more. None where there is no cause. Raises OSError."""
    handover = found.handover
    if handover is not None and found.state == "preparing" and now_ns >= handover.until_ns:
        is_moved = handover.is_used and found.point.lsn != handover.lsn  # by a person, who had it before
        return None if is_moved else "nobody carried on with it when its time was up"
    if found.kind != "test":
        return None
    if found.expires_ns is not None and now_ns >= found.expires_ns:
        return f"its time was up after {format_duration((found.expires_ns - found.begun_ns) / NS_PER_SECOND)}"
    if not os.path.isdir(found.places.state):
        return None
    if (free := free_bytes(found.places.state)) < FREE_LEAST:
        return f"it left {format_size(free)} free beside it, and what is protected comes first"
    limit = found.space_limit_bytes
    if limit is not None and (taken := allocated_bytes(found.places.state)) > limit:
        return f"it took {format_size(taken)}, more than its limit of {format_size(limit)}"
    return None
