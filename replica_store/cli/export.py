"""`replica-store export`: disks as they were, as files: one, or all of a machine or a group, cut together."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
import msgspec

from asrfs.errors import BadInputError, NotFoundError, TemporaryError
from asrfs.model.boot import encode_boot
from asrfs.model.quantities import format_size, format_time
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import write_atomically
from asrfs.terminal.output import pairs, progress_bar, table
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.points.builder import Cut, disks_of, open_disks, resolve
from replica_store.points.exporter import Exported, ExportFormat, check_output, export_disk, export_disks
from replica_store.points.group_cuts import group_cuts
from replica_store.points.map_maker import leave_runs
from replica_store.points.point_disk import FrameCache
from replica_store.vault.groups import read_groups
from replica_store.vault.vault import Vault

if TYPE_CHECKING:
    from rich.console import Console

_ENDINGS: dict[ExportFormat, str] = {"raw": ".img", "qcow2": ".qcow2"}


@click.command()
@click.argument("target", metavar="MACHINE|GROUP")
@click.argument("disk", required=False)
@click.option(
    "--point",
    "selector",
    metavar="SELECTOR",
    required=True,
    help="latest, latest-processed, latest-application, a point's id or name, lsn:N or time:T.",
)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="File to make of DISK.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="For all disks, cut together: DISK.img in it.",
)
@click.option(
    "--format", "format_name", type=click.Choice(["raw", "qcow2"]), default="raw", show_default=True, help="Of files."
)
@click.option("--force", is_flag=True, help="Replace files that exist.")
@pass_invocation
def export(
    invocation: Invocation,
    target: str,
    disk: str | None,
    selector: str,
    output: Path | None,
    directory: Path | None,
    format_name: ExportFormat,
    force: bool,
) -> None:
    """Write DISK of MACHINE as it was at a point, sparse; or, without DISK, all disks of MACHINE or of GROUP.

    All are of one instant, those of a group of one of its points: each machine in DIR/MACHINE then. MACHINE.json comes
    last and says that all is there, with the boot settings of then. For one disk the LSN that was chosen is printed:
    lsn:N cuts others at the same instant.
    """
    begin = time.monotonic()
    with invocation.open_vault() as vault, _termination_cleans_up():
        if disk is not None and output is not None and directory is None:
            document = _export_one(vault, target, disk, selector, output, format_name, force=force)
        elif disk is None and output is None and directory is not None:
            document = _export_all(vault, target, selector, directory, format_name, force=force)
        else:
            raise BadInputError("name a DISK and its --output, or a --directory for all disks")
    document["seconds"] = round(time.monotonic() - begin, 3)
    invocation.answer(document, lambda out: _render(out, document))


def _export_one(
    vault: Vault, machine: str, disk: str, selector: str, output: Path, format_name: ExportFormat, *, force: bool
) -> dict[str, Any]:
    check_output(output, format_name, force=force)
    cut = resolve(vault, machine, selector)
    with progress_bar("reading the history", in_bytes=False) as step:
        opened = open_disks(vault, cut, [disk], FrameCache(vault), progress=step)[disk]
    with progress_bar(f"exporting {disk}") as step:
        done = export_disk(opened, output, format_name=format_name, force=force, progress=step)
    leave_runs(vault, cut.machine.id, opened.state.disk.slot, opened.state.runs)
    return _cut_document(cut) | {"disk": disk, "format": format_name} | _file_document(output, done)


def _export_all(
    vault: Vault, target: str, selector: str, directory: Path, format_name: ExportFormat, *, force: bool
) -> dict[str, Any]:
    """Nothing is written before every name is free and every point is there."""
    group = next((each for each in read_groups(vault.catalog).groups if each.name == target), None)
    selectors = {target: selector} if group is None else group_cuts(vault, group, selector)
    cuts = {name: resolve(vault, name, where) for name, where in selectors.items()}
    places = {name: directory if group is None else directory / name for name in cuts}
    outputs = {
        name: {disk.name: places[name] / f"{disk.name}{_ENDINGS[format_name]}" for disk in disks_of(vault, cut)}
        for name, cut in cuts.items()
    }
    for name, paths in outputs.items():
        if not paths:
            raise NotFoundError(f"machine {name} has no disk at LSN {cuts[name].lsn}: choose a later point")
        _make_directory(places[name])
        for path in (*paths.values(), _described(places[name], name)):
            check_output(path, format_name, force=force)
    machines = []
    for name, cut in cuts.items():
        _forget(_described(places[name], name))  # with --force: it must not speak of files that are being replaced
        machine = _export_machine(vault, cut, outputs[name], format_name, force=force)
        content = msgspec.json.format(msgspec.json.encode(machine)) + b"\n"
        write_atomically(DirectoryStorage(str(places[name])), _described(places[name], name).name, content)
        machines.append(machine)
    return {"target": target, "directory": str(directory.absolute()), "format": format_name, "machines": machines}


def _export_machine(
    vault: Vault, cut: Cut, outputs: dict[str, Path], format_name: ExportFormat, *, force: bool
) -> dict[str, Any]:
    name = cut.machine.name
    with progress_bar(f"reading the history of {name}", in_bytes=False) as step:
        opened = open_disks(vault, cut, list(outputs), FrameCache(vault), progress=step)
    with progress_bar(f"exporting {name}") as step:
        done = export_disks(
            {path: opened[disk] for disk, path in outputs.items()}, format_name=format_name, force=force, progress=step
        )
    for disk in opened.values():
        leave_runs(vault, cut.machine.id, disk.state.disk.slot, disk.state.runs)
    disks = [{"disk": disk} | _file_document(path, done[path]) for disk, path in outputs.items()]
    boot = msgspec.json.decode(encode_boot(vault.boot_at(cut.machine.id, cut.lsn)))
    return _cut_document(cut) | {"disks": disks, "boot": boot}


def _make_directory(directory: Path) -> None:
    """With all above it, durably: what is exported into it is said to be there."""
    missing = [path for path in (directory, *directory.absolute().parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        DirectoryStorage(str(path.absolute().parent)).sync_directory("")


def _forget(file: Path) -> None:
    if file.exists():
        file.unlink()
        DirectoryStorage(str(file.absolute().parent)).sync_directory("")


def _described(directory: Path, machine: str) -> Path:
    return directory / f"{machine}.json"


def _render(out: Console, document: dict[str, Any]) -> None:
    shown = {key: value for key, value in document.items() if value is not None and key != "machines"}
    shown |= {key: format_size(shown[key]) for key in ("size_bytes", "data_bytes") if key in shown}
    out.print(pairs(shown))
    rows = [
        (machine["machine"], machine["lsn"], machine["time"], disk["disk"], format_size(disk["data_bytes"]))
        for machine in document.get("machines", ())
        for disk in machine["disks"]
    ]
    if rows:
        out.print()
        out.print(table(("MACHINE", "LSN", "TIME", "DISK", "DATA"), rows))


def _cut_document(cut: Cut) -> dict[str, Any]:
    return {
        "machine": cut.machine.name,
        "lsn": cut.lsn,
        "epoch": cut.epoch,
        "time": format_time(cut.time_ns),
        "point": None if cut.point is None else cut.point.id,
    }


def _file_document(output: Path, done: Exported) -> dict[str, Any]:
    return {"output": str(output.absolute()), "size_bytes": done.size_bytes, "data_bytes": done.data_bytes}


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
