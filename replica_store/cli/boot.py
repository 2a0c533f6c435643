"""`replica-store boot`: how a machine is started in its state at a point, and starting it so.

show MACHINE --point SELECTOR      start NAME --settings FILE --directory DIR --disk NAME=PLACE …      stop DIR

`start` and `stop` need no vault: they are for disks that are recovered already, and for whoever calls them in a network
namespace of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from asrfs.errors import BadInputError, NotFoundError
from asrfs.model.boot import BootSettings, read_boot
from asrfs.model.names import check_name
from asrfs.terminal.boot_table import boot_document, boot_rows
from asrfs.terminal.output import pairs
from replica_store.boot.qemu_machine import POWER_DOWN_S
from replica_store.boot.starting import RecoveredMachine
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.points.builder import resolve

_FILE_BYTES_MAX = 256 << 10


@click.group()
def boot() -> None:
    """How machines are started where they are recovered, as their hosts said."""


@boot.command("show")
@click.argument("machine")
@click.option(
    "--point",
    "selector",
    metavar="SELECTOR",
    default="latest",
    show_default=True,
    help="latest, latest-processed, latest-application, a point's id or name, lsn:N or time:T.",
)
@pass_invocation
def show_boot(invocation: Invocation, machine: str, selector: str) -> None:
    """Show what MACHINE's history says at a point."""
    with invocation.open_vault() as vault:
        cut = resolve(vault, machine, selector)
        settings = vault.boot_at(cut.machine.id, cut.lsn)
    document = boot_document(settings)
    invocation.answer(document, lambda out: out.print(pairs(boot_rows(document))))


@boot.command()
@click.argument("name")
@click.option(
    "--settings",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    required=True,
    help="TOML or JSON.",
)
@click.option(
    "--directory", type=click.Path(path_type=Path), metavar="DIR", required=True, help="For its console and its logs."
)
@click.option(
    "--disk",
    "disks",
    metavar="DISK=PLACE",
    multiple=True,
    required=True,
    help="A file, a device or nbd://HOST:PORT/NAME.",
)
@click.option("--root", metavar="DIR", default="", help="Mount filesystems below this directory.")
@click.option("--test", "is_test", is_flag=True, help="Only networks for tests; services are left alone.")
@pass_invocation
def start(
    invocation: Invocation, name: str, file: Path, directory: Path, disks: tuple[str, ...], root: str, is_test: bool
) -> None:
    """Start machine NAME, wait until it runs, and leave it running. One that runs already is only waited for."""
    check_name(name, "machine")
    settings, places = _settings(file), _places(disks)
    if is_test and settings.kind == "mount" and not root:
        raise BadInputError("a test mounts nothing where production would be: give --root")
    if root and not root.startswith("/"):
        raise BadInputError(f"--root {root}: write an absolute path")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    machine = RecoveredMachine(directory.absolute())
    seconds = machine.start(name, settings, places, root=root, is_test=is_test)
    document = {"name": name, "kind": settings.kind, "seconds": None if seconds is None else round(seconds, 3)}
    invocation.answer(document, lambda out: out.print(pairs(document)))


@boot.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--now", is_flag=True, help="Take its power at once, without pressing its power button first.")
@pass_invocation
def stop(invocation: Invocation, directory: Path, now: bool) -> None:
    """End the machine whose directory this is. Nothing happens if it does not run."""
    if not directory.is_dir():
        raise NotFoundError(f"there is no directory {directory}")
    RecoveredMachine(directory.absolute()).stop(gently_s=0.0 if now else POWER_DOWN_S)
    document = {"directory": str(directory), "running": False}
    invocation.answer(document, lambda out: out.print("it does not run"))


def _settings(file: Path) -> BootSettings:
    try:
        with file.open("rb") as opened:
            text = opened.read(_FILE_BYTES_MAX).decode()
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {file}") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise BadInputError(f"{file} is not a text") from None
    return read_boot(text, str(file))


def _places(disks: tuple[str, ...]) -> dict[str, str]:
    places: dict[str, str] = {}
    for each in disks:
        name, equals, place = each.partition("=")
        if not equals or not place:
            raise BadInputError(f"{each[:100]!r} is not DISK=PLACE, such as root=/mnt/root.img")
        if check_name(name, "disk") in places:
            raise BadInputError(f"disk {name} is given twice")
        if not place.startswith("nbd://"):
            if not os.path.exists(place):
                raise NotFoundError(f"there is no {place} for disk {name}")
            place = os.path.abspath(place)
        places[name] = place
    return places
