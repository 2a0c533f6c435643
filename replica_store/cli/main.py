"""Entry of `replica-store`: the verbs, and the options that stand anywhere on the line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import ClassVar

import click

import replica_store
from asrfs.errors import BadInputError
from asrfs.terminal import program as frame
from asrfs.terminal import surroundings
from replica_store.cli.invocation import Invocation

VAULT_DEFAULT = "/var/lib/replica-store"


class StoreVerbs(frame.Verbs):
    """One file a verb."""

    package = "replica_store.cli"
    places: ClassVar = {
        "init": "init:init",
        "serve": "serve:serve",
        "token": "token:token",
        "machine": "machine:machine",
        "point": "point:point",
        "policy": "policy:policy",
        "group": "group:group",
        "seed": "seed:seed",
        "failover": "failover:failover",
        "reprotect": "reprotect:reprotect",
        "failback": "failback:failback",
        "export": "export:export",
        "promote": "promote:promote",
        "promotions": "promote:list_promotions",
        "mount": "mount:mount",
        "nbd": "nbd:nbd",
        "boot": "boot:boot",
        "plan": "plan:plan",
        "verify": "verify:verify",
        "rebuild": "rebuild:rebuild",
    }


@click.group(cls=StoreVerbs, context_settings=frame.CONTEXT)
@click.version_option(replica_store.__version__, "--version", message="%(version)s")
@click.option("--vault", metavar="DIR", help="The vault; else $REPLICA_STORE_VAULT, else /var/lib/replica-store.")
@click.option("--json", is_flag=True, help="Print one JSON document instead of a table.")
def program(vault: str | None, json: bool) -> None:
    """Keeps the histories of protected machines and gives back any moment of them.

    --vault and --json may stand anywhere on the line.
    """


def main() -> None:
    """Run the command of this process's words and exit."""
    surroundings.settle()
    sys.exit(run(sys.argv[1:]))


def run(words: list[str]) -> int:
    """Run one command; the exit code."""

    def invoke() -> tuple[list[str], Invocation]:
        rest, given, json = frame.take_global_options(words, "--vault")
        vault = given or os.environ.get("REPLICA_STORE_VAULT") or VAULT_DEFAULT
        if "://" in vault:
            raise BadInputError(f"{vault}: a vault is a directory; object stores are not supported by this version")
        return rest, Invocation(Path(vault), json)

    return frame.run(program, "replica-store", invoke)


if __name__ == "__main__":
    main()
