"""A real guest: protected while it runs, its power lost, started again from a recovery point, its files checked."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import guest
import pytest

from asrfs.errors import AsrfsError, NotFoundError, TemporaryError
from asrfs.model.boot import BootSettings, Health, QemuBoot
from replica_store.boot.health import Place, port_answers, wait_until_healthy
from replica_store.boot.qemu_machine import QemuMachine
from replica_store.cli.main import run
from tests import sweep
from tests.waiting import wait_until
from tools.lab import Lab

BOOT = (
    f'kind = "qemu"\n[qemu]\nmemory = "256M"\ndisks = ["root"]\n[health]\nconsole = "{guest.READY}"\ntimeout = "90s"\n'
)


@pytest.fixture
def lab(scratch: Path) -> Iterator[Lab]:
    lab = Lab(parent=scratch)
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "root", "--size", "48M")
        lab.asrfs("set", "crash_interval=24h", "application_interval=off")
        (scratch / "boot.toml").write_text(BOOT)
        lab.asrfs("boot", "set", scratch / "boot.toml")
        lab.enroll()
        lab.start_host()
        yield lab
    finally:
        lab.close()


@contextlib.contextmanager
def started(directory: Path, settings: BootSettings, disks: dict[str, str]) -> Iterator[guest.GuestConsole]:
    machine = QemuMachine(directory)
    try:
        machine.start("web1", settings, disks, is_test=True)
        again = QemuMachine(directory)
        assert again.start("web1", settings, disks, is_test=True) < 5, "starting one that runs changes nothing"
        console = guest.GuestConsole(directory / "console")
        try:
            yield console
        finally:
            console.close()
    finally:
        machine.kill()
    assert not machine.is_running()


@pytest.mark.timeout(300)
def test_i9_a_guest_is_started_from_a_point_and_has_its_files(lab: Lab, scratch: Path) -> None:
    live = lab.disks / "root.img"
    guest.make_image(live, scratch)
    settings = BootSettings(
        kind="qemu", qemu=QemuBoot(memory="256M"), health=Health(console=guest.READY, timeout="90s")
    )
    with started(scratch / "a", settings, {"root": str(live)}) as console:
        before = console.ask("head -c 3000000 /dev/urandom > before; sync; md5sum before")
        point = lab.asrfs("point", "create", "--name", "noon", "--wait", "--timeout", "60s")
        after = console.ask("head -c 2000000 /dev/urandom > after; rm before; sync; md5sum after")
    lab.asrfs("drain", "--timeout", "60s")
    for selector, expected, gone in (("noon", before, "after"), ("latest", after, "before")):
        assert lab.replica_store("boot", "show", lab.machine, "--point", selector)["qemu"]["disks"] == ["root"]
        mount = scratch / selector
        mount.mkdir()
        lab.replica_store("export", lab.machine, "root", "--point", selector, "--output", mount / "root.img")
        with exported(lab, mount) as uri, started(scratch / f"vm-{selector}", settings, {"root": uri}) as console:
            name = expected.split()[1]
            assert console.ask(f"md5sum {name}") == expected
            assert console.ask(f"ls | grep -c '^{gone}$' || true") == "0"
            console.ask("echo written > here; sync")
        partition = scratch / "partition"
        partition.write_bytes((mount / "root.img").read_bytes()[1 << 20 :])
        checked = subprocess.run(["e2fsck", "-fy", partition], capture_output=True, timeout=60)
        assert checked.returncode in (0, 1), checked.stdout
    assert point["consistency"] == "crash"


@contextlib.contextmanager
def exported(lab: Lab, mount: Path) -> Iterator[str]:
    """The disk of a mount over NBD, which can be written."""
    words = ["--vault", lab.vault, "nbd", lab.machine, "--mount", mount, "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "replica_store.cli.main", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        yield f"nbd://{server.stdout.readline().split()[1]}/root"
    finally:
        server.terminate()
        assert server.wait(20) == 0
        server.stdout.close()


def test_a_machine_is_started_and_ended_by_commands(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (scratch / "root.img").write_bytes(bytes(1 << 20))
    (scratch / "boot.toml").write_text('kind = "qemu"\n[qemu]\nmemory = "64M"\n')
    directory, disk = scratch / "vm", f"root={scratch}/root.img"

    def boot(*words: str | Path, code: int = 0) -> str:
        capsys.readouterr()
        assert run(["--json", "boot", *map(str, words)]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    start = ("start", "web1", "--settings", scratch / "boot.toml", "--directory", directory, "--test", "--disk")
    try:
        for _ in range(2):
            assert json.loads(boot(*start, disk))["kind"] == "qemu"
        assert QemuMachine(directory).is_running()
    finally:
        for _ in range(2):
            boot("stop", directory, "--now")
    wait_until(lambda: not sweep.find(directory).processes, 10, "the end of QEMU")
    for wrong, code, words in (
        ("root", 2, "DISK=PLACE"),
        ("root=/no/such/file", 3, "/no/such/file"),
        ("root=nbd://nowhere", 2, "nbd://HOST:PORT/NAME"),
        ("../x=/dev/null", 2, "name of a disk"),
    ):
        assert words in boot(*start, wrong, code=code)
    assert "given twice" in boot(*start, disk, "--disk", disk, code=2)
    (scratch / "boot.toml").write_text('kind = "mount"\n[[mount.filesystems]]\ndisk = "root"\npath = "/srv"\n')
    assert "--root" in boot(*start, disk, code=2)
    (scratch / "boot.toml").write_text('kind = "none"')
    assert json.loads(boot(*start, disk))["seconds"] is None
    assert "no directory" in boot("stop", scratch / "gone", code=3)


def test_a_machine_that_does_not_come_up_says_why(scratch: Path) -> None:
    empty = scratch / "empty.img"
    empty.write_bytes(b"")
    os.truncate(empty, 1 << 20)
    disks = {"root": str(empty)}
    machine = QemuMachine(scratch / "vm")
    health = Health(console="never", timeout="1s")
    settings = BootSettings(kind="qemu", qemu=QemuBoot(memory="64M"), health=health)
    try:
        with pytest.raises(TemporaryError, match="after 1s there was not 'never' on the console"):
            machine.start("web1", settings, disks, is_test=True, accelerators=("tcg",))
        assert machine.is_running(), "it is left for somebody to look at"
    finally:
        QemuMachine(scratch / "vm").stop(gently_s=0)
        machine.kill()
    assert not machine.is_running()
    with pytest.raises(AsrfsError, match=r"did not start.*No such file"):
        machine.start("web1", settings, {"root": f"{scratch}/gone.img"}, is_test=True, accelerators=("tcg",))
    with pytest.raises(NotFoundError, match="other"):
        wrong = BootSettings(kind="qemu", qemu=QemuBoot(disks=("other",)))
        machine.start("web1", wrong, disks, is_test=True, accelerators=("tcg",))


def test_a_port_counts_when_it_says_what_is_expected() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()

        def answer() -> None:
            for _ in range(3):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(b"SSH-2.0-x\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert port_answers(address, "hello\n", "SSH-2")
        assert not port_answers(address, "hello\n", "HTTP")
        health = Health(port=1, say="x", expect="SSH")
        assert wait_until_healthy(health, Place(address=address), lambda: None) < 5
        thread.join()
    assert not port_answers(address, "", None)
    with pytest.raises(AsrfsError, match="ended before it ran: power cut"):
        wait_until_healthy(Health(port=address[1]), Place(), lambda: "power cut")
