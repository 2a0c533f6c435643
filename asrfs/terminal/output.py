"""How a verb answers: a table for people, one JSON document, or a progress bar while it works.

What draws is loaded when something is drawn: it takes as long as the rest of a verb, and scripts want JSON or nothing.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Document = dict[str, Any] | list[dict[str, Any]]
Step = Callable[[int, int], None]
"""Told how much of how much is done."""

_PIPE_WIDTH = 1 << 16


def answer(document: Document, as_json: bool, render: Callable[[Console], None]) -> None:
    """Print `document` as JSON, else what `render` draws."""
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        render(console())


def console() -> Console:
    """Where tables go. A pipe gets plain text of any width, so that nothing is cut off."""
    from rich.console import Console

    if sys.stdout is None:  # closed by who called us
        return Console(file=io.StringIO())
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    # No markup: what is shown holds paths, addresses and the other side's words, and these hold brackets.
    return Console(width=width, highlight=False, soft_wrap=True, markup=False, emoji=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table: head row, no frames."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, no_wrap=True)
    for row in rows:
        drawn.add_row(*("" if cell is None else str(cell) for cell in row))
    return drawn


def pairs(document: Mapping[str, object]) -> Table:
    """Names and values below each other."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, show_header=False)
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column()
    for key, value in document.items():
        drawn.add_row(key, "" if value is None else str(value))
    return drawn


@contextmanager
def progress_bar(what: str, *, in_bytes: bool = True) -> Iterator[Step]:
    """A bar on stderr, if that is a terminal, moved by calling what this gives with (done, total)."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import console, progress

    amount = progress.DownloadColumn(binary_units=True) if in_bytes else progress.MofNCompleteColumn()
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), amount, progress.TimeRemainingColumn())
    with progress.Progress(*columns, console=console.Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(what, total=None)
        yield lambda done, total: drawn.update(task, completed=done, total=total)
