"""What is on a recovered disk and its partitions, and what fsck says of it. Nothing is written to the disk.

A filesystem whose journal is to be replayed, as after a crash, is mounted from a copy and examined there: without that
fsck sees what no start would ever see, and on the recovered disk itself not a byte may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from asrfs.errors import AsrfsError
from asrfs.model.quantities import SECTOR_BYTES
from replica_store.failover.processes import run
from replica_store.vault.operations import Examined

_HEAD_BYTES = 4096
_EXT_AT = 1024
_EXT_MAGIC = b"\x53\xef"
_EXT_HAS_JOURNAL = 0x4
_EXT_NEEDS_RECOVERY = 0x4
_EXT_EXTENTS = 0x40
_XFS_MAGIC = b"XFSB"
_PARTITIONED_AT, _PARTITIONED = 510, b"\x55\xaa"
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


class Place(NamedTuple):
    """Where a filesystem lies on its disk: in a partition, by number, offset and bytes. `partition` 0: all of it is."""

    found: Filesystem
    partition: int = 0
    offset: int = 0
    length: int = 0


def filesystems_on(operation_id: str, path: str) -> list[Place]:
    """On the whole disk that is a file, or in its partitions, found as the kernel finds them. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(_HEAD_BYTES)
        if (whole := recognise(head)) is not None:
            return [Place(whole)]
        if head[_PARTITIONED_AT : _PARTITIONED_AT + len(_PARTITIONED)] != _PARTITIONED:
            return []
        words = ["partx", "--show", "--noheadings", "--output", "NR,START,SECTORS", path]
        code, output = run(operation_id, words, accepted=())
        places = []
        for line in output.splitlines() if code == 0 else ():
            number, first, count = map(int, line.split())
            file.seek(first * SECTOR_BYTES)
            if (found := recognise(file.read(_HEAD_BYTES))) is not None:
                places.append(Place(found, number, first * SECTOR_BYTES, count * SECTOR_BYTES))
        return places


def examine(operation_id: str, disk: str, path: str, place: Place, *, replayed: bool = False) -> Examined:
    """What fsck says of the filesystem in a file or on a device, which is only read."""
    kind = place.found.type
    words = ["xfs_repair", "-n", path] if kind == "xfs" else ["e2fsck", "-f", "-n", path]
    code, output = run(operation_id, words, accepted=())
    return verdict(disk, place, "" if code == 0 else _words_of(output) or "it ended with an error", replayed=replayed)


def verdict(disk: str, place: Place, failure: str, *, replayed: bool) -> Examined:
    """Of one filesystem. `failure`: what is wrong with it, empty if nothing is."""
    where = f"partition {place.partition}: " if place.partition and failure else ""
    return Examined(
        disk=disk,
        filesystem=place.found.type,
        result="damaged" if failure else "clean",
        text=f"{where}{failure}",
        replayed=replayed,
    )


def of_whole_disk(disk: str, verdicts: Sequence[Examined]) -> Examined:
    """What is said of a disk, by what is said of each of its filesystems. Pure."""
    if not verdicts:
        return Examined(disk=disk, filesystem=None, result="no filesystem")
    return Examined(
        disk=disk,
        filesystem=", ".join(dict.fromkeys(each.filesystem for each in verdicts if each.filesystem)),
        result="damaged" if any(each.result == "damaged" for each in verdicts) else "clean",
        text="; ".join(each.text for each in verdicts if each.text)[:_TEXT_CHARACTERS_MAX],
        replayed=any(each.replayed for each in verdicts),
    )


def replay(operation_id: str, device: str, found: Filesystem, directory: str) -> str:
    """Have the kernel replay the journal of the filesystem on a device, as a start does; why it could not, if so."""
    options = "nouuid" if found.type == "xfs" else "defaults"  # the disk it was copied from may be mounted here, too
    code, output = run(operation_id, ["mount", "-t", found.type, "-o", options, device, directory], accepted=())
    if code != 0:
        return f"it cannot be mounted: {' '.join(output.split())}"[:_TEXT_CHARACTERS_MAX]
    run(operation_id, ["umount", directory])
    return ""


def attach(operation_id: str, path: str, place: Place, *, is_read_only: bool = False) -> str:
    """A loop device over a file, or over the partition there."""
    part = [f"--offset={place.offset}", f"--sizelimit={place.length}"] if place.partition else []
    only = ["--read-only"] if is_read_only else []
    _, output = run(operation_id, ["losetup", "--find", "--show", "--direct-io=on", *only, *part, path])
    if not output.strip().startswith("/dev/"):
        raise AsrfsError(f"losetup gave no device for {path}: {output.strip()[:200]}")
    return output.strip()


def detach(operation_id: str, device: str) -> None:
    run(operation_id, ["losetup", "--detach", device])


def _words_of(output: str) -> str:
    """What fsck complained of, without its phases and counts, shortened."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    telling = [line for line in lines if line and not line.startswith(("Pass ", "e2fsck ", "Phase ", "- "))]
    return "; ".join(telling)[:_TEXT_CHARACTERS_MAX]
