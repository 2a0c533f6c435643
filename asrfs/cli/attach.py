"""`asrfs attach` and `asrfs detach`: a disk as a loop device, with a filesystem if wanted."""

from __future__ import annotations

import os

import click

from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.daemon import loop_devices
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError, NotFoundError, RefusedError
from asrfs.terminal.output import pairs


@click.command()
@click.argument("disk", metavar="DISK")
@click.option("--format", "kind", type=click.Choice(["ext4", "xfs"]), help="Make a filesystem; erases the disk.")
@click.option("--on", "directory", metavar="DIR", help="Mount its filesystem there.")
@pass_invocation
def attach(invocation: Invocation, disk: str, kind: str | None, directory: str | None) -> None:
    """Attach DISK as a loop device with direct I/O."""
    path = served_path(invocation.open_state(), disk)
    if directory is not None and not os.path.isdir(directory):
        raise NotFoundError(f"{directory} is not a directory: make it first")
    device = loop_devices.attach(path)
    try:
        if kind is not None:
            loop_devices.make_filesystem(device, kind)
        if directory is not None:
            loop_devices.mount(device, directory)
    except AsrfsError:
        loop_devices.detach(device)
        raise
    document = {"disk": disk, "device": device, "format": kind, "on": directory}
    invocation.answer(document, lambda out: out.print(pairs({k: v for k, v in document.items() if v})))


@click.command()
@click.argument("disk", metavar="DISK")
@pass_invocation
def detach(invocation: Invocation, disk: str) -> None:
    """Unmount what is mounted from DISK's loop device, and detach it."""
    path = served_path(invocation.open_state(), disk)
    loops = [loop for loop in loop_devices.loop_devices_below(os.path.dirname(path)) if loop.backing_file == path]
    if not loops:
        raise RefusedError(f"disk {disk} is not attached")
    for loop in loops:
        for directory in loop.mounted_on:
            loop_devices.unmount(directory)
        loop_devices.detach(loop.device)
    document = {"disk": disk, "devices": [loop.device for loop in loops]}
    invocation.answer(document, lambda out: out.print(f"disk {disk} is detached from {loops[0].device}"))


def served_path(state: StateDirectory, disk: str) -> str:
    """Where the disk appears in the mount. NotFoundError for no such disk, RefusedError if it is not served."""
    machine = state.load_machine()
    machine.disk(disk)
    served = state.load_served()
    if served is None or state.lock_holder("disk_server") is None:
        raise RefusedError(f"machine {machine.name} is not being served: start `asrfs serve --mount DIR`")
    return os.path.join(os.path.realpath(served.mount), f"{disk}.img")
