"""`replica-store reprotect`: a machine that was failed over is protected again, in the other direction."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from asrfs.model.quantities import parse_duration
from asrfs.storage.system_clock import SystemClock
from asrfs.terminal.output import pairs
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.failover.leaving import status_of
from replica_store.failover.report import document
from replica_store.failover.reprotect import Reprotecting, Wish
from replica_store.vault.protection import state_of

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@click.argument("machine")
@click.option("--store", metavar="HOST:PORT", required=True, help="Management address of the other store.")
@click.option(
    "--token", metavar="TOKEN", required=True, help="From `replica-store token MACHINE` there; '-' reads stdin."
)
@click.option("--paused", is_flag=True, help="Send nothing until `asrfs resume`, so that seeds can be brought first.")
@click.option("--wait", is_flag=True, help="Return when the other store has all of it.")
@click.option("--timeout", metavar="D", help="Give up waiting after so long; exit code 1. It goes on.")
@pass_invocation
def reprotect(
    invocation: Invocation, machine: str, store: str, token: str, paused: bool, wait: bool, timeout: str | None
) -> None:
    """Have another store protect MACHINE, which was failed over and committed, from where it runs now.

    Its disks are made whole first. The other store compares what it has, or a seed of the old disks, and only what
    differs travels. The same command goes on where one has died; a token that is used up need not be replaced then.
    """
    text = sys.stdin.readline().strip() if token == "-" else token
    invocation.open_vault().close()

    def told(step: str) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(f"{step} …\n")
            sys.stderr.flush()

    seconds_max = None if timeout is None else parse_duration(timeout)
    wish = Wish(machine=machine, store=store, token=text, paused=paused, wait=wait, seconds_max=seconds_max)
    reprotecting = Reprotecting(str(invocation.vault), SystemClock(), told)
    found = reprotecting.run(wish)
    status = reprotecting.status or status_of(found)
    whole: dict[str, Any] = document(found) | {
        "protection": str(state_of(found)),
        "host": {key: status[key] for key in ("state", "reason", "epoch", "link", "link_reason", "lag")},
    }

    def render(out: Console) -> None:
        out.print(
            pairs(
                {
                    "machine": machine,
                    "protection": whole["protection"],
                    "store": found.reprotection.store if found.reprotection else store,
                    "there": status["state"] + (f" ({status['reason']})" if status["reason"] else ""),
                    "link": status["link"],
                    "epoch": status["epoch"],
                }
            )
        )
        if whole["next"] is not None:
            out.print(f"next: {whole['next']}", soft_wrap=True)

    invocation.answer(whole, render)
