"""`replica-store init`: make a vault."""

from __future__ import annotations

import click

from asrfs.storage.system_clock import SystemClock
from asrfs.terminal.output import pairs
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.vault.vault import Vault


@click.command()
@click.option("--name", metavar="NAME", default="vault", show_default=True, help="What people call the store.")
@pass_invocation
def init(invocation: Invocation, name: str) -> None:
    """Make a vault: certificate authority, keys, catalog. The directory must be new or empty."""
    with Vault.create(str(invocation.vault), name, SystemClock()) as vault:
        document = {
            "vault": vault.root,
            "id": vault.id,
            "name": vault.name,
            "fingerprint": vault.keys.server_fingerprint().hex(),
        }
    invocation.answer(document, lambda out: out.print(pairs(document)))
