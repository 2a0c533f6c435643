"""`asrfs verify` on the real machine: equal is equal, under writes too; a byte changed behind our back is found."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_until
from tools.lab import Lab, command

CHUNK = 64 << 10
BLOCK = 4096


@pytest.fixture
def lab(scratch: Path, rng: random.Random) -> Iterator[Lab]:
    """A store and a served machine: `own`, a sparse disk, and `old`, an adopted image with content and holes."""
    lab = Lab(parent=scratch)
    try:
        lab.start_store()
        old = lab.root / "old.raw"
        with old.open("wb") as file:
            for at in (0, 3 << 20, (9 << 20) + 4096):
                file.seek(at)
                file.write(rng.randbytes(300_000))
            file.truncate((10 << 20) + 512)
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "own", "--size", "24M")
        lab.asrfs("disk", "add", "old", "--image", old)
        lab.asrfs("set", "crash_interval=24h", "application_interval=off")
        lab.enroll()
        lab.start_host()
        wait_until(lambda: not any(disk["dirty_bytes"] for disk in lab.status()["disks"]), 60, what="the first copy")
        yield lab
    finally:
        lab.close()


def verify(lab: Lab) -> tuple[int, Any, str]:
    """Exit code, document and what is said on stderr."""
    words = command("asrfs.cli.main", "--state", lab.state, "--json", "verify")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False)
    return done.returncode, json.loads(done.stdout or "null"), done.stderr


def image(lab: Lab, name: str) -> Path:
    return next(Path(disk["image"]) for disk in lab.status()["disks"] if disk["name"] == name)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


@contextlib.contextmanager
def writing(path: Path, rng: random.Random) -> Iterator[None]:
    """Blocks anywhere on the disk, as fast as they are taken, and zeros now and then."""
    stop = threading.Event()
    seed = rng.random()

    def run() -> None:
        own = random.Random(seed)
        file = os.open(path, os.O_RDWR)
        try:
            size = os.fstat(file).st_size
            while not stop.is_set():
                at = own.randrange(size // BLOCK) * BLOCK
                os.pwrite(file, bytes(BLOCK) if own.random() < 0.2 else own.randbytes(BLOCK), at)
        finally:
            os.close(file)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.timeout(300)
def test_a_byte_changed_behind_our_back_is_found_and_nothing_else(lab: Lab, rng: random.Random) -> None:
    with (lab.disks / "own.img").open("r+b") as file:
        for at in (0, 70_000, 5 << 20, 23 << 20):
            file.seek(at)
            file.write(rng.randbytes(100_000))
        os.fsync(file.fileno())
    code, document, said = verify(lab)
    assert (code, document["chunks_different"]) == (0, 0), said
    assert document["chunks_compared"] == 24 * 16 + 161
    assert {disk["name"]: disk["chunks_compared"] for disk in document["disks"]} == {"own": 384, "old": 161}
    assert 0 < document["bytes_sent"] < 2000
    for name, at in (("old", (9 << 20) + 70_000), ("own", 12 << 20)):
        flip(image(lab, name), at)
        code, document, said = verify(lab)
        found = {disk["name"]: disk["extents"] for disk in document["disks"] if disk["chunks_different"]}
        assert (code, found) == (5, {name: [[at // CHUNK * CHUNK, CHUNK]]}), said
        assert "1 of 545 chunks" in said
        assert name in said
        flip(image(lab, name), at)
    assert verify(lab)[0] == 0


@pytest.mark.timeout(300)
def test_writes_under_way_are_no_difference_and_hide_none(lab: Lab, rng: random.Random) -> None:
    with writing(lab.disks / "own.img", rng):
        for _ in range(3):
            code, document, said = verify(lab)
            assert code == 0, (said, document)
        flip(image(lab, "old"), 3 << 20)
        code, document, said = verify(lab)
        assert (code, document["chunks_different"]) == (5, 1), said


@pytest.mark.timeout(300)
def test_it_survives_the_store_and_says_what_it_cannot_do(lab: Lab) -> None:
    lab.asrfs("pause")
    code, _, said = verify(lab)
    assert code == 4
    assert "asrfs resume" in said
    lab.asrfs("resume")
    lab.kill_store()
    words = command("asrfs.cli.main", "--state", lab.state, "--json", "verify")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL) as waiting:
        with contextlib.suppress(subprocess.TimeoutExpired):
            waiting.wait(2)
        lab.start_store()
        said, _ = waiting.communicate(timeout=60)
        assert waiting.returncode == 0
    assert json.loads(said)["chunks_different"] == 0
