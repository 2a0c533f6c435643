"""A real guest brought back by `failover` itself, as its boot settings say, from disks that are not here yet.

It is protected while it runs. A drill starts it beside the running one from a point, from an overlay of which only what
is read comes over, and so does a second one over NBD; then its power and its host's are lost, and the failover in
earnest starts what the store has. What was written is asked of each guest over its console.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import guest
import pytest

from asrfs.daemon.state import ROLES, StateDirectory
from asrfs.model.boot import BootSettings, Health, QemuBoot
from replica_store.boot.qemu_machine import QemuMachine
from tests.t5_system.failovers import FailoversUnderTest, failovers_of
from tests.waiting import wait_until
from tools.lab import Lab, stop

BOOT = (
    f'kind = "qemu"\n[qemu]\nmemory = "256M"\ndisks = ["root"]\n[health]\nconsole = "{guest.READY}"\ntimeout = "120s"\n'
)
RUNNING = {"kind": "qemu", "runs": True, "failure": ""}


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
        guest.make_image(lab.disks / "root.img", scratch)
        yield lab
    finally:
        lab.close()


@pytest.fixture
def failovers(lab: Lab) -> Iterator[FailoversUnderTest]:
    with failovers_of(lab.vault) as failovers:
        yield failovers


@contextlib.contextmanager
def console_of(directory: Path) -> Iterator[guest.GuestConsole]:
    console = guest.GuestConsole(directory / "console")
    try:
        yield console
    finally:
        console.close()


@contextlib.contextmanager
def production(lab: Lab, directory: Path) -> Iterator[guest.GuestConsole]:
    """The guest on the protected disk; at the end its power is lost."""
    machine = QemuMachine(directory)
    try:
        health = Health(console=guest.READY, timeout="120s")
        settings = BootSettings(kind="qemu", qemu=QemuBoot(memory="256M"), health=health)
        machine.start("web1", settings, {"root": str(lab.disks / "root.img")}, is_test=True)
        with console_of(directory) as console:
            yield console
    finally:
        machine.kill()


def lose_power(lab: Lab) -> None:
    """Every process of the host dies at once."""
    state = StateDirectory(str(lab.state))
    for pid in [pid for role in ROLES if (pid := state.lock_holder(role))]:
        os.kill(pid, signal.SIGKILL)
    assert lab.host is not None
    lab.host.wait(30)
    wait_until(lambda: not any(state.lock_holder(role) for role in ROLES), what="the end of the host")


@pytest.mark.timeout(400)
def test_i9_a_guest_is_brought_back(lab: Lab, failovers: FailoversUnderTest, scratch: Path) -> None:
    with production(lab, scratch / "production") as console:
        before = console.ask("head -c 3000000 /dev/urandom > before; sync; md5sum before")
        lab.asrfs("point", "create", "--name", "noon", "--wait", "--timeout", "60s")
        check_drill(failovers, lab, before)
        check_over_nbd(failovers, lab, before)
        after = console.ask("md5sum before") + "\n"
        after += console.ask("head -c 2000000 /dev/urandom > after; sync; md5sum after")
        lab.asrfs("drain", "--timeout", "60s")
    lose_power(lab)
    document = failovers.ask("unplanned", lab.machine, "--point", "latest")
    check_ready(document)
    with console_of(boot_of(document)) as console:
        assert console.ask("md5sum before after") == after
        console.ask("echo written > here; sync")
    failovers.ask("cancel", document["id"])
    assert failovers.leftovers() == ""


def check_drill(failovers: FailoversUnderTest, lab: Lab, before: str) -> None:
    """From an overlay, in which after the start there is little more than what was read and written."""
    document = failovers.ask("test", lab.machine, "--point", "noon")
    check_ready(document)
    (root,) = document["disks"]
    assert (root["filesystem"], root["fsck"], root["journal_replayed"]) == ("ext4", "clean", True), "in its partition"
    with console_of(boot_of(document)) as console:
        assert console.ask("md5sum before") == before
        console.ask("rm before; echo written > here; sync")
    state = Path(document["state_directory"])
    (disk,) = json.loads((state / "machine.json").read_text())["disks"]
    image = state / "images" / f"{disk['id']}.img"
    assert disk["base"] and image.stat().st_blocks * 512 < guest.IMAGE_BYTES // 4
    failovers.ask("cleanup", document["id"])


def check_over_nbd(failovers: FailoversUnderTest, lab: Lab, before: str) -> None:
    """The same, started from the store's export of the recovered disk."""
    document = failovers.ask("test", lab.machine, "--point", "noon", "--no-boot")
    assert document["boot"] is None
    settings, directory = lab.root / "boot.json", lab.root / "vm"
    settings.write_text(json.dumps(lab.replica_store("boot", "show", lab.machine, "--point", "noon")))
    with exported(lab, document["mount"]) as place:
        words = ("--settings", settings, "--directory", directory, "--disk", f"root={place}", "--test")
        try:
            assert failovers.run("boot", "start", lab.machine, *words).returncode == 0
            with console_of(directory) as console:
                assert console.ask("md5sum before") == before
                console.ask("echo written > here; sync")
        finally:
            assert failovers.run("boot", "stop", directory, "--now").returncode == 0
    failovers.ask("cleanup", document["id"])


def check_ready(document: dict[str, Any]) -> None:
    """What it said on its console has ended the clock."""
    assert document["boot"] == RUNNING and document["steps"][-1]["name"] == "boot"
    assert document["rto_seconds"] == pytest.approx(sum(step["seconds"] for step in document["steps"]), abs=0.01)


def boot_of(document: dict[str, Any]) -> Path:
    return Path(document["state_directory"]).parent / "boot"


@contextlib.contextmanager
def exported(lab: Lab, mount: str) -> Iterator[str]:
    """The disk of a recovered machine over NBD, to be written."""
    words = ["-m", "replica_store.cli.main", "--vault", lab.vault, "nbd", lab.machine, "--mount", mount, "--port", "0"]
    server = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield f"nbd://{server.stdout.readline().split()[1]}/root"
    finally:
        stop(server)
