"""`asrfs verify`: compare every disk with what the store has of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from asrfs.cli.agent import call_agent
from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.daemon.state import StateDirectory
from asrfs.errors import IntegrityError
from asrfs.terminal.output import pairs, progress_bar, table

if TYPE_CHECKING:
    from rich.console import Group


@click.command()
@pass_invocation
def verify(invocation: Invocation) -> None:
    """Compare all disks with the replica, by digests; exit code 5 if anything differs.

    Nothing is changed, and writes go on: what is only on its way to the store does not count as different.
    """
    document = wait_for_outcome(invocation.open_state())
    invocation.answer(document, lambda out: out.print(draw(document)))
    if different := document["chunks_different"]:
        names = ", ".join(disk["name"] for disk in document["disks"] if disk["chunks_different"])
        raise IntegrityError(
            f"{different} of {document['chunks_compared']} chunks of 64 KiB differ from the replica, on {names}: "
            "heal it with `asrfs resync --full-scan --now`"
        )


def wait_for_outcome(state: StateDirectory) -> dict[str, Any]:
    """Ask until it is there. Raises what the comparison failed with."""
    job = None
    with progress_bar("comparing") as step:
        while True:
            said = call_agent(state, "verify", job=job)
            job = said["job"]
            if said["outcome"] is not None:
                return dict(said["outcome"])
            if said["doing"] == "compare":
                step(said["done"], said["total"])


def draw(document: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.text import Text

    keys = ("name", "chunks_compared", "chunks_different")
    rows = [[disk[key] for key in keys] + [_places(disk)] for disk in document["disks"]]
    facts = {key.replace("_", " "): document[key] for key in ("bytes_sent", "seconds")}
    return Group(table(("DISK", "CHUNKS", "DIFFERENT", "WHERE"), rows), Text(), pairs(facts))


def _places(disk: dict[str, Any]) -> str:
    """The first few extents, as bytes."""
    shown = ", ".join(f"{offset}+{length}" for offset, length in disk["extents"][:3])
    return shown + (", …" if len(disk["extents"]) > 3 else "")
