"""`replica-store rebuild`: a new catalog from the objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from asrfs.errors import IntegrityError
from asrfs.terminal.output import pairs, progress_bar
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.vault.rebuild import rebuild as rebuild_catalog

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@pass_invocation
def rebuild(invocation: Invocation) -> None:
    """Make the catalog again from the vault's objects. Not while the store serves. Unused tokens are lost."""
    with progress_bar("reading log objects", in_bytes=False) as step:
        rebuilt = rebuild_catalog(str(invocation.vault), step)
    document = {
        "machines": rebuilt.machines,
        "objects": rebuilt.objects,
        "points": rebuilt.points,
        "left_out": rebuilt.left_out,
        "damages": rebuilt.damages,
    }

    def render(out: Console) -> None:
        out.print(pairs({key: value for key, value in document.items() if key != "damages"}))
        for text in rebuilt.damages:
            out.print(f"damaged: {text}", markup=False)

    invocation.answer(document, render)
    if rebuilt.damages:
        more = f" (and {len(rebuilt.damages) - 1} more)" if len(rebuilt.damages) > 1 else ""
        raise IntegrityError(f"the catalog was made, but not all is in it: {rebuilt.damages[0]}{more}")
