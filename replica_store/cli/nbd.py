"""`replica-store nbd`: the disks of a machine as network block devices, in the foreground."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from asrfs.errors import BadInputError, NotFoundError
from asrfs.storage.priority import be_usual
from asrfs.storage.system_clock import SystemClock
from asrfs.terminal.output import progress_bar
from replica_store.cli.invocation import Invocation, pass_invocation
from replica_store.nbd.admission import check_address, tls_terms, write_credentials
from replica_store.nbd.exports import Export, FileExport, PointExport, image_files
from replica_store.nbd.server import NbdServer, run_server
from replica_store.points.builder import disks_of, open_disks, resolve
from replica_store.points.point_disk import FrameCache
from replica_store.vault.vault import Vault

NBD_PORT = 10809


@click.command()
@click.argument("machine")
@click.option(
    "--point",
    "selector",
    metavar="SELECTOR",
    help="latest, latest-processed, latest-application, a point's id or name, lsn:N or time:T. Read-only.",
)
@click.option(
    "--mount",
    "directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Instead of a point: where the recovered machine has its disks, DIR/DISK.img. They can be written.",
)
@click.option("--disk", "disks", metavar="DISK", multiple=True, help="Only this one; may be given again.")
@click.option("--read-only", is_flag=True, help="Nothing can be written; with --mount.")
@click.option("--host", metavar="HOST", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=NBD_PORT, show_default=True, help="0 picks one.")
@click.option("--tls", is_flag=True, help="Only clients with a certificate of this vault's authority.")
@click.option(
    "--credentials",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Put a client's certificate for these disks into DIR, good for a week; with --tls.",
)
@pass_invocation
def nbd(
    invocation: Invocation,
    machine: str,
    selector: str | None,
    directory: Path | None,
    disks: tuple[str, ...],
    read_only: bool,
    host: str,
    port: int,
    tls: bool,
    credentials: Path | None,
) -> None:
    """Export MACHINE's disks, each by its name, to NBD clients until SIGTERM. Prints `ready HOST:PORT`."""
    be_usual()
    _check(selector, directory, read_only, host, tls, credentials)
    with invocation.open_vault() as vault:
        machine_id = vault.machine(machine).id
        if selector is not None:
            opened = _points(vault, machine, selector, disks)
        else:
            assert directory is not None
            opened = _files(directory, disks, read_only)
        with _closing(opened) as exports:
            if credentials is not None:
                write_credentials(vault, machine_id, str(credentials), SystemClock().time_ns())
            terms = tls_terms(vault, machine_id) if tls else None
            server = NbdServer({e.offer.name: e for e in exports}, tls=terms, report=_report)
            run_server(server, host, port, _announce)


def _check(
    selector: str | None, directory: Path | None, read_only: bool, host: str, tls: bool, credentials: Path | None
) -> None:
    if (selector is None) == (directory is None):
        raise BadInputError("choose what to export: either --point SELECTOR or --mount DIR")
    if read_only and directory is None:
        raise BadInputError("--read-only goes with --mount: a point can never be written")
    if credentials is not None and not tls:
        raise BadInputError("--credentials goes with --tls: without TLS nobody is asked for them")
    if not tls:
        check_address(host)


def _points(vault: Vault, machine: str, selector: str, names: Sequence[str]) -> list[Export]:
    cut = resolve(vault, machine, selector)
    chosen = list(dict.fromkeys(names)) or [disk.name for disk in disks_of(vault, cut)]
    if not chosen:
        raise NotFoundError(f"machine {machine} has no disk at LSN {cut.lsn}")
    with progress_bar("reading the history", in_bytes=False) as step:
        opened = open_disks(vault, cut, chosen, FrameCache(vault), progress=step)
    return [PointExport(opened[name], name, f"{machine} at LSN {cut.lsn}") for name in chosen]


def _files(directory: Path, names: Sequence[str], read_only: bool) -> list[Export]:
    if not directory.is_dir():
        raise NotFoundError(f"there is no directory {directory}: name the mount of a recovered machine")
    there = image_files(os.path.abspath(directory))
    chosen = list(dict.fromkeys(names)) or list(there)
    missing = [name for name in chosen if name not in there]
    if missing or not chosen:
        known = ", ".join(there) or "no disk"
        raise NotFoundError(f"{directory} has no {(missing or ['DISK'])[0]}.img: it has {known}")
    opened: list[Export] = []
    try:
        for name in chosen:
            opened.append(FileExport(there[name], name, read_only=read_only))
    except BaseException:
        _close(opened)
        raise
    return opened


@contextmanager
def _closing(exports: list[Export]) -> Iterator[list[Export]]:
    try:
        yield exports
    finally:
        _close(exports)


def _close(exports: Sequence[Export]) -> None:
    for export in exports:
        export.close()


def _announce(address: str) -> None:
    sys.stdout.write(f"ready {address}\n")
    sys.stdout.flush()


def _report(line: str) -> None:
    sys.stderr.write(f"replica-store: {' '.join(line.split())}\n")
    sys.stderr.flush()
