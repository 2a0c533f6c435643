"""`asrfs disk`: the disks of a machine."""

from __future__ import annotations

import os
from typing import Any

import click

from asrfs.cli.agent import FOREVER_S, call_agent
from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.daemon import disks
from asrfs.daemon.loop_devices import loop_devices_below, take_size, wait_for_size
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError, BadInputError, RefusedError
from asrfs.model.machine import DiskConfig
from asrfs.model.quantities import format_size, parse_size
from asrfs.terminal.output import pairs, table


@click.group()
def disk() -> None:
    """Virtual disks of the machine."""


@disk.command()
@click.argument("name", metavar="DISK")
@click.option("--size", metavar="SIZE", help="A new sparse disk of this size, such as 10G.")
@click.option("--image", metavar="FILE", help="Adopt this raw image or block device in place.")
@pass_invocation
def add(invocation: Invocation, name: str, size: str | None, image: str | None) -> None:
    """Add DISK to the machine, also while it is being served."""
    state = invocation.open_state()
    if (size is None) == (image is None):
        raise BadInputError("give either --size SIZE for a new disk or --image FILE to adopt one")
    if size is not None:
        added = disks.add_sized(state, name, parse_size(size))
    else:
        added = disks.add_adopted(state, name, str(image))
    document = describe(state, added)
    invocation.answer(document, lambda out: out.print(pairs(document)))


@disk.command("list")
@pass_invocation
def list_disks(invocation: Invocation) -> None:
    """List the machine's disks."""
    state = invocation.open_state()
    described = [describe(state, each) for each in state.load_machine().live_disks()]
    rows = [[each["name"], format_size(each["size_bytes"]), each["image"], each["id"]] for each in described]
    invocation.answer(described, lambda out: out.print(table(("DISK", "SIZE", "IMAGE", "ID"), rows)))


@disk.command()
@click.argument("name", metavar="DISK")
@click.argument("size", metavar="SIZE")
@pass_invocation
def resize(invocation: Invocation, name: str, size: str) -> None:
    """Make DISK longer, also while it is served. Then grow its filesystem, with resize2fs or xfs_growfs."""
    state = invocation.open_state()
    grown = disks.resize(state, name, parse_size(size))
    document = describe(state, grown) | {"loops": _show_to_loop_devices(state, grown)}
    invocation.answer(document, lambda out: out.print(pairs(document)))


def _show_to_loop_devices(state: StateDirectory, grown: DiskConfig) -> list[str]:
    """Have the loop devices over a disk take its size; their paths."""
    served = state.load_served()
    if served is None or state.lock_holder("disk_server") is None:
        return []
    path = os.path.join(served.mount, f"{grown.name}.img")
    found = [loop.device for loop in loop_devices_below(served.mount) if loop.backing_file == os.path.realpath(path)]
    if found:
        wait_for_size(path, grown.size_bytes)
    for device in found:
        take_size(device)
    return found


@disk.command()
@click.argument("name", metavar="DISK")
@click.option("--yes", is_flag=True, help="Do it; without this only the plan is printed.")
@pass_invocation
def remove(invocation: Invocation, name: str, yes: bool) -> None:
    """Take DISK off the machine. Its image file stays; so do its points at the store."""
    state = invocation.open_state()
    machine = state.load_machine()
    found = machine.disk_to_remove(name)
    _check_not_attached(state, name)
    processes = state.processes()
    if processes["disk_server"] and not (processes["supervisor"] or processes["agent"]):
        raise RefusedError("the agent is not running, so nothing can be written to the image: start `asrfs serve`")
    if not yes:
        raise BadInputError(
            f"this would take disk {name} ({format_size(found.size_bytes)}) off machine {machine.name} and keep its "
            f"image at {state.image_path(found)}: repeat with --yes"
        )
    document = describe(state, disks.remove(state, name, lambda: _apply(state))) | {"removed": True}
    invocation.answer(
        document, lambda out: out.print(f"disk {name} is removed; its image stays at {document['image']}")
    )


def _apply(state: StateDirectory) -> None:
    """Have every write so far in the images, by the agent or, where nobody serves the machine, by ourselves."""
    try:
        if state.lock_holder("supervisor") is None and state.lock_holder("agent") is None:
            disks.apply_unserved(state)
        else:
            call_agent(state, "apply", seconds_max=FOREVER_S)
    except AsrfsError as error:
        why = f"the image does not hold the disk's last writes yet: {error}; remove the disk again when that is cured"
        raise type(error)(why) from None


def describe(state: StateDirectory, each: DiskConfig) -> dict[str, Any]:
    return {
        "name": each.name,
        "id": each.id,
        "slot": each.slot,
        "size_bytes": each.size_bytes,
        "image": state.image_path(each),
        "adopted": each.adopted is not None,
        "base": each.base,
    }


def _check_not_attached(state: StateDirectory, name: str) -> None:
    served = state.load_served()
    if served is None:
        return
    for loop in loop_devices_below(served.mount):
        if os.path.basename(loop.backing_file) == f"{name}.img":
            raise RefusedError(f"disk {name} is attached as {loop.device}: `asrfs detach {name}` first")
