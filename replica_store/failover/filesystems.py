"""What is on a recovered disk, and what fsck says of it. Nothing is written to the disk.

A filesystem whose journal is to be replayed, as after a crash, is mounted from a copy and examined there: without that
fsck sees what no start would ever see, and on the recovered disk itself not a byte may change.
"""

from __future__ import annotations

from typing import NamedTuple

from asrfs.errors import AsrfsError
from replica_store.failover.processes import run
from replica_store.vault.operations import Examined

_HEAD_BYTES = 4096
_EXT_AT = 1024
_EXT_MAGIC = b"\x53\xef"
_EXT_HAS_JOURNAL = 0x4
_EXT_NEEDS_RECOVERY = 0x4
_EXT_EXTENTS = 0x40
_XFS_MAGIC = b"XFSB"
_TEXT_CHARACTERS_MAX = 300


class Filesystem(NamedTuple):
    """Its type, and whether its journal may hold what has to be replayed."""

    type: str
    may_be_dirty: bool


def recognise(head: bytes) -> Filesystem | None:
    """The filesystem whose disk begins so, None for another one or none. Pure."""
    if head.startswith(_XFS_MAGIC):
        return Filesystem("xfs", True)  # its superblock does not say
    superblock = head[_EXT_AT:]
    if superblock[0x38:0x3A] != _EXT_MAGIC:
        return None
    compatible, incompatible = (int.from_bytes(superblock[at : at + 4], "little") for at in (0x5C, 0x60))
    has_journal = bool(compatible & _EXT_HAS_JOURNAL)
    kind = "ext4" if incompatible & _EXT_EXTENTS else "ext3" if has_journal else "ext2"
    return Filesystem(kind, has_journal and bool(incompatible & _EXT_NEEDS_RECOVERY))


def filesystem_of(path: str) -> Filesystem | None:
    """Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        return recognise(file.read(_HEAD_BYTES))


def examine(operation_id: str, disk: str, path: str, found: Filesystem | None, *, replayed: bool = False) -> Examined:
    """What fsck says of the filesystem in a file or on a device, which is only read."""
    if found is None:
        return Examined(disk=disk, filesystem=None, result="no filesystem")
    words = ["xfs_repair", "-n", path] if found.type == "xfs" else ["e2fsck", "-f", "-n", path]
    code, output = run(operation_id, words, accepted=())
    return Examined(
        disk=disk,
        filesystem=found.type,
        result="clean" if code == 0 else "damaged",
        text="" if code == 0 else _words_of(output),
        replayed=replayed,
    )


def replay(operation_id: str, device: str, found: Filesystem, directory: str) -> str:
    """Have the kernel replay the journal of the filesystem on a device, as a start does; why it could not, if so."""
    options = "nouuid" if found.type == "xfs" else "defaults"  # the disk it was copied from may be mounted here, too
    code, output = run(operation_id, ["mount", "-t", found.type, "-o", options, device, directory], accepted=())
    if code != 0:
        return f"it cannot be mounted: {' '.join(output.split())}"[:_TEXT_CHARACTERS_MAX]
    run(operation_id, ["umount", directory])
    return ""


def attach(operation_id: str, path: str) -> str:
    """A loop device over a file."""
    _, output = run(operation_id, ["losetup", "--find", "--show", "--direct-io=on", path])
    if not output.strip().startswith("/dev/"):
        raise AsrfsError(f"losetup gave no device for {path}: {output.strip()[:200]}")
    return output.strip()


def _words_of(output: str) -> str:
    """What fsck complained of, without its phases and counts, shortened."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    telling = [line for line in lines if line and not line.startswith(("Pass ", "e2fsck ", "Phase ", "- "))]
    return "; ".join(telling)[:_TEXT_CHARACTERS_MAX]
