"""`replica-store export`: a disk as it was, as a file."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from asrfs.errors import TemporaryError
from asrfs.model.quantities import format_size, format_time
from asrfs.terminal.output import pairs, progress_bar
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.points.builder import Cut, open_disks, resolve
from replica_store.points.exporter import Exported, ExportFormat, check_output, export_disk
from replica_store.points.map_maker import leave_runs
from replica_store.points.point_disk import FrameCache


@click.command()
@click.argument("machine")
@click.argument("disk")
@click.option(
    "--point",
    "selector",
    metavar="SELECTOR",
    required=True,
    help="latest, latest-processed, latest-application, a point's id or name, lsn:N or time:T.",
)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", required=True, help="File to make.")
@click.option(
    "--format", "format_name", type=click.Choice(["raw", "qcow2"]), default="raw", show_default=True, help="Of FILE."
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@pass_invocation
def export(
    invocation: Invocation,
    machine: str,
    disk: str,
    selector: str,
    output: Path,
    format_name: ExportFormat,
    force: bool,
) -> None:
    """Write DISK of MACHINE as it was at a point, sparse.

    The LSN that was chosen is printed: give it as lsn:N to cut other disks at the same instant.
    """
    begin = time.monotonic()
    with invocation.open_vault() as vault, _termination_cleans_up():
        check_output(output, format_name, force=force)
        cut = resolve(vault, machine, selector)
        with progress_bar("reading the history", in_bytes=False) as step:
            opened = open_disks(vault, cut, [disk], FrameCache(vault), progress=step)[disk]
        with progress_bar(f"exporting {disk}") as step:
            done = export_disk(opened, output, format_name=format_name, force=force, progress=step)
        leave_runs(vault, cut.machine.id, opened.state.disk.slot, opened.state.runs)
    document = _document(cut, disk, output, format_name, done, time.monotonic() - begin)
    shown = {key: value for key, value in document.items() if value is not None} | {
        "size_bytes": format_size(done.size_bytes),
        "data_bytes": format_size(done.data_bytes),
    }
    invocation.answer(document, lambda out: out.print(pairs(shown)))


def _document(cut: Cut, disk: str, output: Path, format_name: str, done: Exported, seconds: float) -> dict[str, Any]:
    return {
        "machine": cut.machine.name,
        "disk": disk,
        "lsn": cut.lsn,
        "epoch": cut.epoch,
        "time": format_time(cut.time_ns),
        "point": None if cut.point is None else cut.point.id,
        "output": str(output.absolute()),
        "format": format_name,
        "size_bytes": done.size_bytes,
        "data_bytes": done.data_bytes,
        "seconds": round(seconds, 3),
    }


@contextmanager
def _termination_cleans_up() -> Iterator[None]:
    """SIGTERM ends this by an error, so that no temporary file is left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TemporaryError("the export was interrupted: nothing is left of it, start it again")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
