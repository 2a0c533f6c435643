"""`asrfs boot` and `replica-store boot`: settings travel with the history, each point has its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from replica_store.vault.vault import Vault
from tools.lab import Lab, LabError

QEMU = 'kind = "qemu"\n[qemu]\nmemory = "256M"\ndisks = ["root"]\n[health]\nconsole = "ready [ok]"\n'


@pytest.fixture
def lab(scratch: Path) -> Iterator[Lab]:
    lab = Lab(parent=scratch)
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "root", "--size", "2M")
        lab.asrfs("set", "crash_interval=24h", "application_interval=off")
        lab.enroll()
        yield lab
    finally:
        lab.close()


def test_each_point_has_the_settings_of_its_moment(lab: Lab, scratch: Path) -> None:
    file = scratch / "boot.toml"

    def set_boot(text: str) -> Any:
        file.write_text(text)
        return lab.asrfs("boot", "set", file)

    def at(selector: str) -> Any:
        return lab.replica_store("boot", "show", lab.machine, "--point", selector)

    def point(name: str) -> None:
        lab.asrfs("point", "create", "--name", name, "--wait", "--timeout", "60s")

    assert lab.asrfs("boot", "show") == {"kind": "none"}
    lab.start_host()
    point("before")
    said = set_boot(QEMU)
    assert said == lab.asrfs("boot", "show")
    assert said["qemu"] == {"memory": "256M", "disks": ["root"]} and said["health"] == {"console": "ready [ok]"}
    point("qemu")
    for wrong, words in ((QEMU.replace("memory", "memry"), "memry"), (QEMU.replace("root", "gone"), "gone")):
        with pytest.raises(LabError, match=words):
            set_boot(wrong)
    assert lab.asrfs("boot", "show") == said
    set_boot('kind = "mount"\n[[mount.filesystems]]\ndisk = "root"\npath = "/srv"\n')
    point("mount")
    lab.stop_host()
    lab.start_host()
    point("again")
    kinds = {name: at(name)["kind"] for name in ("before", "qemu", "mount", "again", "latest")}
    assert kinds == {"before": "none", "qemu": "qemu", "mount": "mount", "again": "mount", "latest": "mount"}
    assert at("qemu") == said
    with Vault.open(str(lab.vault)) as vault:
        rows = [row.record.boot for row in vault.catalog.disk_rows(vault.machine(lab.machine).id)]
        assert len(rows) == 3, "what did not change is not kept again"
    lab.stop_host()
    lab.kill_store()
    copy = scratch / "copy"
    shutil.copytree(lab.vault, copy)
    for left in copy.glob("catalog.sqlite3*"):
        left.unlink()
    lab.vault = copy
    lab.replica_store("rebuild")
    assert at("qemu") == said and at("before") == {"kind": "none"}, "a rebuilt catalog has them"
