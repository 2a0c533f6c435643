"""What every verb of `replica-store` is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from asrfs.terminal import output
from replica_store.vault.vault import Vault

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Invocation:
    """Options that stand anywhere on the line. `vault`: the vault's directory."""

    vault: Path
    json: bool

    def open_vault(self, *, writable: bool = False) -> Vault:
        """The vault, beside whoever serves it; close it, or use it as a context. NotFoundError if there is none."""
        return Vault.open(str(self.vault), writable=writable)

    def answer(self, document: output.Document, render: Callable[[Console], None]) -> None:
        """Print `document` with `--json`, else what `render` draws."""
        output.answer(document, self.json, render)


pass_invocation = click.make_pass_decorator(Invocation)
