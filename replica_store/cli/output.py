"""What every verb is called with, and how a verb answers: a table for people, one JSON document, or a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table

from replica_store.vault.vault import Vault

Document = dict[str, Any] | list[dict[str, Any]]
Step = Callable[[int, int], None]
"""Told how much of how much is done."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """Options that stand anywhere on the line. `vault`: the vault's directory."""

    vault: Path
    json: bool

    def open_vault(self, *, writable: bool = False) -> Vault:
        """The vault, beside whoever serves it; close it, or use it as a context. NotFoundError if there is none."""
        return Vault.open(str(self.vault), writable=writable)

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


@contextmanager
def progress_bar(what: str, *, in_bytes: bool = True) -> Iterator[Step]:
    """A bar on stderr, if that is a terminal, moved by calling what this gives with (done, total)."""
    amount: ProgressColumn = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
    drawn = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        amount,
        Remaining(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with drawn:
        task = drawn.add_task(what, total=None)
        yield lambda done, total: drawn.update(task, completed=done, total=total)
