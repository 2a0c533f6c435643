"""`asrfs attach` and `asrfs detach`: a disk as a loop device, with a filesystem if wanted."""

from __future__ import annotations

import os

import click

from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.daemon import attachments, loop_devices
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError, BadInputError, RefusedError
from asrfs.terminal.output import pairs


@click.command()
@click.argument("disk", metavar="DISK")
@click.option("--format", "kind", type=click.Choice(["ext4", "xfs"]), help="Make a filesystem; erases the disk.")
@click.option("--on", "directory", metavar="DIR", help="Mount its filesystem there.")
@click.option("--yes", is_flag=True, help="Erase with --format what is on the disk already.")
@pass_invocation
def attach(invocation: Invocation, disk: str, kind: str | None, directory: str | None, yes: bool) -> None:
    """Attach DISK as a loop device with direct I/O."""
    state = invocation.open_state()
    path = served_path(state, disk)
    state.check_not_promoting()
    if directory is not None:
        directory = loop_devices.check_mount_point(directory)
    for lost in attachments.stale(state):
        if lost.disk == disk:
            raise RefusedError(str(lost))
    device = loop_devices.attach(path)
    try:
        attachments.remember(state, disk, device)
        if kind is not None:
            _check_may_erase(disk, loop_devices.content_of(device), kind, yes)
            loop_devices.make_filesystem(device, kind)
        if directory is not None:
            loop_devices.mount(device, directory)
    except (AsrfsError, OSError):
        loop_devices.detach(device)
        raise
    document = {"disk": disk, "device": device, "format": kind, "on": directory}
    invocation.answer(document, lambda out: out.print(pairs({k: v for k, v in document.items() if v})))


@click.command()
@click.argument("disk", metavar="DISK")
@pass_invocation
def detach(invocation: Invocation, disk: str) -> None:
    """Unmount what is mounted from DISK's loop device, and detach it."""
    state = invocation.open_state()
    loops = [lost.loop for lost in attachments.stale(state) if lost.disk == disk]
    for loop in loops:
        loop_devices.let_go(loop)
    if not loops or state.lock_holder("disk_server") is not None:
        path = served_path(state, disk)
        live = [loop for loop in loop_devices.loop_devices_below(os.path.dirname(path)) if loop.backing_file == path]
        for loop in live:
            for directory in loop.mounted_on:
                loop_devices.unmount(directory)
            loop_devices.detach(loop.device)
        loops += live
    if not loops:
        raise RefusedError(f"disk {disk} is not attached")
    document = {"disk": disk, "devices": [loop.device for loop in loops]}
    invocation.answer(document, lambda out: out.print(f"disk {disk} is detached from {loops[0].device}"))


def _check_may_erase(disk: str, content: str, kind: str, yes: bool) -> None:
    if content and not yes:
        raise BadInputError(f"disk {disk} holds {content}: this would erase it and make {kind}: repeat with --yes")


def served_path(state: StateDirectory, disk: str) -> str:
    """Where the disk appears in the mount. NotFoundError for no such disk, RefusedError if it is not served."""
    machine = state.load_machine()
    machine.disk(disk)
    served = state.load_served()
    if served is None or state.lock_holder("disk_server") is None:
        raise RefusedError(f"machine {machine.name} is not being served: start `asrfs serve --mount DIR`")
    return os.path.join(os.path.realpath(served.mount), f"{disk}.img")
