"""What every verb is called with, and how a verb answers: a table for people or one JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from asrfs.daemon.state import StateDirectory

Document = dict[str, Any] | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Invocation:
    """Options that stand anywhere on the line. `state`: the state directory."""

    state: Path
    json: bool

    def open_state(self) -> StateDirectory:
        """The state directory; NotFoundError if there is none."""
        return StateDirectory.open(str(self.state))

    def answer(self, document: Document, render: Callable[[Console], None]) -> None:
        """Print `document` with `--json`, else what `render` draws."""
        if self.json:
            click.echo(json.dumps(document, indent=2))
        else:
            render(console())


pass_invocation = click.make_pass_decorator(Invocation)


def console() -> Console:
    """Where tables go. A pipe gets plain text of any width, so that nothing is cut off."""
    width = None if sys.stdout.isatty() else 200
    return Console(width=width, highlight=False, soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table: head row, no frames."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, no_wrap=True)
    for row in rows:
        drawn.add_row(*("" if cell is None else str(cell) for cell in row))
    return drawn


def pairs(document: Mapping[str, object]) -> Table:
    """Names and values below each other."""
    drawn = Table(box=None, pad_edge=False, show_header=False)
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column()
    for key, value in document.items():
        drawn.add_row(key, "" if value is None else str(value))
    return drawn
