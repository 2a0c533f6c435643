"""Bytes that are not what they were, by the two commands: file, offset and LSN are named, and nothing is changed.

One machine and one vault serve all of it: each test damages something, looks, and puts it back.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from asrfs.format.record import RECORD_HEADER_BYTES
from asrfs.format.segment import SEGMENT_HEADER_BYTES
from replica_store.cli import main
from replica_store.vault.schema import REBUILDABLE
from replica_store.vault.vault import Vault
from tests.t5_system.machine import HostUnderTest
from tests.t5_system.stamps import Stamper, StampWriter
from tests.waiting import wait_until
from tools.lab import Lab, command

BLOCK = 4096
BLOCKS = 256


@contextmanager
def damaged(path: Path, at: int, bit: int = 1) -> Iterator[None]:
    """One bit of a file is another one meanwhile."""
    flip(path, at, bit)
    try:
        yield
    finally:
        flip(path, at, bit)


def flip(path: Path, at: int, bit: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def store(lab: Lab, *arguments: str | Path) -> Done:
    """`replica-store --json …` within this process, which is faster; every failure is one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.run(["--vault", str(lab.vault), "--json", *map(str, arguments)])
    if code:
        assert err.getvalue().startswith("asrfs: error: "), err.getvalue()
        assert err.getvalue().count("\n") == 1, err.getvalue()
    return Done(code, out.getvalue(), err.getvalue())


# ---- the host's journal --------------------------------------------------------------------------------------------


@pytest.fixture
def dead(scratch: Path, rng: random.Random) -> Iterator[tuple[HostUnderTest, Stamper, int]]:
    """A host all of whose processes were killed with durable records that are not in the images yet."""
    host = HostUnderTest(scratch)
    host.init(disk=f"{BLOCKS * BLOCK}")
    host.serve()
    agent = host.kill("agent", signal.SIGSTOP)
    stamper = Stamper(rng.randrange(1 << 30), 1, BLOCKS)
    writer = StampWriter(stamper, [host.mount / "disk.img"])
    for _ in range(4):
        writer.write(10)
        writer.fsync()
    durable = writer.done
    writer.write(3)
    host.kill("supervisor")
    host.kill("disk_server")
    os.kill(agent, signal.SIGKILL)
    wait_until(lambda: host.pid("agent") is None, what="the end of the agent")
    try:
        writer.close()
    except OSError:
        pass  # the flush that closing is finds nobody
    yield host, stamper, durable
    host.close()


def digests(host: HostUnderTest) -> dict[str, str]:
    """Every file that holds something of the machine."""
    files = [path for path in host.path.rglob("*") if path.is_file() and path.parent.name not in ("run", "log")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def records_of(host: HostUnderTest, segment: Path) -> list[dict[str, Any]]:
    shown = host.asrfs("inspect", segment)
    return list(shown["records"])


def segment_in_use(host: HostUnderTest) -> Path:
    """The one segment that holds records."""
    (segment,) = [path for path in sorted((host.path / "journal").glob("*.segment")) if holds_records(host, path)]
    return segment


def holds_records(host: HostUnderTest, path: Path) -> bool:
    with path.open("rb") as file:
        return any(file.read(SEGMENT_HEADER_BYTES)) and bool(records_of(host, path))


@pytest.mark.parametrize("place", ["payload", "header"])
def test_a_flipped_bit_in_a_durable_record_stops_serve_and_changes_nothing(
    dead: tuple[HostUnderTest, Stamper, int], place: str, rng: random.Random
) -> None:
    host, _, durable = dead
    segment = segment_in_use(host)
    record = rng.choice([each for each in records_of(host, segment) if each["kind"] == "WRITE"][: durable - 12])
    at = record["at"] + (RECORD_HEADER_BYTES + rng.randrange(BLOCK) if place == "payload" else rng.randrange(48))
    first, second = rng.sample([1 << bit for bit in range(8)], 2)
    flip(segment, at, first)
    before = digests(host)
    for _ in range(2):
        done = host.run("serve", "--mount", host.mount)
        assert done.returncode == 5, done.stderr
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("asrfs: error: ")
        for named in (segment.name, f"offset {record['at']}", f"LSN {record['lsn']} "):
            assert named in done.stderr, done.stderr
        assert digests(host) == before
        assert not os.path.ismount(host.mount)
    inspected = host.run("inspect", segment)
    if place == "payload":
        assert inspected.returncode == 5
        assert segment.name in inspected.stderr and f"LSN {record['lsn']}" in inspected.stderr
        assert str(record["at"]) in inspected.stderr
    flip(segment, at, second)  # another bit of the byte: still not what it was
    assert host.run("serve", "--mount", host.mount).returncode == 5


def test_a_flipped_bit_that_is_put_back_leaves_nothing_lost(dead: tuple[HostUnderTest, Stamper, int]) -> None:
    host, stamper, durable = dead
    segment = segment_in_use(host)
    at = records_of(host, segment)[5]["at"] + 100
    with damaged(segment, at):
        assert host.run("serve", "--mount", host.mount).returncode == 5
    host.serve()
    stamper.check([host.mount / "disk.img"], at_least=durable)
    assert host.stop() == 0
    stamper.check([host.image("disk")], at_least=durable)


def test_a_torn_tail_is_cut_and_the_machine_goes_on(
    dead: tuple[HostUnderTest, Stamper, int], rng: random.Random
) -> None:
    host, stamper, durable = dead
    segment = segment_in_use(host)
    last = records_of(host, segment)[-1]
    with segment.open("r+b") as file:
        file.seek(last["at"] + RECORD_HEADER_BYTES + 512)
        file.write(rng.randbytes(3000))
    host.serve()
    k = stamper.check([host.mount / "disk.img"], at_least=durable)
    assert k == durable + 2, "all but the torn one"
    assert "a torn tail was cut" in Path(host.state.log_path("disk_server")).read_text()
    assert host.stop() == 0
    assert stamper.check([host.image("disk")], exactly=k) == k


def test_inspect_of_what_is_no_segment(scratch: Path, rng: random.Random) -> None:
    host = HostUnderTest(scratch)
    junk = scratch / "junk"
    junk.write_bytes(rng.randbytes(100_000))
    for path, code in ((junk, 5), (scratch / "nothing", 3), (scratch, 2)):
        done = host.run("inspect", path)
        assert done.returncode == code
        assert done.stderr.count("\n") == 1 and str(path) in done.stderr


# ---- the vault -----------------------------------------------------------------------------------------------------


class Replicated:
    """A lab whose vault holds a history with points between its log objects."""

    def __init__(self, lab: Lab, writer: StampWriter) -> None:
        self.lab = lab
        self.writer = writer
        self.points: dict[str, tuple[int, int]] = {}

    def go_on(self, name: str) -> None:
        """More writes, and a point with the store."""
        self.writer.write(60)
        self.writer.fsync()
        point = self.lab.asrfs("point", "create", "--name", name, "--wait", "--timeout", "60s")
        self.points[name] = point["lsn"], self.writer.done

    def objects(self) -> list[tuple[Path, int, int]]:
        """`(file, first LSN, last LSN)` of the log objects, in order."""
        with Vault.open(str(self.lab.vault)) as vault:
            (machine,) = vault.machines()
            rows = vault.objects_of(machine.id, vault.received_lsn(machine.id))
            return [(self.lab.vault / "objects" / row.name, row.first_lsn, row.last_lsn) for row in rows]

    def export(self, selector: str) -> tuple[Done, Path]:
        output = self.lab.root / "exported"
        output.unlink(missing_ok=True)
        words = ("export", self.lab.machine, "disk", "--point", selector, "--output", output)
        return store(self.lab, *words), output

    def check_export(self, name: str) -> None:
        done, output = self.export(name)
        assert done.code == 0, done.err
        self.writer.stamper.check([output], exactly=self.points[name][1])

    def listed(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(store(self.lab, "point", "list", self.lab.machine).out)
        return found


@pytest.fixture(scope="module")
def replicated(make_scratch: Any) -> Iterator[Replicated]:
    lab = Lab(parent=make_scratch("corruption"))
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "disk", "--size", f"{BLOCKS * BLOCK}")
        lab.enroll()
        lab.start_host()
        writer = StampWriter(Stamper(7, 1, BLOCKS), [lab.disks / "disk.img"])
        lab.at_close(writer.close)
        replicated = Replicated(lab, writer)
        for name in ("one", "two", "three"):
            replicated.go_on(name)
        yield replicated
    finally:
        lab.close()


def test_verify_and_export_name_a_damaged_log_object_and_earlier_lsns_stay(
    replicated: Replicated, rng: random.Random
) -> None:
    one, two = (replicated.points[name][0] for name in ("one", "two"))
    path, first, last = next(each for each in replicated.objects() if each[1] > one)
    assert last <= two
    for at in (20, path.stat().st_size // 2, path.stat().st_size - 50):
        with damaged(path, at, 1 << rng.randrange(8)):
            done = store(replicated.lab, "verify", replicated.lab.machine)
            assert done.code == 5, f"byte {at}"
            (damage,) = json.loads(done.out)["damages"]
            assert damage["file"] == str(path)
            assert first <= damage["first_lsn"] <= damage["last_lsn"] <= last
            assert damage["points"] == ["two", "three"], "those that may need it"
            assert str(path) in done.err and "LSN" in done.err
            inspected = subprocess.run(
                command("asrfs.cli.main", "inspect", path), capture_output=True, text=True, timeout=60, check=False
            )
            assert (inspected.returncode, inspected.stderr.count("\n")) == (5, 1)
            replicated.check_export("one")
    with damaged(path, path.stat().st_size - 50):
        done, output = replicated.export(f"lsn:{last}")
        assert done.code == 5
        assert str(path) in done.err and "LSN" in done.err
        assert not output.exists(), "nothing half-done"
        done, output = replicated.export(f"lsn:{first - 1}")
        assert done.code == 0, "the LSN before it is whole"
    with damaged(path, 20):
        assert replicated.export("three")[0].code == 5
    moved = path.rename(path.with_suffix(".moved"))  # a stranger among the objects, which nobody minds
    done = store(replicated.lab, "verify")
    assert done.code == 5
    assert "missing" in done.err and str(path) in done.err
    assert replicated.export("two")[0].code == 5
    moved.rename(path)
    assert store(replicated.lab, "verify").code == 0
    for name in replicated.points:
        replicated.check_export(name)


@pytest.mark.parametrize("damage", ["deleted", "overwritten", "cut short", "a flipped page"])
def test_a_damaged_catalog_says_rebuild_and_rebuild_restores_it(replicated: Replicated, damage: str) -> None:
    lab = replicated.lab
    lab.asrfs("drain", "--timeout", "60s")
    assert lab.store is not None
    lab.store.terminate()
    assert lab.store.wait(30) == 0
    before, machines, listed = tables(lab), store(lab, "machine", "list"), replicated.listed()
    catalog = lab.vault / "catalog.sqlite3"
    harm(catalog, damage)
    words: tuple[tuple[str | Path, ...], ...] = (
        ("machine", "list"),
        ("point", "list", lab.machine),
        ("token", "web9"),
        ("export", lab.machine, "disk", "--point", "one", "--output", lab.root / "never"),
    )
    for verb in words:
        done = store(lab, *verb)
        assert done.code == 5, (verb, done.err, done.out)
        assert "rebuild" in done.err and str(catalog) in done.err
    assert not (lab.root / "never").exists()
    ports = ("--host", "127.0.0.1", "--data-port", "0", "--manage-port", "0")
    serving = subprocess.run(
        command("replica_store.cli.main", "--vault", lab.vault, "serve", *ports),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (serving.returncode, serving.stderr.count("\n")) == (5, 1), serving.stderr
    assert "rebuild" in serving.stderr and str(catalog) in serving.stderr
    rebuilt = store(lab, "rebuild")
    assert rebuilt.code == 0, rebuilt.err
    assert tables(lab) == before
    assert replicated.listed() == listed
    shown, was = json.loads(store(lab, "machine", "list").out), json.loads(machines.out)
    durable = ("machine", "state", "epoch", "acknowledged_lsn", "points", "disks")
    assert [[each.get(key) for key in durable] for each in shown] == [
        [each.get(key) for key in durable] for each in was
    ]
    lab.start_store()
    replicated.go_on(f"after-{damage.replace(' ', '-')}")
    for name in replicated.points:
        replicated.check_export(name)
    assert store(lab, "verify").code == 0


def tables(lab: Lab) -> dict[str, object]:
    with Vault.open(str(lab.vault)) as vault:
        return {name: vault.catalog.table(name) for name in REBUILDABLE}


def harm(catalog: Path, damage: str) -> None:
    size = catalog.stat().st_size
    if damage == "deleted":
        for path in catalog.parent.glob("catalog.sqlite3*"):
            path.unlink()
    elif damage == "overwritten":
        catalog.write_bytes(random.Random(1).randbytes(size))
    elif damage == "cut short":
        os.truncate(catalog, size // 3)
    else:
        whole = bytearray(catalog.read_bytes())
        for at in range(BLOCK, size):
            whole[at] ^= 0x55
        catalog.write_bytes(whole)
