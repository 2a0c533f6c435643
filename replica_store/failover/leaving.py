"""What a recovered machine says of itself, and whether what it leaves behind may be removed."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from asrfs.errors import RefusedError, TemporaryError, foreign_line
from asrfs.model.rejoining import FENCE_FILE
from replica_store.failover import processes
from replica_store.vault.operations import Operation

_ANSWER_S_MAX = 60.0


def asrfs(found: Operation, *words: str, said: bytes = b"") -> str:
    """What a verb of the host's program says for the recovered machine. Raises what it fails with."""
    command = processes.program("asrfs.cli.main", "--state", found.places.state, *words)
    return processes.run(found.id, command, said=said, seconds_max=_ANSWER_S_MAX)[1]


def status_of(found: Operation) -> dict[str, Any]:
    """What the recovered machine says of itself. Raises AsrfsError."""
    text = asrfs(found, "--json", "status")
    try:
        document: dict[str, Any] = msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError):
        raise TemporaryError(f"{found.places.state}: its status cannot be read: {foreign_line(text)[:200]}") from None
    return document


def check_left_behind(found: Operation, *, gives_up: bool) -> None:
    """Raise RefusedError unless a returned failover's machine is one that may be removed: it has learnt that it was
    left behind, and all that it ever wrote is at a store (I7), or `gives_up`: a person says that the rest may go."""
    state = found.places.state
    if not os.path.isdir(state):
        return
    if not os.path.exists(os.path.join(state, FENCE_FILE)):
        raise RefusedError(
            f"the machine in {state} does not know that another side of it goes on, and may be the one that does: let "
            "it reach its store, which tells it, or see for yourself and remove it"
        )
    if not gives_up and (records := status_of(found)["lag"]["records"]):
        raise RefusedError(
            f"the machine in {state} has {records} records that no store has; points that it made since it was left "
            "behind count, too: see whether they are wanted, and repeat with --yes if not"
        )
