"""PURE: the command line of a recovered machine under QEMU.

What is not asked for is not there: no default devices, no display, no way to start another program where none is
needed. In a test every network is the one that was set aside for tests, and where there is none, one that reaches
nothing. The serial console goes to a log and to a socket, QEMU itself is spoken to over another (QMP). QEMU is started
in the machine's directory and knows its files by their names alone: paths of sockets must be short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from asrfs.errors import BadInputError, NotFoundError
from asrfs.model.boot import Network, QemuBoot

Accelerator = Literal["kvm", "tcg"]
"""`tcg` is QEMU's own translation, which is slow and works everywhere."""
CONSOLE_LOG, CONSOLE_SOCKET, CONTROL_SOCKET, FIRMWARE_VARIABLES = "console.log", "console", "control", "firmware.vars"
_CONSOLE_AND_CONTROL = (
    *("-chardev", f"socket,id=console,path={CONSOLE_SOCKET},server=on,wait=off,logfile={CONSOLE_LOG},logappend=on"),
    *("-serial", "chardev:console"),
    *("-chardev", f"socket,id=control,path={CONTROL_SOCKET},server=on,wait=off"),
    *("-mon", "chardev=control,mode=control"),
)


class Forward(NamedTuple):
    """A port of this machine's loopback that leads to one of the guest's."""

    host_port: int
    guest_port: int


class Drive(NamedTuple):
    """A disk by its name, and the file, device or `nbd://` URI that it is."""

    name: str
    source: str


def chosen_drives(boot: QemuBoot, disks: Mapping[str, str]) -> list[Drive]:
    """The disks it gets of those there are (by name, in their own order). Raises NotFoundError."""
    for name in boot.disks:
        if name not in disks:
            raise NotFoundError(f"the boot settings name disk {name!r}: the machine has {', '.join(disks) or 'none'}")
    return [Drive(name, disks[name]) for name in boot.disks or disks]


def qemu_command(
    name: str,
    boot: QemuBoot,
    drives: Sequence[Drive],
    *,
    is_test: bool,
    accelerator: Accelerator,
    firmware: str | None = None,
    forward: Forward | None = None,
) -> list[str]:
    """All words, for a start in the machine's directory. `firmware`: the file with UEFI, None for BIOS. A `forward`
    goes to the first network of QEMU's own.

    Raises BadInputError.
    """
    memory_mib = -(-boot.memory_bytes >> 20)
    command = ["qemu-system-x86_64", "-name", f"guest={_quoted(name)}", "-nodefaults", "-no-user-config"]
    command += ["-machine", f"q35,accel={accelerator}", "-cpu", "max"]
    command += ["-smp", str(boot.cpus), "-m", f"{memory_mib}M", "-rtc", "base=utc", "-vga", "std", "-display", "none"]
    command += _CONSOLE_AND_CONTROL
    if firmware is not None:
        command += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={_quoted(firmware)}"]
        command += ["-drive", f"if=pflash,unit=1,format=raw,file={FIRMWARE_VARIABLES}"]
    for number, drive in enumerate(drives):
        command += _drive(number, drive)
    bridges = [network.test_bridge if is_test else network.bridge for network in boot.networks]
    for number, (network, bridge) in enumerate(zip(boot.networks, bridges, strict=True)):
        reaches = forward if bridge is None and None not in bridges[:number] else None
        command += _network(number, network, bridge, is_test=is_test, forward=reaches)
    if not boot.networks:
        command += ["-nic", "none"]
    spawning = "allow" if any(bridges) else "deny"  # a bridge is joined by a helper program
    return [*command, "-sandbox", f"on,obsolete=deny,elevateprivileges=deny,spawn={spawning},resourcecontrol=deny"]


def takes_forward(boot: QemuBoot, *, is_test: bool) -> bool:
    """Whether a port of the guest can be forwarded: it has a network of QEMU's own."""
    return any((network.test_bridge if is_test else network.bridge) is None for network in boot.networks)


def _drive(number: int, drive: Drive) -> list[str]:
    if drive.source.startswith("nbd://"):
        protocol = f"driver=raw,file.driver=nbd,{_nbd(drive.source)}"
    elif drive.source.startswith("/dev/"):
        protocol = f"driver=raw,file.driver=host_device,file.filename={_quoted(drive.source)}"
    else:
        protocol = f"driver=raw,file.driver=file,file.filename={_quoted(drive.source)}"
    device = f"virtio-blk-pci,drive=disk{number},bootindex={number + 1},serial={_quoted(drive.name[:20])}"
    return ["-blockdev", f"node-name=disk{number},{protocol},discard=unmap", "-device", device]


def _nbd(uri: str) -> str:
    place, _, export = uri.removeprefix("nbd://").partition("/")
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        raise BadInputError(f"{uri[:200]} is not a disk on the network: write nbd://HOST:PORT/NAME")
    host = host.removeprefix("[").removesuffix("]")
    return (
        f"file.server.type=inet,file.server.host={_quoted(host)},file.server.port={_quoted(port)},"
        f"file.export={_quoted(export)}"
    )


def _network(number: int, network: Network, bridge: str | None, *, is_test: bool, forward: Forward | None) -> list[str]:
    if bridge is not None:
        backend = f"bridge,id=net{number},br={_quoted(bridge)}"
    else:
        backend = f"user,id=net{number}"
        if is_test:
            backend += ",restrict=on"
        if forward is not None:
            backend += f",hostfwd=tcp:127.0.0.1:{forward.host_port}-:{forward.guest_port}"
    device = f"virtio-net-pci,netdev=net{number},romfile="
    if network.mac is not None:
        device += f",mac={network.mac}"
    return ["-netdev", backend, "-device", device]


def _quoted(text: str) -> str:
    """As QEMU wants a value in which there may be a comma."""
    return text.replace(",", ",,")
