"""What a failover is said to be: its document, its verdict, the history of drills; and what is on a disk."""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec
import pytest

from replica_store.failover.filesystems import Filesystem, Place, filesystems_on, of_whole_disk, recognise
from replica_store.failover.filesystems import verdict as of_filesystem
from replica_store.failover.report import document, drills, verdict
from replica_store.vault.operations import (
    Checked,
    ChosenPoint,
    Examined,
    Kind,
    Operation,
    OperationState,
    Places,
    Step,
)


def made(
    number: int, rto_s: float | None = 2.0, *, kind: Kind = "test", machine: str = "web1", fsck: str = "clean"
) -> Operation:
    state: OperationState = "cleaned"
    return Operation(
        id=f"{number:032x}",
        machine_id="ab" * 16,
        machine=machine,
        kind=kind,
        state=state,
        point=ChosenPoint(selector="latest", lsn=number, epoch=1, time_ns=5),
        places=Places(directory="/srv/one", state="/srv/one/state", mount="/srv/one/disks"),
        begun_ns=number,
        disks=("root",),
        steps=(Step("serve", 1.5),),
        rto_s=rto_s,
        examined=(Examined(disk="root", filesystem="ext4", result=fsck, text="bitmap"),),  # type: ignore[arg-type]
    )


def test_the_document_has_what_the_contract_names() -> None:
    whole = document(made(7))
    for key in ("id", "machine", "point", "state", "mount", "disks", "steps", "rto_seconds", "data_loss_seconds"):
        assert key in whole
    assert whole["steps"] == [{"name": "serve", "seconds": 1.5}]
    assert whole["disks"][0]["path"] == "/srv/one/disks/root.img"
    assert msgspec.json.decode(msgspec.json.encode(whole)) == whole


def test_a_damaged_filesystem_counts_more_than_the_check() -> None:
    failed = Checked(command="false", exit_code=3, output="one\nno such table\n")
    assert verdict(made(1)) is None
    wrong = verdict(msgspec.structs.replace(made(1), checked=failed))
    assert wrong is not None and wrong.exit_code == 1 and "exit code 3: no such table" in str(wrong)
    wrong = verdict(msgspec.structs.replace(made(1, fsck="damaged"), checked=failed))
    assert wrong is not None and wrong.exit_code == 5 and "ext4 damaged: bitmap" in str(wrong)
    assert verdict(msgspec.structs.replace(made(1), checked=Checked(command="", exit_code=0, output=""))) is None


def test_drills_and_their_trend() -> None:
    runs = [made(1, 2.0), made(2, 4.0), made(3, None), made(4, 3.0), made(5, 6.0, fsck="damaged")]
    others = [made(6, kind="unplanned"), made(7, machine="web2")]
    first, second = drills([*runs, *others])
    assert (first["machine"], first["drills"], first["passed"]) == ("web1", 5, 3)
    figures = [first[f"{which}_rto_seconds"] for which in ("last", "best", "median", "worst")]
    assert figures == [6.0, 2.0, 3.5, 6.0]
    assert first["trend"] == 1.0, "twice as long as the median of those before"
    assert [run["passed"] for run in first["runs"]] == [True, True, False, True, False]
    assert (second["machine"], second["drills"], second["trend"]) == ("web2", 1, None)
    assert drills([]) == []


def superblock(compatible: int, incompatible: int) -> bytes:
    block = bytearray(1024)
    block[0x38:0x3A] = b"\x53\xef"
    block[0x5C:0x60] = compatible.to_bytes(4, "little")
    block[0x60:0x64] = incompatible.to_bytes(4, "little")
    return bytes(1024) + bytes(block)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (superblock(0x4, 0x40), Filesystem("ext4", False)),
        (superblock(0x4, 0x44), Filesystem("ext4", True)),
        (superblock(0x4, 0x4), Filesystem("ext3", True)),
        (superblock(0, 0), Filesystem("ext2", False)),
        (b"XFSB".ljust(4096, b"\0"), Filesystem("xfs", True)),
        (bytes(4096), None),
        (b"", None),
        (bytes(1080), None),
    ],
)
def test_what_is_on_a_disk(head: bytes, expected: Filesystem | None) -> None:
    assert recognise(head) == expected


def test_a_disk_with_partitions_is_as_good_as_the_worst_of_them() -> None:
    first, second = Place(Filesystem("ext4", True), 1, 1 << 20, 8 << 20), Place(Filesystem("xfs", True), 3, 9 << 20, 1)
    good = of_filesystem("root", first, "", replayed=True)
    bad = of_filesystem("root", second, "it cannot be mounted", replayed=False)
    assert of_whole_disk("root", []).result == "no filesystem"
    assert of_whole_disk("root", [good]) == good
    whole = of_whole_disk("root", [good, bad])
    assert (whole.filesystem, whole.result, whole.replayed) == ("ext4, xfs", "damaged", True)
    assert whole.text == "partition 3: it cannot be mounted"


def test_filesystems_are_found_in_partitions(tmp_path: Path) -> None:
    superblock = bytes(1024 + 0x38) + b"\x53\xef"
    image = tmp_path / "disk.img"
    table = b"".join(struct.pack("<4xB3xII", 0x83, *extent) for extent in ((2048, 2048), (4096, 2048)))
    with image.open("wb") as disk:
        disk.truncate(4 << 20)
        disk.seek(446)
        disk.write(table + bytes(32) + b"\x55\xaa")
        disk.seek(4096 * 512)
        disk.write(superblock)
    assert filesystems_on("f", str(image)) == [Place(Filesystem("ext2", False), 2, 2 << 20, 1 << 20)]
    image.write_bytes(superblock + bytes(1 << 20))
    assert filesystems_on("f", str(image)) == [Place(Filesystem("ext2", False))]
    image.write_bytes(bytes(1 << 20))
    assert filesystems_on("f", str(image)) == []
