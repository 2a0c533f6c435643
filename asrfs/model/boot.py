"""How a recovered machine is started, and how it is seen that it runs: a person's settings, checked, in the history.

They travel as one JSON document in every DISK record (`machine.py`), so they move with the LSN: a machine recovered at
a point is started as it was to be started then. Whoever only passes them on does not look into them, so that a store
of before a field was invented goes on receiving. Sizes and durations stay as people wrote them.

    kind = "qemu"                    a virtual machine, its disks as they are
    kind = "mount"                   its filesystems at paths of the recovery site, then services or commands
    kind = "none"                    somebody else starts it
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from asrfs.errors import BadInputError, FormatError
from asrfs.model.names import check_name
from asrfs.model.quantities import parse_duration, parse_size

BOOT_BYTES_MAX = 16 << 10
"""Of the document: it is repeated with every disk."""
MEMORY_BYTES_MIN, MEMORY_BYTES_MAX = 16 << 20, 16 << 40
TIMEOUT_S_MAX = 24 * 3600.0
TIMEOUT_DEFAULT = "5m"
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_SERVICE = re.compile(r"[A-Za-z0-9@_.:\\-]{1,200}")
_FILESYSTEM = re.compile(r"[a-z0-9_]{1,32}")
_OPTIONS = re.compile(r"[A-Za-z0-9_.,=:/@+%-]{0,500}")

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Command = Annotated[tuple[Text, ...], msgspec.Meta(min_length=1, max_length=64)]
"""A program and its arguments; no shell."""


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Unknown fields are refused: what was misspelt would silently not hold."""


class Network(_Strict, frozen=True, kw_only=True):
    """One network card. `bridge`: of the recovery site, None for a network of its own behind it (QEMU's user mode).

    In a test it is on `test_bridge`, and where that is None on a network that reaches nothing and nobody.
    """

    bridge: str | None = None
    test_bridge: str | None = None
    mac: str | None = None


class QemuBoot(_Strict, frozen=True, kw_only=True):
    """A virtual machine. `disks`: those it gets, in this order, the first is started from; empty: all, by slot."""

    memory: Text = "1G"
    cpus: Annotated[int, msgspec.Meta(ge=1, le=512)] = 1
    firmware: Literal["bios", "uefi"] = "bios"
    disks: Annotated[tuple[str, ...], msgspec.Meta(max_length=64)] = ()
    networks: Annotated[tuple[Network, ...], msgspec.Meta(max_length=16)] = ()

    @property
    def memory_bytes(self) -> int:
        return parse_size(self.memory)


class Filesystem(_Strict, frozen=True, kw_only=True):
    """A filesystem on a disk, or on its partition of that number, and the directory it is mounted on."""

    disk: str
    path: Text
    partition: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    type: str | None = None
    options: str = ""


class MountBoot(_Strict, frozen=True, kw_only=True):
    """Filesystems, mounted in this order, then commands and services started in this order; undone in reverse.

    In a test all paths lie below a directory of that test, which commands find in `ASRFS_ROOT`, and services are not
    started: they would find the paths they know, and those are production's.
    """

    filesystems: Annotated[tuple[Filesystem, ...], msgspec.Meta(min_length=1, max_length=64)]
    start: Annotated[tuple[Command, ...], msgspec.Meta(max_length=64)] = ()
    stop: Annotated[tuple[Command, ...], msgspec.Meta(max_length=64)] = ()
    services: Annotated[tuple[str, ...], msgspec.Meta(max_length=64)] = ()


class Health(_Strict, frozen=True, kw_only=True):
    """When it runs: all that is given here holds, within `timeout` of the start.

    `console`: a text that appears on the serial console. `port`: of TCP, answers at `address`; `say` is sent there and
    `expect` is in the answer. `command`: ends with 0.
    """

    console: Text | None = None
    port: Port | None = None
    address: Text = "127.0.0.1"
    say: str = ""
    expect: Text | None = None
    command: Command | None = None
    timeout: Text = TIMEOUT_DEFAULT

    @property
    def timeout_s(self) -> float:
        return parse_duration(self.timeout)


class BootSettings(_Strict, frozen=True, kw_only=True):
    """All of it. Only what `kind` names is there."""

    kind: Literal["qemu", "mount", "none"]
    qemu: QemuBoot | None = None
    mount: MountBoot | None = None
    health: Health | None = None

    def disk_names(self) -> tuple[str, ...]:
        """Disks the settings name, each once."""
        named = self.qemu.disks if self.qemu else ()
        mounted = tuple(each.disk for each in self.mount.filesystems) if self.mount else ()
        return tuple(dict.fromkeys(named + mounted))


NO_BOOT = BootSettings(kind="none")
"""What holds where nobody said anything."""


def read_boot(text: str, where: str) -> BootSettings:
    """The settings a person wrote as TOML or JSON. Raises BadInputError naming `where`."""
    try:
        if text.lstrip().startswith("{"):
            settings = msgspec.json.decode(text, type=BootSettings)
        else:
            settings = msgspec.toml.decode(text, type=BootSettings)
        check_boot(settings)
    except (msgspec.MsgspecError, ValueError, RecursionError, BadInputError) as error:
        raise BadInputError(f"{where}: {error}") from None
    if len(encode_boot(settings)) > BOOT_BYTES_MAX:
        raise BadInputError(f"{where}: these are more than {BOOT_BYTES_MAX} bytes: put long commands into a script")
    return settings


def encode_boot(settings: BootSettings) -> bytes:
    return msgspec.json.encode(settings)


def decode_boot(document: bytes) -> BootSettings:
    """The settings in a DISK record, which a hostile or newer host may have written; none is `NO_BOOT`. Raises
    FormatError."""
    if not document:
        return NO_BOOT
    try:
        settings = msgspec.json.decode(document, type=BootSettings)
        check_boot(settings)
    except (msgspec.MsgspecError, ValueError, RecursionError, BadInputError) as error:
        raise FormatError(f"the boot settings in the history cannot be used: {error}") from None
    return settings


def check_boot(settings: BootSettings) -> None:
    """Raise BadInputError for what cannot be carried out anywhere."""
    try:
        encode_boot(settings)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say
        raise BadInputError("it has a character that is none") from None
    given = {"qemu": settings.qemu, "mount": settings.mount}
    for kind, part in given.items():
        if part is not None and settings.kind != kind:
            raise BadInputError(f"[{kind}] is there, but kind is {settings.kind!r}: they must agree")
    if settings.kind != "none" and given[settings.kind] is None:
        raise BadInputError(f"kind is {settings.kind!r}, but there is no [{settings.kind}]")
    if settings.qemu is not None:
        _check_qemu(settings.qemu)
    if settings.mount is not None:
        _check_mount(settings.mount)
    if settings.health is not None:
        _check_health(settings.health, settings)


def _check_qemu(qemu: QemuBoot) -> None:
    if not MEMORY_BYTES_MIN <= qemu.memory_bytes <= MEMORY_BYTES_MAX:
        raise BadInputError(f"memory {qemu.memory!r} is not between 16M and 16T")
    for name in qemu.disks:
        check_name(name, "disk")
    if len(set(qemu.disks)) < len(qemu.disks):
        raise BadInputError("a disk is named twice in [qemu] disks")
    for network in qemu.networks:
        for bridge in (network.bridge, network.test_bridge):
            if bridge is not None and not _INTERFACE.fullmatch(bridge):
                raise BadInputError(f"{bridge[:40]!r} cannot be the name of a bridge")
        if network.mac is not None and not _MAC.fullmatch(network.mac):
            raise BadInputError(f"{network.mac[:40]!r} is not a MAC address: write it as 52:54:00:12:34:56")
        if network.bridge is not None and network.bridge == network.test_bridge:
            raise BadInputError(
                f"a test would be on bridge {network.bridge!r} with production: name another test_bridge"
            )


def _check_mount(mount: MountBoot) -> None:
    for each in mount.filesystems:
        check_name(each.disk, "disk")
        parts = each.path.split("/")
        if not each.path.startswith("/") or ".." in parts or "\0" in each.path or each.path.strip("/") == "":
            raise BadInputError(f"{each.path[:80]!r} is not a directory to mount on: write an absolute path below /")
        if each.type is not None and not _FILESYSTEM.fullmatch(each.type):
            raise BadInputError(f"{each.type[:40]!r} is not a type of filesystem")
        if not _OPTIONS.fullmatch(each.options):
            raise BadInputError(f"{each.options[:80]!r} are not options of a mount")
    paths = [each.path.rstrip("/") for each in mount.filesystems]
    if len(set(paths)) < len(paths):
        raise BadInputError("two filesystems are mounted on one path")
    for at, path in enumerate(paths):
        if any(earlier.startswith(f"{path}/") for earlier in paths[:at]):
            raise BadInputError(f"{path} would hide what is mounted below it before: name it first")
    for service in mount.services:
        if not _SERVICE.fullmatch(service) or service.startswith("-"):
            raise BadInputError(f"{service[:80]!r} is not the name of a service")
    for command in (*mount.start, *mount.stop):
        _check_command(command)


def _check_health(health: Health, settings: BootSettings) -> None:
    if health.console is None and health.port is None and health.command is None:
        raise BadInputError("[health] checks nothing: give console, port or command")
    if not 0 < health.timeout_s <= TIMEOUT_S_MAX:
        raise BadInputError(f"timeout {health.timeout!r} is not between 0 and 24 h")
    if health.command is not None:
        _check_command(health.command)
    if health.port is None and (health.say or health.expect is not None):
        raise BadInputError("say and expect go with port")
    if health.console is not None and settings.kind != "qemu":
        raise BadInputError("only a machine under qemu has a console to look at")
    if health.port is not None and health.expect is None and settings.qemu is not None:
        # QEMU's user-mode network takes connections before the guest does.
        raise BadInputError("with qemu a port that merely takes connections says nothing: give what to expect, too")


def _check_command(command: tuple[str, ...]) -> None:
    if any("\0" in word for word in command):
        raise BadInputError("a command has a zero byte in it")
    if not command[0].startswith("/"):
        raise BadInputError(f"{command[0][:80]!r}: name the program by its absolute path")
