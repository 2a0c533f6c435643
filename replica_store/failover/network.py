"""A network of its own for a test failover: a namespace that has only loopback, known by its name until it goes."""

from __future__ import annotations

import os

from replica_store.failover.processes import run

_DIRECTORY = "/run/netns"


def namespace_of(operation_id: str) -> str:
    """Its name."""
    return f"asrfs-{operation_id[:12]}"


def exists(namespace: str) -> bool:
    """Whether it is there."""
    return os.path.lexists(f"{_DIRECTORY}/{namespace}")


def make(operation_id: str, namespace: str) -> None:
    """Make it, anew if there is one: what was in it has ended. Raises RefusedError, NotFoundError."""
    remove(operation_id, namespace)
    run(operation_id, ["ip", "netns", "add", namespace])
    run(operation_id, ["ip", "-n", namespace, "link", "set", "lo", "up"])


def remove(operation_id: str, namespace: str) -> None:
    """Nothing happens if there is none."""
    if exists(namespace):
        run(operation_id, ["ip", "netns", "delete", namespace])
