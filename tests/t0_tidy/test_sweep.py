"""The sweep finds what a dead run left, removes it, and touches nothing else."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import sweep

SLEEPER = "import sys, time; print('up', flush=True); time.sleep(600)"


DEAD_SERVER = """
import ctypes, os, sys
device, target = os.open("/dev/fuse", os.O_RDWR), os.environ["TARGET"].encode()
options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
libc = ctypes.CDLL(None, use_errno=True)
print(libc.mount(b"dead", target, b"fuse", 0, options), flush=True)
sys.stdin.read()
"""
"""Mounts a filesystem and never answers a request; its command line does not say where."""


@contextmanager
def process_naming(path: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs for long and has `path` in its command line."""
    command = [sys.executable, "-c", SLEEPER, f"--state={path}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def mounted(path: Path) -> bool:
    return any(mount.target == str(path) for mount in sweep.parse_mounts(Path("/proc/self/mountinfo").read_text()))


def test_nothing_is_found_where_nothing_is_left(scratch: Path) -> None:
    assert not sweep.find(scratch)
    assert not sweep.sweep(scratch / "absent")


def test_a_process_is_killed_and_its_namesake_spared(scratch: Path) -> None:
    base = scratch / "run"
    base.mkdir()
    with process_naming(base / "state") as mine, process_naming(f"{base}-other") as other:
        found = sweep.sweep(base)
        assert [line.split()[0] for line in found.processes] == [str(mine.pid)]
        assert mine.wait(10) == -9
        assert other.poll() is None
    assert not base.exists()


def test_mounts_and_loop_devices_are_removed(scratch: Path) -> None:
    base = scratch / "run"
    inner = base / "a b" / "inner"
    (base / "a b").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "left", base / "a b"], check=True, timeout=20)
    inner.mkdir()
    image = base / "a b" / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True, timeout=20)
    subprocess.run(["mount", "-o", "loop", image, inner], check=True, timeout=20)
    found = sweep.sweep(base)
    assert found.mounts == (str(base / "a b"), str(inner))
    assert len(found.loops) == 1
    assert str(found)
    assert not mounted(inner)
    assert not sweep.find(base)
    assert not base.exists()


def test_a_mount_whose_server_never_answers_is_removed_and_releases_who_waits(scratch: Path) -> None:
    base = scratch / "run"
    target = base / "mnt"
    target.mkdir(parents=True)
    environment = {**os.environ, "TARGET": str(target)}
    command = [sys.executable, "-c", DEAD_SERVER]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "0\n"
        with subprocess.Popen(["stat", "mnt/x"], cwd=base, stdout=pipe, stderr=pipe) as waiting:
            try:
                with pytest.raises(subprocess.TimeoutExpired):
                    waiting.wait(0.3)
                found = sweep.sweep(base)
                assert found == sweep.Leftovers(mounts=(str(target),))
                assert waiting.wait(10) != 0
                assert server.poll() is None
            finally:
                server.kill()  # closes the device, which releases who still waits
    assert not mounted(target)
    assert not base.exists()


def test_only_directories_of_dead_runs_are_taken(scratch: Path) -> None:
    alive = sweep.run_directory(os.getpid()).name
    used_again = f"asrfs-test-{os.getpid()}-1"
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    names = [alive, used_again, f"asrfs-test-{ended.pid}-7", "asrfs-test-notes", "else-1-2"]
    for name in names:
        (scratch / name).mkdir()
    (scratch / "asrfs-test-3-4").symlink_to(scratch / "else-1-2")
    assert {path.name for path in sweep.dead_runs(scratch)} == {used_again, f"asrfs-test-{ended.pid}-7"}
    sweep.sweep_dead_runs(scratch)
    assert {path.name for path in scratch.iterdir()} == {
        alive,
        "asrfs-test-notes",
        "else-1-2",
        "asrfs-test-3-4",
    }


def test_networks_of_a_dead_run_are_taken(scratch: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    dead, alive = f"asrfs-test-{ended.pid}-7", sweep.run_directory(os.getpid()).name
    networks = [f"{dead}-home", f"{dead}1-home", f"{alive}-swept"]
    (scratch / dead).mkdir()
    try:
        for network in networks:
            subprocess.run(["ip", "netns", "add", network], check=True, timeout=20)
        sweep.sweep_dead_runs(scratch)
        assert sorted(set(networks) & set(os.listdir(sweep.NETWORKS))) == sorted(networks[1:])
    finally:
        for network in set(networks) & set(os.listdir(sweep.NETWORKS)):
            subprocess.run(["ip", "netns", "delete", network], check=True, timeout=20)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (b"asrfs\0--state\0/tmp/run-1/state\0", True),
        (b"asrfs\0--state=/tmp/run-1\0", True),
        (b"asrfs\0/tmp/run-12/state\0", False),
        (b"asrfs\0/tmp/run-1.old\0", False),
        (b"", False),
    ],
)
def test_naming_a_directory(command: bytes, named: bool) -> None:
    assert sweep.names_directory(command, Path("/tmp/run-1")) is named


def test_reading_mountinfo() -> None:
    line = "36 35 0:52 / /mnt/a\\040b rw,nosuid shared:1 master:2 - fuse.asrfs asrfs rw,user_id=0\n"
    assert sweep.parse_mounts(line) == [sweep.Mount("/mnt/a b", "fuse.asrfs", "asrfs")]
    assert sweep.parse_mounts(line.replace(" shared:1 master:2", ""))[0].source == "asrfs"


def test_a_test_that_leaves_a_process_fails(scratch: Path) -> None:
    """A suite of its own: its first test leaves a process behind, its second shows what the seed gave."""
    suite = scratch / "test_leaving.py"
    suite.write_text(
        '"""Planted."""\n'
        "import subprocess, sys\n"
        "def test_leaves(scratch):\n"
        f"    command = [sys.executable, '-c', {SLEEPER!r}, str(scratch)]\n"
        "    process = subprocess.Popen(command, stdout=subprocess.PIPE)\n"
        "    assert process.stdout.readline()\n"
        "    process.stdout.close(); process.returncode = 0\n"
        "def test_draws(rng):\n"
        "    print('drew', rng.random())\n"
    )
    root = Path(__file__).resolve().parents[2]
    options: list[str | Path] = [
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-rA",
        "--seed",
        "5",
        "--rootdir",
        scratch,
    ]
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        root / "pyproject.toml",
        *options,
        suite,
    ]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert "seed: 5 " in ran.stdout, ran.stdout + ran.stderr
    assert "2 passed, 1 error" in ran.stdout, ran.stdout + ran.stderr
    assert "the test left behind, removed now: process" in ran.stdout
    drew = random.Random("5 test_leaving.py::test_draws").random()
    assert f"drew {drew}" in ran.stdout
