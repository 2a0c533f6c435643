"""Entry of `asrfs`: the verbs, and the options that stand anywhere on the line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import ClassVar

import click

import asrfs
from asrfs.cli.invocation import Invocation
from asrfs.terminal import program as frame
from asrfs.terminal import surroundings

STATE_DEFAULT = "/var/lib/asrfs"


class HostVerbs(frame.Verbs):
    """One file a verb."""

    package = "asrfs.cli"
    places: ClassVar = {
        "init": "init:init",
        "disk": "disk:disk",
        "enroll": "enroll:enroll",
        "serve": "serve:serve",
        "attach": "attach:attach",
        "detach": "attach:detach",
        "point": "point:point",
        "hooks": "hooks:hooks",
        "drain": "drain:drain",
        "verify": "verify:verify",
        "status": "status:status",
        "pause": "pause:pause",
        "resume": "pause:resume",
        "resync": "resync:resync",
        "boot": "boot:boot",
        "set": "settings:set_settings",
        "settings": "settings:show_settings",
        "inspect": "inspect:inspect",
    }


@click.group(cls=HostVerbs, context_settings=frame.CONTEXT)
@click.version_option(asrfs.__version__, "--version", message="%(version)s")
@click.option("--state", metavar="DIR", help="State directory; else $ASRFS_STATE, else /var/lib/asrfs.")
@click.option("--json", is_flag=True, help="Print one JSON document instead of a table.")
def program(state: str | None, json: bool) -> None:
    """Virtual disks whose every write is journaled here, replicated, and recoverable at any moment.

    --state and --json may stand anywhere on the line.
    """


def main() -> None:
    """Run the command of this process's words and exit."""
    surroundings.settle()
    sys.exit(run(sys.argv[1:]))


def run(words: list[str]) -> int:
    """Run one command; the exit code."""

    def invoke() -> tuple[list[str], Invocation]:
        rest, state, json = frame.take_global_options(words, "--state")
        return rest, Invocation(Path(state or os.environ.get("ASRFS_STATE") or STATE_DEFAULT), json)

    return frame.run(program, "asrfs", invoke)


if __name__ == "__main__":
    main()
