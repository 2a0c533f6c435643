"""Taking a recovered machine away so that nothing is left: loop devices, processes, mounts, network, directories.

Every step finds what it takes away by itself and does nothing where there is nothing, so after any death the same is
done again. What the machine wrote is given up: it is not flushed first.
"""

from __future__ import annotations

import msgspec

from replica_store.failover import booting, mounts, network, places, processes
from replica_store.vault.operations import Operation, change

_TREE_S = 10.0


def discard(operation: Operation) -> None:
    """End and unmount everything, leaving directories. Raises TemporaryError for what resists."""
    where = operation.places
    copy = places.copy_of(where)
    booting.stop(operation)
    for directory in (where.mount, copy):
        mounts.release_loops(directory)
    for part in ("tool", "copy", "machine"):
        processes.end(operation.id, part)
    for directory in (where.mount, copy):
        mounts.release_loops(directory)  # of a tool that died
        mounts.take_away(directory)
    processes.end(operation.id, "tree", gently_s=_TREE_S)
    mounts.take_away(places.tree_of(where))
    processes.end(operation.id, None)
    if where.namespace is not None:
        network.remove(operation.id, where.namespace)


def discard_copy(operation: Operation) -> None:
    """The copy alone, with its directory."""
    copy = places.copy_of(operation.places)
    mounts.release_loops(copy)
    processes.end(operation.id, "copy")
    mounts.take_away(copy)
    places.empty(copy)


def tidy(root: str, operation: Operation) -> Operation:
    """Take all of an operation away and note that nothing remains, durably. The caller has its lock.

    `operation` is as its sealed object says.
    """
    discard(operation)
    places.remove(operation.places)
    return change(root, operation.id, lambda vault, now: msgspec.structs.replace(now, remains=False))
