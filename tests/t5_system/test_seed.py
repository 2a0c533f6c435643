"""A copy of a disk that was brought to the store by hand: only what differs from it travels, on the real machine."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_until
from tools.benchmarks.relay import Relay
from tools.lab import Lab, command

MIB = 1 << 20
CHUNK = 64 << 10
SIZE = 96 * MIB + 512
CONTENT = 64 * MIB


@pytest.fixture
def lab(make_scratch: Callable[[str], Path], rng: random.Random) -> Iterator[Lab]:
    """A store, and a machine that is enrolled and not served yet, with an adopted image of 64 MiB of content."""
    lab = Lab(parent=make_scratch("seed"))
    try:
        lab.start_store()
        write_image(lab.root / "old.raw", rng)
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "old", "--image", lab.root / "old.raw")
        lab.asrfs("set", "crash_interval=24h", "application_interval=off")
        lab.enroll()
        yield lab
    finally:
        lab.close()


@pytest.fixture
def relay(lab: Lab) -> Iterator[Relay]:
    """Between the machine and its store."""
    relay = Relay(lab.data)
    relay.stand_between(lab.state)
    yield relay
    relay.close()


def write_image(path: Path, rng: random.Random) -> None:
    """Half of its content can be compressed, a part of it is zeros that were written, and there are holes."""
    with path.open("wb") as file:
        for at in range(0, CONTENT, MIB):
            file.seek(at + (at // (8 * MIB)) * 4 * MIB)
            file.write(rng.randbytes(MIB) if at % (2 * MIB) else rng.randbytes(4096) * 256)
        file.seek(8 * MIB)
        file.write(bytes(MIB))
        file.truncate(SIZE)


def change(path: Path, rng: random.Random, places: int) -> None:
    """Some bytes here and there."""
    with path.open("r+b") as file:
        for _ in range(places):
            file.seek(rng.randrange(SIZE - 100))
            file.write(rng.randbytes(100))


def fails(lab: Lab, *arguments: str | Path) -> tuple[int, str]:
    """Exit code and words of a `replica-store seed` that must not succeed."""
    words = command("replica_store.cli.main", "--vault", lab.vault, "seed", *arguments)
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode, done.stdout
    return done.returncode, done.stderr


def exported(lab: Lab, point: str = "latest") -> bytes:
    output = lab.root / "export.raw"
    lab.replica_store("export", lab.machine, "old", "--point", point, "--output", output)
    content = output.read_bytes()
    output.unlink()
    return content


def is_protected(lab: Lab) -> bool:
    return bool(lab.status()["state"] == "protected")


def wait_protected(lab: Lab) -> None:
    wait_until(lambda: is_protected(lab), 90, what="the end of the first copy")
    lab.asrfs("drain", "--timeout", "60s")


def seeds(lab: Lab) -> list[str]:
    return sorted(path.name for path in (lab.vault / "seeds").glob("*/*") if path.name != ".lock")


def test_only_differences_travel(lab: Lab, relay: Relay, rng: random.Random) -> None:
    copy = lab.root / "brought.raw"
    subprocess.run(["cp", "--sparse=always", lab.root / "old.raw", copy], check=True, timeout=60)
    change(copy, rng, 20)
    document: dict[str, Any] = lab.replica_store("seed", lab.machine, "old", "--image", copy)
    assert document["size_bytes"] == SIZE and 60 * MIB < document["content_bytes"] <= CONTENT + 2 * MIB
    copy.unlink()
    lab.start_host()
    fd = os.open(lab.disks / "old.img", os.O_RDWR)
    for at in (3 * MIB, 20 * MIB + 12345, 70 * MIB):
        os.pwrite(fd, rng.randbytes(20_000), at)
    os.fsync(fd)
    os.close(fd)
    wait_protected(lab)
    assert relay.sent < 10 * MIB, "20 changed places of at most two chunks each, and what live writes touched"
    assert lab.stop_host() == 0
    content = (lab.root / "old.raw").read_bytes()
    assert exported(lab) == content, "I9"
    wait_until(lambda: not seeds(lab), 30, what="the seed is removed")
    verified = lab.replica_store("verify")
    assert not verified["damages"], verified
    lab.kill_store()
    lab.replica_store("rebuild")
    assert exported(lab) == content, "the seed was no part of what a catalog is made of"


def kill_while_it_copies(lab: Lab) -> None:
    words = command("replica_store.cli.main", "--vault", lab.vault, "seed", lab.machine, "old", "--image")
    process = subprocess.Popen([*words, lab.root / "old.raw"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = lab.vault / "seeds"
    wait_until(lambda: any(parts.glob("*/.*")) or process.poll() is not None, 30, what="it has begun")
    process.kill()
    process.wait()


def test_whoever_dies_the_copy_is_exact(lab: Lab, relay: Relay, rng: random.Random) -> None:
    """`seed` is killed while it copies, is run again and again; then agent, disk server, store are killed in turn."""
    for _ in range(3):
        kill_while_it_copies(lab)
        assert len(seeds(lab)) <= 1
    for _ in range(2):  # the second takes the first one's place
        lab.replica_store("seed", lab.machine, "old", "--image", lab.root / "old.raw")
    assert [name for name in seeds(lab) if name != "old.seed"] == []
    lab.asrfs("set", "bandwidth_limit=64K")
    lab.start_host()
    for role in ("agent", "disk_server", "agent"):
        before = relay.sent
        wait_until(lambda: relay.sent > before + 4000 or is_protected(lab), 60, what="it goes on")  # noqa: B023
        lab.kill(role)
    lab.kill_store()
    lab.start_store()
    lab.asrfs("set", "bandwidth_limit=0")
    wait_protected(lab)
    assert relay.sent < 4 * MIB
    assert lab.stop_host() == 0
    assert exported(lab) == (lab.root / "old.raw").read_bytes(), "I9"


def test_a_damaged_seed_costs_traffic_only(lab: Lab, relay: Relay, rng: random.Random) -> None:
    """What the table says the store has, it cannot open: the host is told, and sends everything."""
    lab.replica_store("seed", lab.machine, "old", "--image", lab.root / "old.raw")
    (path,) = (lab.vault / "seeds").glob("*/old.seed")
    with path.open("r+b") as file:
        for at in range(path.stat().st_size // 2, path.stat().st_size, 1 << 20):
            file.seek(at)
            file.write(rng.randbytes(16))
    lab.start_host()
    wait_protected(lab)
    assert lab.stop_host() == 0
    assert exported(lab) == (lab.root / "old.raw").read_bytes(), "I9"
    assert relay.sent > 8 * MIB


def test_a_seed_that_comes_later_is_used_from_then_on(lab: Lab, relay: Relay) -> None:
    lab.kill_store()
    lab.replica_store("seed", lab.machine, "old", "--image", lab.root / "old.raw")
    (path,) = (lab.vault / "seeds").glob("*/old.seed")
    path.rename(lab.root / "kept.seed")
    lab.start_store()
    lab.asrfs("set", "bandwidth_limit=1M")
    lab.start_host()
    wait_until(lambda: relay.sent > 4 * MIB, 60, what="some of it travels")
    assert lab.replica_store("point", "list", lab.machine) == [], "I5: the first copy is not complete"
    lab.replica_store("seed", lab.machine, "old", "--image", lab.root / "old.raw")
    wait_protected(lab)
    assert relay.sent < 24 * MIB
    assert lab.stop_host() == 0
    assert exported(lab) == (lab.root / "old.raw").read_bytes(), "I9"
    code, said = fails(lab, lab.machine, "old", "--image", lab.root / "old.raw")
    assert code == 4 and "nothing to seed" in said


def test_bad_input(lab: Lab, rng: random.Random) -> None:
    image = lab.root / "old.raw"

    def refused(machine: str, disk: str, path: Path) -> tuple[int, str]:
        code, said = fails(lab, machine, disk, "--image", path)
        assert said.startswith("asrfs: error: ") and said.count("\n") == 1 and "Traceback" not in said, said
        return code, said

    assert refused("nobody", "old", image)[0] == 3, "no machine of that name has enrolled"
    assert refused(lab.machine, "../old", image)[0] == 2
    assert refused(lab.machine, "old", lab.root / "missing.raw")[0] == 3
    assert refused(lab.machine, "old", lab.root)[0] == 2, "a directory"
    odd, empty, packed, small = (lab.root / name for name in ("odd", "empty", "packed", "small"))
    odd.write_bytes(bytes(1000))
    empty.write_bytes(b"")
    packed.write_bytes(b"QFI\xfb" + bytes(508))
    small.write_bytes(rng.randbytes(512))
    assert refused(lab.machine, "old", odd)[0] == 2
    assert refused(lab.machine, "old", empty)[0] == 2
    code, said = refused(lab.machine, "old", packed)
    assert code == 2 and "qemu-img convert" in said
    assert seeds(lab) == []
    lab.replica_store("seed", lab.machine, "unknown-yet", "--image", small)
    lab.asrfs("set", "bandwidth_limit=100K")
    lab.start_host()
    wait_until(lambda: bool(lab.replica_store("machine", "show", lab.machine)["disks"]), 30, what="the disk is known")
    code, said = refused(lab.machine, "old", small)
    assert code == 2 and "not a copy of this disk" in said
    code, said = refused(lab.machine, "unknown", image)
    assert code == 3 and "it has old" in said
