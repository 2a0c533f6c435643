"""Boot settings: what is taken and what is refused, and that DISK records carry them whoever reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from asrfs.errors import BadInputError, FormatError
from asrfs.model.boot import (
    BOOT_BYTES_MAX,
    NO_BOOT,
    BootSettings,
    Network,
    decode_boot,
    encode_boot,
    read_boot,
)
from asrfs.model.machine import DiskConfig, DiskRecord, MachineConfig, decode_disk, encode_disk

QEMU = """
kind = "qemu"

[qemu]
memory = "512M"
cpus = 2
firmware = "bios"
disks = ["root", "data"]

[[qemu.networks]]
bridge = "br0"
test_bridge = "br-test"
mac = "52:54:00:12:34:56"

[health]
console = "login:"
timeout = "90s"
"""
MOUNT = """
kind = "mount"

[mount]
services = ["nginx"]
start = [["/usr/bin/pg_ctlcluster", "15", "main", "start"]]
stop = [["/usr/bin/pg_ctlcluster", "15", "main", "stop"]]

[[mount.filesystems]]
disk = "data"
partition = 1
path = "/srv/data"
options = "noatime"

[health]
port = 5432
command = ["/usr/bin/pg_isready"]
"""


def test_both_kinds_are_read_and_survive_the_history() -> None:
    qemu, mount = read_boot(QEMU, "f"), read_boot(MOUNT, "f")
    assert qemu.qemu is not None and qemu.health is not None and mount.mount is not None
    assert (qemu.qemu.memory_bytes, qemu.qemu.disks, qemu.health.timeout_s) == (512 << 20, ("root", "data"), 90)
    assert qemu.qemu.networks == (Network(bridge="br0", test_bridge="br-test", mac="52:54:00:12:34:56"),)
    assert mount.mount.filesystems[0].partition == 1
    assert (qemu.disk_names(), mount.disk_names()) == (("root", "data"), ("data",))
    for settings in (qemu, mount, NO_BOOT):
        assert decode_boot(encode_boot(settings)) == settings
        assert read_boot(encode_boot(settings).decode(), "f") == settings, "JSON is taken, too"
    assert decode_boot(b"") == NO_BOOT


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "kind"),
        ('kind = "docker"', "docker"),
        ('kind = "qemu"', "no \\[qemu\\]"),
        ('kind = "none"\n[qemu]\n', "must agree"),
        ('kind = "qemu"\n[qemu]\nmemmory = "1G"', "memmory"),
        ('kind = "qemu"\n[qemu]\nmemory = "1M"', "16M"),
        ('kind = "qemu"\n[qemu]\nmemory = "lots"', "not a size"),
        ('kind = "qemu"\n[qemu]\ncpus = 0', "cpus"),
        ('kind = "qemu"\n[qemu]\ndisks = ["../x"]', "name of a disk"),
        ('kind = "qemu"\n[qemu]\ndisks = ["a", "a"]', "twice"),
        ('kind = "qemu"\n[qemu]\n[[qemu.networks]]\nbridge = "br0,script=/x"', "bridge"),
        ('kind = "qemu"\n[qemu]\n[[qemu.networks]]\nmac = "52:54"', "MAC"),
        ('kind = "qemu"\n[qemu]\n[[qemu.networks]]\nbridge = "a"\ntest_bridge = "a"', "production"),
        ('kind = "qemu"\n[qemu]\n[health]\n', "checks nothing"),
        ('kind = "qemu"\n[qemu]\n[health]\nport = 22', "expect"),
        ('kind = "qemu"\n[qemu]\n[health]\nconsole = "x"\ntimeout = "0s"', "24 h"),
        ('kind = "qemu"\n[qemu]\n[health]\nconsole = "x"\nexpect = "y"', "go with port"),
        ('kind = "mount"\n[mount]\nfilesystems = []', "filesystems"),
        ('kind = "mount"\n[[mount.filesystems]]\ndisk = "d"\npath = "srv"', "absolute"),
        ('kind = "mount"\n[[mount.filesystems]]\ndisk = "d"\npath = "/"', "below /"),
        ('kind = "mount"\n[[mount.filesystems]]\ndisk = "d"\npath = "/a/../etc"', "absolute"),
        ('kind = "mount"\n[[mount.filesystems]]\ndisk = "d"\npath = "/a"\noptions = "ro;x"', "options"),
        ('kind = "mount"\n[[mount.filesystems]]\ndisk = "d"\npath = "/a"\ntype = "../x"', "filesystem"),
        (MOUNT.replace('["nginx"]', '["--root=/"]'), "service"),
        (MOUNT.replace("/usr/bin/pg_isready", "pg_isready"), "absolute path"),
        (MOUNT.replace("port = 5432", 'console = "x"'), "console"),
        ('kind = "none"\x00', "newline"),
        ("{" * 4000, "malformed"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(BadInputError, match=words) as caught:
        read_boot(text, "boot.toml")
    assert str(caught.value).startswith("boot.toml: ")


def test_one_path_twice_and_one_that_hides_another() -> None:
    two = '\n[[mount.filesystems]]\ndisk = "d"\npath = "{}"\n'
    for first, second, words in (("/a", "/a/", "one path"), ("/a/b", "/a", "hide")):
        with pytest.raises(BadInputError, match=words):
            read_boot('kind = "mount"\n' + two.format(first) + two.format(second), "f")
    read_boot('kind = "mount"\n' + two.format("/a") + two.format("/a/b"), "f")


def test_too_much_is_refused() -> None:
    start = ", ".join(f'["/bin/{n}", "{"x" * 900}"]' for n in range(20))
    with pytest.raises(BadInputError, match="script"):
        read_boot(f'kind = "mount"\n[mount]\nstart = [{start}]\n[[mount.filesystems]]\ndisk = "d"\npath = "/a"', "f")


def test_what_a_hostile_or_newer_host_wrote_is_refused_only_where_it_is_used() -> None:
    newer = json.dumps({"kind": "none", "firecracker": {}}).encode()
    record = DiskRecord(slot=0, id="0" * 32, name="root", size_bytes=512, boot=newer)
    assert decode_disk(encode_disk(record)) == record, "receiving goes on"
    for document in (newer, b"\xff", b"[]", b"[" * 5000, b'{"kind":"qemu"}'):
        with pytest.raises(FormatError, match="boot settings"):
            decode_boot(document)
    with pytest.raises(FormatError, match="bytes"):
        decode_disk(encode_disk(msgspec.structs.replace(record, boot=b"x" * (BOOT_BYTES_MAX + 1))))


def test_readers_of_before_pass_over_it() -> None:
    class OldRecord(msgspec.Struct, frozen=True, kw_only=True):
        slot: int
        id: str
        name: str
        size_bytes: int
        removed: bool = False
        gap: bool = False

    disk = DiskConfig(slot=1, id="1" * 32, name="root", size_bytes=512)
    machine = MachineConfig(id="0" * 32, name="web1", disks=(disk,), boot=BootSettings(kind="none"))
    record = DiskRecord.of(disk, machine.boot_document())
    assert record.boot == b'{"kind":"none"}'
    old = msgspec.msgpack.decode(encode_disk(record), type=OldRecord)
    assert (old.slot, old.name) == (1, "root")
    assert decode_disk(msgspec.msgpack.encode(old)).boot == b""


def test_the_examples_of_the_manual_are_taken() -> None:
    manual = (Path(__file__).parents[2] / "docs/boot.md").read_text()
    kinds = [read_boot(example, "docs/boot.md").kind for example in re.findall(r"```toml\n(.*?)```", manual, re.DOTALL)]
    assert kinds == ["qemu", "mount"]


def test_half_of_a_surrogate_pair_is_refused() -> None:
    """Nothing can write it."""
    with pytest.raises(BadInputError, match="a character that is none"):
        read_boot('kind = "mount"\n[[mount.filesystems]]\ndisk = "root"\npath = "/a\ud800"\n', "f")
    with pytest.raises(FormatError):
        decode_boot(b'{"kind": "mount", "mount": {"filesystems": [{"disk": "root", "path": "/a\\ud800"}]}}')
