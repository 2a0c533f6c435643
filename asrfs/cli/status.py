"""`asrfs status`: how far the history has come, and whether anything is wrong."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import click

from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.daemon import control
from asrfs.daemon.state import StateDirectory
from asrfs.errors import TemporaryError
from asrfs.model.quantities import format_size
from asrfs.terminal.output import console, pairs, table

if TYPE_CHECKING:
    from rich.console import Group

_WATCH_INTERVAL_S = 0.5
_ANSWER_S_MAX = 4.0
_RESTART_S_MAX = 1.0
_RETRY_S = 0.05


@click.command()
@click.option("--watch", is_flag=True, help="Go on showing it until interrupted; with --json one document a line.")
@click.option("--check", is_flag=True, help="Exit 0 when healthy, 1 on warnings, 2 when critical.")
@pass_invocation
def status(invocation: Invocation, watch: bool, check: bool) -> int:
    """Show the state of the machine."""
    state = invocation.open_state()
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            show_until_interrupted(invocation, state)
        return 0
    document = read(state)
    invocation.answer(document, lambda out: out.print(draw(document)))
    return severity(document) if check else 0


def read(state: StateDirectory) -> dict[str, Any]:
    """The status document: from the agent, or from the files if it does not run or answer.

    One that has just died is waited for: it is being started again.
    """
    deadline = time.monotonic() + _RESTART_S_MAX
    while True:
        try:
            return control.call(state.socket_path("agent"), "status", seconds_max=_ANSWER_S_MAX)
        except control.UnreachableError:
            is_served = state.lock_holder("supervisor") is not None
            if not is_served or time.monotonic() >= deadline:
                break
        except TemporaryError:
            break
        time.sleep(_RETRY_S)
    from asrfs.daemon.agent_status import offline_status  # costs more than the rest of this verb; rarely needed

    return offline_status(state)


def severity(document: dict[str, Any]) -> int:
    levels = {alarm["severity"] for alarm in document["alarms"]}
    return 2 if "critical" in levels else 1 if levels else 0


def show_until_interrupted(invocation: Invocation, state: StateDirectory) -> None:
    if invocation.json:
        while True:
            click.echo(json.dumps(read(state)))
            time.sleep(_WATCH_INTERVAL_S)
    if not console().is_terminal:
        while True:
            console().print(draw(read(state)), "")
            time.sleep(_WATCH_INTERVAL_S)
    from rich.live import Live

    with Live(draw(read(state)), console=console(), refresh_per_second=4) as live:
        while True:
            time.sleep(_WATCH_INTERVAL_S)
            live.update(draw(read(state)))


def draw(document: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.text import Text

    lsn, lag, journal = document["lsn"], document["lag"], document["journal"]
    reason = f" ({document['reason']})" if document["reason"] else ""
    processes = ", ".join(f"{role} {pid or 'not running'}" for role, pid in document["processes"].items())
    rpo = document["achieved_rpo_seconds"]
    facts = {
        "machine": document["machine"],
        "state": f"{document['state']}{reason}",
        "epoch": document["epoch"],
        "LSN": ", ".join(f"{name} {value}" for name, value in lsn.items()),
        "lag": f"{lag['records']} records, {format_size(lag['bytes'])}, {lag['seconds']:.1f} s",
        "achieved RPO": "unknown" if rpo is None else f"{rpo:.1f} s",
        "journal": f"{format_size(journal['bytes'])} of {format_size(journal['quota_bytes'])}",
        "link": document["link"],
        "processes": processes,
    }
    rows = [
        [disk["name"], format_size(disk["size_bytes"]), format_size(disk["dirty_bytes"]), disk["image"]]
        for disk in document["disks"]
    ]
    parts: list[Any] = [pairs(facts), Text(), table(("DISK", "SIZE", "DIRTY", "IMAGE"), rows)]
    hydrated = [
        [disk["name"], format_size(each["bytes_done"]), format_size(each["bytes_total"]), each["state"]]
        for disk in document["disks"]
        if (each := disk["hydration"]) is not None
    ]
    if hydrated:
        parts.append(table(("HYDRATED", "DONE", "OF", "STATE"), hydrated))
    for alarm in document["alarms"]:
        colour = "red" if alarm["severity"] == "critical" else "yellow"
        parts.append(Text(f"{alarm['severity']}: {alarm['text']}", style=colour))
    return Group(*parts)
