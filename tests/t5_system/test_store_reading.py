"""`replica-store point list`, `export` and `mount` on a vault: what they print, where they end, what they leave."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from asrfs.format.record import Kind
from asrfs.model.quantities import format_time
from replica_store.cli.main import run
from tests.fakes.filled_vault import fill_vault
from tests.fakes.memory_history import MemoryHistory, random_history
from tests.waiting import wait_until

END_SECONDS_MAX = 15.0
SIZES = {"root": 300 * 4096 + 512, "extra": 64 * 4096}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def history(rng: random.Random) -> MemoryHistory:
    history = random_history(rng.randrange(1 << 30), records=300, disks=SIZES)
    history.marker("end")
    history.disk(2, "late", 4096)
    history.seal()
    history.disk(3, "adopted", 4096, gap=True)
    history.write(3, 0, b"a" * 4096, Kind.FILL)
    history.seal()
    return history


@pytest.fixture
def vault(scratch: Path, history: MemoryHistory) -> Path:
    root = scratch / "vault"
    fill_vault(root, history)
    return root


@pytest.fixture
def store(vault: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `replica-store` in this process; checks the form of every failure."""
    monkeypatch.setenv("REPLICA_STORE_VAULT", str(vault))

    def call(*arguments: str | Path) -> Outcome:
        code = run([str(each) for each in arguments])
        out, err = capsys.readouterr()
        if code:
            assert err.startswith("asrfs: error: "), err
            assert err.count("\n") == 1, err
        return Outcome(code, out, err)

    return call


def test_point_list(store: Run, history: MemoryHistory) -> None:
    listed = json.loads(store("point", "list", "web1", "--json").out)
    points = history.points(history.id)
    assert [each["id"] for each in listed] == [point.id for point in points]
    assert listed[-1] == {
        "id": points[-1].id,
        "lsn": points[-1].lsn,
        "epoch": 1,
        "time": format_time(points[-1].time_ns),
        "consistency": "crash",
        "group": None,
        "name": "end",
        "protected": False,
        "hold_ms": None,
        "freeze_ms": None,
        "note": None,
        "wanted": None,
        "failed": None,
        "hooks": [],
        "group_point": None,
        "members": [],
        "ready": None,
        "unfinished": False,
        "tail": False,
    }
    drawn = store("point", "list", "web1").out
    assert points[-1].id in drawn
    assert format_time(points[-1].time_ns) in drawn
    assert store("point", "list", "web2").code == 3
    assert store("point", "list", "../web1").code == 2


def test_i9_export_at_every_kind_of_selector(
    store: Run, history: MemoryHistory, scratch: Path, rng: random.Random
) -> None:
    end = history.points(history.id)[-1]
    lsn = rng.randint(3, end.lsn)
    selectors = {
        f"lsn:{lsn}": lsn,
        f"time:{format_time(history.time_at(lsn))}": lsn,
        "end": end.lsn,
        end.id: end.lsn,
        "latest-processed": end.lsn,
    }
    for number, (selector, expected) in enumerate(selectors.items()):
        for slot, disk in enumerate(SIZES):
            output = scratch / f"{disk}-{number}"
            done = store("export", "web1", disk, "--point", selector, "--output", output, "--json")
            document = json.loads(done.out)
            assert (
                document.items()
                >= {
                    "machine": "web1",
                    "disk": disk,
                    "lsn": expected,
                    "epoch": 1,
                    "time": format_time(history.time_at(expected)),
                    "output": str(output),
                    "format": "raw",
                    "size_bytes": SIZES[disk],
                }.items()
            )
            assert output.read_bytes() == history.state_at(expected)[slot]
    assert (
        json.loads(store("export", "web1", "root", "--point", "end", "--output", scratch / "x", "--json").out)["point"]
        == end.id
    )


def test_export_refuses(store: Run, history: MemoryHistory, scratch: Path) -> None:
    end = history.points(history.id)[-1].lsn
    taken = scratch / "taken"
    taken.write_text("old")
    before = sorted(os.listdir(scratch))
    for disk, selector, output, code in (
        ("root", "nobody", "x", 3),
        ("root", f"lsn:{history.lsn + 1}", "x", 3),
        ("root", "time:1999-01-01T00:00:00Z", "x", 3),
        ("root", "latest-application", "x", 3),
        ("root", "a b", "x", 2),
        ("root", "lsn:-1", "x", 2),
        ("root", "latest", "x", 4),
        ("root", f"lsn:{history.lsn}", "x", 4),
        ("nodisk", "end", "x", 3),
        ("late", "end", "x", 3),
        ("root", "end", "taken", 4),
        ("root", "end", "nowhere/x", 3),
    ):
        outcome = store("export", "web1", disk, "--point", selector, "--output", scratch / output)
        assert outcome.code == code, (disk, selector, output, outcome)
    assert store("export", "nobody", "root", "--point", "end", "--output", scratch / "x").code == 3
    assert store("export", "web1", "root", "--output", scratch / "x").code == 2
    assert store("export", "web1", "root", "--point", "end", "--output", scratch / "x", "--format", "vhd").code == 2
    assert sorted(os.listdir(scratch)) == before
    assert taken.read_text() == "old"
    assert store("export", "web1", "root", "--point", "end", "--output", taken, "--force").code == 0
    assert taken.read_bytes() == history.state_at(end)[0]
    assert store("export", "web1", "late", "--point", f"lsn:{end + 1}", "--output", scratch / "late").code == 0


def test_damage_ends_with_5_and_names_file_and_lsn(store: Run, vault: Path, scratch: Path) -> None:
    for path in sorted(vault.rglob("*.obj")):
        stored = bytearray(path.read_bytes())
        stored[-40] ^= 1
        path.write_bytes(stored)
    outcome = store("export", "web1", "root", "--point", "end", "--output", scratch / "x")
    assert outcome.code == 5
    assert ".obj" in outcome.err
    assert "LSN" in outcome.err
    for path in vault.rglob("*.obj"):
        path.unlink()
    outcome = store("export", "web1", "root", "--point", "end", "--output", scratch / "x")
    assert outcome.code == 5
    assert "LSN" in outcome.err
    assert not (scratch / "x").exists()


def test_mount_shows_the_vault(vault: Path, history: MemoryHistory, scratch: Path) -> None:
    end = history.points(history.id)[-1]
    tree = scratch / "tree"
    tree.mkdir()
    command: list[str | Path] = [sys.executable, "-m", "replica_store.cli.main", "--vault", vault, "mount", tree]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        assert os.listdir(tree) == ["web1"]
        for place in ("end", end.id, f"lsn:{end.lsn}", f"time:{format_time(end.time_ns)}"):
            assert sorted(os.listdir(tree / "web1" / place)) == ["extra.img", "root.img"]
            for slot, disk in enumerate(SIZES):
                assert (tree / "web1" / place / f"{disk}.img").read_bytes() == history.state_at(end.lsn)[slot]
        with pytest.raises(OSError, match="busy"):
            os.stat(tree / "web1" / "latest")
        program.send_signal(signal.SIGTERM)
        assert program.wait(END_SECONDS_MAX) == 0
    assert not os.path.ismount(tree)


def test_mount_refuses(store: Run, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scratch / "full").mkdir()
    (scratch / "full" / "x").write_text("")
    (scratch / "empty").mkdir()
    assert store("mount", scratch / "nowhere").code == 3
    assert store("mount", scratch / "full").code == 4
    assert store("mount", scratch / "full" / "x").code == 2
    assert store("--vault", scratch / "empty", "mount", scratch / "empty").code == 3


def test_sigterm_during_an_export_leaves_nothing(vault: Path, scratch: Path) -> None:
    slow = scratch / "bin"
    slow.mkdir()
    (slow / "qemu-img").write_text('#!/bin/sh\ntouch "$0.started"\nexec sleep 60\n')
    (slow / "qemu-img").chmod(0o755)
    output = scratch / "out"
    output.mkdir()
    words: list[str | Path] = [
        "export",
        "web1",
        "root",
        "--point",
        "end",
        "--format",
        "qcow2",
        "--output",
        output / "x",
    ]
    assert shutil.which("sleep")
    program = subprocess.Popen(
        [sys.executable, "-m", "replica_store.cli.main", "--vault", vault, *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": f"{slow}:{os.environ['PATH']}"},
    )
    try:
        wait_until((slow / "qemu-img.started").exists, what="the conversion")
        program.terminate()
        _, err = program.communicate(timeout=END_SECONDS_MAX)
    finally:
        program.kill()
    assert program.returncode == 1
    assert err.startswith("asrfs: error: the export was interrupted")
    assert err.count("\n") == 1
    assert os.listdir(output) == []
