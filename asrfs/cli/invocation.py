"""What every verb of `asrfs` is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from asrfs.daemon.state import StateDirectory
from asrfs.terminal import output

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Invocation:
    """Options that stand anywhere on the line. `state`: the state directory."""

    state: Path
    json: bool

    def open_state(self) -> StateDirectory:
        """The state directory; NotFoundError if there is none."""
        return StateDirectory.open(str(self.state))

    def answer(self, document: output.Document, render: Callable[[Console], None]) -> None:
        """Print `document` with `--json`, else what `render` draws."""
        output.answer(document, self.json, render)


pass_invocation = click.make_pass_decorator(Invocation)
