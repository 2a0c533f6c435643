"""Notes, inside a store's process, what it is about to say to its host, and where two recorded devices stood then.

Nobody outside can know the instant at which a word is given: by the time an acknowledgement is read, what it promised
may have become durable by chance. So the store is asked from within: `Ingester` has returned, nothing is sent yet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asrfs.daemon import control

WITNESS = "ASRFS_PROOF_WITNESS"


class Instant(NamedTuple):
    """A device when it had got `appended` writes, of which a flush had covered the first `flushed`."""

    appended: int
    flushed: int


class Seen(NamedTuple):
    """LSN 0: log objects have come and are about to be stored. Else everything up to `lsn` is about to be promised."""

    lsn: int
    host: Instant
    vault: Instant


def ask_instant(socket: str) -> Instant:
    """Where the device of the machine behind this control socket stands."""
    found = control.call(socket, "positions")
    return Instant(found["appended"], found["durable"])


def environment(notes: Path, host: str, vault: str) -> dict[str, str]:
    """What a store's process has to be given so that it notes into `notes`."""
    return {WITNESS: json.dumps([str(notes), host, vault])}


def read_notes(notes: Path) -> list[Seen]:
    """In the order in which things happened."""
    found = []
    for line in notes.read_text().splitlines():
        lsn, host, vault = json.loads(line)
        found.append(Seen(lsn, Instant(*host), Instant(*vault)))
    return found


def apply_named() -> None:
    """Watch the ingest of this process, if its environment says so."""
    wanted = os.environ.get(WITNESS)
    if not wanted:
        return
    from replica_store.ingest.ingester import Ingester  # hosts' processes do not have it

    notes, host, vault = json.loads(wanted)
    take, begin_session = Ingester.take, Ingester.begin_session

    def note(lsn: int) -> None:
        line = json.dumps([lsn, ask_instant(host), ask_instant(vault)]) + "\n"
        fd = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)

    def take_seen(ingester: Ingester, batch: Sequence[Any]) -> Any:
        note(0)
        taken = take(ingester, batch)
        if taken.acknowledged:
            note(taken.acknowledged[-1].lsn)
        return taken

    def begin_session_seen(ingester: Ingester, *arguments: Any) -> Any:
        position = begin_session(ingester, *arguments)
        if position.lsn:
            note(position.lsn)
        return position

    Ingester.take = take_seen  # type: ignore[method-assign]
    Ingester.begin_session = begin_session_seen  # type: ignore[method-assign]
