"""`resync`: how fast both sides scan, what a comparison costs on the wire and in time beside rsync, what a dirty map
spares, and what writers feel of a resync."""

from __future__ import annotations

import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from lab import Lab, LabError, wait_until

from asrfs.model.digest_tree import NODE_BYTES, Region, node_digests, regions_of
from asrfs.model.extents import CHUNK_BYTES
from asrfs.model.quantities import format_size
from asrfs.protocol.messages import Compare
from asrfs.replication.image_digests import digest_image
from asrfs.storage.directory import open_path
from replica_store.points.digests import Comparer
from replica_store.vault.vault import Vault

from . import rsync
from .benchmark import Run
from .measuring import MIB, fio, lasting
from .own_peers import STORE_NICE, AsrfsPeer
from .packages import version_of
from .relay import Relay
from .results import Turn, Workload
from .rsync import Change
from .workbench import Workbench

KEY, DISK = "asrfs", "bench"
PERCENTS = (0, 1, 10)
FIRST = 1
SECONDS = 10
WRITES_PER_S = 1000
QUOTA_BYTES = 256 * MIB
WAIT_S_MAX = 900.0
_HALF_DIFFERENT = 50
_CHANGED_BYTES = 4096
_LOOK_EVERY_BYTES = 32 * MIB
_GB = 1e9

NOTES = (
    "The image is half random bytes and half bytes that pack to a tenth. Scanning: what the process that digests does, "
    "in this process, by its processor time, from the page cache; the store reads log objects as a host shipped them.",
    "Changed: 4 KiB anywhere in each of so many chunks of 64 KiB, while the machine is stopped. asrfs: the command "
    "`resync --full-scan --now`, from its start until the store has all of it, durably. rsync: `--inplace "
    "--no-whole-file --ignore-times --fsync` to another file of this machine, and over loopback to its daemon, which "
    "does not encrypt; both before asrfs in one turn and behind it in the next. All read from the page cache. The "
    "store has the digests of the comparison before, as it has from the second one on; `the first time`: it has none. "
    "On the wire: both directions; of asrfs with TLS, counted by a relay; of rsync what it says of itself.",
    "Dirty map: the store was away until the journal was over its quota. What is read is all that the disk server read "
    "from then on until the store had everything.",
    f"Writers: 4 KiB at random places, depth 1, {WRITES_PER_S} a second, through the loop device; with: while half of "
    "all chunks are compared and sent. The resync began before and ended behind each measurement, or it is said. The "
    "store, which in earnest is another machine, has what processors the host leaves to it, and no relay is between; "
    "`beside the store` is with a store that has as much right to them.",
)


def run(bench: Workbench, name: str, command: str) -> Run:
    size_bytes = bench.options.image_bytes
    seconds = bench.seconds(SECONDS)
    settings = {"image": format_size(size_bytes), "turns": bench.options.turns, "seconds of writing": seconds}
    run = Run(bench, name, command, settings)
    run.use_fio()
    run.outcome.notes += NOTES
    run.facts(KEY, "asrfs", AsrfsPeer(bench, 0).version())
    for key, title in rsync.TITLES.items():
        run.facts(key, title).unavailable = bench.packages.missing(("rsync",))
        run.facts(key).version = f"rsync {version_of('rsync')}" if version_of("rsync") else ""
    bench.say(f"making an image of {format_size(size_bytes)}")
    image = bench.directory("image") / "disk.raw"
    make_image(image, size_bytes)
    with _machine(bench, image) as machine:
        _scan(run, machine)
        _beside_rsync(run, machine)
        _by_map(run, machine)
        _writers(run, machine, seconds)
    return run


def make_image(path: Path, size_bytes: int) -> None:
    """The first half packs to a tenth, the second not at all."""
    places = random.Random(1)
    with path.open("wb") as file:
        for at in range(0, size_bytes, MIB):
            length = min(MIB, size_bytes - at)
            if at < size_bytes // 2:
                file.write(b"".join(places.randbytes(410) + bytes(3686) for _ in range(length // 4096)))
            else:
                file.write(places.randbytes(length))


# ---- the machine ---------------------------------------------------------------------------------------------------


class _Machine:
    """A store and a machine whose one disk is the image, with a relay between them."""

    def __init__(self, bench: Workbench, lab: Lab, relay: Relay, image: Path) -> None:
        self.bench = bench
        self.lab = lab
        self.relay = relay
        self.image = image
        self.size_bytes = image.stat().st_size
        self.places = random.Random(2)

    @property
    def chunks(self) -> int:
        return self.size_bytes // CHUNK_BYTES

    def change(self, percent: float) -> int:
        """Of a stopped machine; how many chunks."""
        chosen = self.places.sample(range(self.chunks), int(self.chunks * percent / 100))
        file = os.open(self.image, os.O_RDWR)
        try:
            for chunk in sorted(chosen):
                at = self.places.randrange(CHUNK_BYTES // _CHANGED_BYTES) * _CHANGED_BYTES
                os.pwrite(file, self.places.randbytes(_CHANGED_BYTES), chunk * CHUNK_BYTES + at)
            os.fsync(file)
        finally:
            os.close(file)
        return len(chosen)

    def resync(self, expected: int | None) -> Change:
        """Compare and send. Raises LabError if it is not as many chunks as were changed, None: however many."""
        before, began = self.relay.passed, time.monotonic()
        document = self.lab.asrfs("resync", "--full-scan", "--now")
        taken = Change(time.monotonic() - began, self.relay.passed - before)
        if expected is not None and document["chunks_different"] != expected:
            raise LabError(f"{document['chunks_different']} chunks differed where {expected} were changed")
        return taken

    def wait_until_whole(self) -> None:
        wait_until(lambda: bool(self.lab.status()["state"] == "protected"), "all to be at the store", WAIT_S_MAX)
        self.lab.asrfs("drain", "--timeout", f"{WAIT_S_MAX:.0f}s")

    def stop(self) -> None:
        if self.lab.stop_host():
            raise LabError("the machine did not stop")

    def start(self) -> None:
        self.lab.start_host()
        wait_until(lambda: bool(self.lab.status()["link"] == "connected"), "the connection to the store")


@contextmanager
def _machine(bench: Workbench, image: Path) -> Iterator[_Machine]:
    """With the first copy made."""
    with bench.stack() as stack:
        lab = Lab(parent=bench.root, store_nice=STORE_NICE)
        stack.callback(lab.close)
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", DISK, "--image", image)
        lab.asrfs("set", "crash_interval=24h", "application_interval=off")
        lab.enroll()
        relay = Relay(lab.data)
        stack.callback(relay.close)
        relay.stand_between(lab.state)
        machine = _Machine(bench, lab, relay, image)
        lab.start_host()
        bench.say("the first copy is made")
        machine.wait_until_whole()
        yield machine


# ---- scanning ------------------------------------------------------------------------------------------------------


def _scan(run: Run, machine: _Machine) -> None:
    """Bytes digested for each second of processor time on either side."""
    half = machine.size_bytes // 2 // NODE_BYTES * NODE_BYTES
    parts = {
        "compressible": [region for region in regions_of(machine.size_bytes) if region.end <= half],
        "incompressible": [region for region in regions_of(machine.size_bytes) if region.offset >= half],
    }
    if not all(parts.values()):  # a small image is one region
        parts = {kind: list(regions_of(machine.size_bytes)) for kind in parts}
    workloads = {
        (side, kind): Workload(f"scan-{side}-{kind}", f"{side} digests of {kind} content", "GB/s a core")
        for side in ("host", "store")
        for kind in parts
    }
    run.outcome.workloads += workloads.values()
    _host_scan(machine, parts["compressible"][:1])
    for _ in range(run.bench.options.turns):
        for kind, regions in parts.items():
            workloads["host", kind].add(KEY, Turn(_host_scan(machine, regions)))
            workloads["store", kind].add(KEY, Turn(_store_scan(machine, regions)))
    run.bench.say("scanning done")


def _host_scan(machine: _Machine, regions: Iterable[Region]) -> float:
    image = open_path(str(machine.image))
    try:
        began, done = time.process_time(), 0
        for region in regions:
            done += digest_image(image, region).bytes_read
        return done / (time.process_time() - began) / _GB
    finally:
        image.close()


def _store_scan(machine: _Machine, regions: list[Region]) -> float:
    """The digests that are asked about are wrong ones: that makes no difference to what is read."""
    with Vault.open(str(machine.lab.vault)) as vault:
        (row,) = vault.machines()
        (disk,) = vault.disks_at(row.id, vault.received_lsn(row.id))
        comparer = Comparer(vault)
        seconds, done = 0.0, 0
        for number, region in enumerate([regions[0], *regions]):  # the first is for opening the history
            wanted = Compare(
                number=number,
                slot=disk.slot,
                disk_id=disk.id,
                size_bytes=region.size_bytes,
                first=region.first,
                digests=node_digests(bytes(32 * region.leaves)),
            )
            began = time.process_time()
            answer = comparer.answer(row.id, wanted)
            if answer.exit_code:
                raise LabError(f"the store could not compare: {answer.text}")
            if number:
                seconds += time.process_time() - began
                done += region.end - region.offset
        return done / seconds / _GB


# ---- beside rsync --------------------------------------------------------------------------------------------------


def _beside_rsync(run: Run, machine: _Machine) -> None:
    bench = run.bench
    speeds, wires = {}, {}
    first = Workload("resync-first", f"{FIRST} % of the chunks changed, the first time", "MiB/s", rsync.LOCAL)
    for percent in PERCENTS:
        title = f"{percent} % of the chunks changed"
        speeds[percent] = Workload(f"resync-{percent}", f"{title}: disk by time", "MiB/s", rsync.LOCAL)
        wires[percent] = Workload(f"wire-{percent}", f"{title}: on the wire", "% of the disk", less_is_better=True)
    run.outcome.workloads += [*speeds.values(), first, *wires.values()]
    has_rsync = not run.facts(rsync.LOCAL).unavailable
    with bench.stack() as stack:
        others = stack.enter_context(rsync.peers(bench, machine.image)) if has_rsync else {}
        for turn in range(bench.options.turns):
            for percent in PERCENTS:
                for key, each in _one_change(machine, percent, others, others_first=turn % 2 == 0).items():
                    speeds[percent].add(key, Turn(machine.size_bytes / MIB / each.seconds, {"seconds": each.seconds}))
                    share = 100 * each.wire_bytes / machine.size_bytes
                    wires[percent].add(key, Turn(share, {"wire_kib": each.wire_bytes / 1024}))
            shutil.rmtree(machine.lab.vault / "leaves", ignore_errors=True)
            for key, each in _one_change(machine, FIRST, others, others_first=turn % 2 == 0).items():
                first.add(key, Turn(machine.size_bytes / MIB / each.seconds, {"seconds": each.seconds}))
            bench.say(f"turn {turn + 1} of {bench.options.turns} beside rsync done")


def _one_change(
    machine: _Machine, percent: float, others: Mapping[str, Callable[[], Change]], *, others_first: bool
) -> dict[str, Change]:
    """What it takes everybody to bring one change over."""
    bench = machine.bench
    machine.stop()
    changed = machine.change(percent)
    bench.flush_everything()
    found = {key: bring() for key, bring in others.items() if others_first}
    machine.start()
    found[KEY] = machine.resync(changed)
    bench.flush_everything()
    return found | {key: bring() for key, bring in others.items() if not others_first}


# ---- by the dirty map ----------------------------------------------------------------------------------------------


def _by_map(run: Run, machine: _Machine) -> None:
    """The store is away until so much was written that the journal is over its quota, to a hundredth of the disk."""
    lab, bench = machine.lab, run.bench
    took = Workload("map", "a hundredth of the disk dirty, healed by the map", "s", less_is_better=True)
    reads = Workload("map-read", "a hundredth of the disk dirty: read of it", "× dirty bytes", less_is_better=True)
    run.outcome.workloads += [took, reads]
    lab.asrfs("set", f"journal_quota={QUOTA_BYTES // MIB}M")
    for _ in range(bench.options.turns):
        lab.kill_store()
        chosen = machine.places.sample(range(machine.chunks), max(1, machine.chunks // 100))
        _write_until(machine, chosen, lambda: bool(lab.status()["state"] == "resync-required"))
        dirty_bytes = len(chosen) * CHUNK_BYTES
        before, wire, began = _bytes_read(machine), machine.relay.passed, time.monotonic()
        lab.start_store()
        lab.asrfs("resync", "--now")
        machine.wait_until_whole()
        read = _bytes_read(machine) - before
        also = {"wire_kib": (machine.relay.passed - wire) / 1024, "dirty_mib": dirty_bytes / MIB}
        took.add(KEY, Turn(time.monotonic() - began, also))
        reads.add(KEY, Turn(read / dirty_bytes, {"dirty_mib": dirty_bytes / MIB}))
    lab.asrfs("set", "journal_quota=50%")
    bench.say("healing by the map done")


def _write_until(machine: _Machine, chunks: list[int], is_over: Any) -> None:
    """Write all of these chunks again and again."""
    file = os.open(machine.lab.disks / f"{DISK}.img", os.O_RDWR)
    deadline = time.monotonic() + WAIT_S_MAX
    try:
        while not is_over():
            if time.monotonic() > deadline:
                raise LabError("the journal never came over its quota")
            for chunk in islice(cycle(chunks), max(len(chunks), _LOOK_EVERY_BYTES // CHUNK_BYTES)):
                os.pwrite(file, machine.places.randbytes(CHUNK_BYTES), chunk * CHUNK_BYTES)
            os.fsync(file)
    finally:
        os.close(file)


def _bytes_read(machine: _Machine) -> int:
    """By the disk server, of whatever file."""
    text = Path(f"/proc/{machine.lab.pid('disk_server')}/io").read_text()
    return int(re.findall(r"rchar: (\d+)", text)[0])


# ---- writers -------------------------------------------------------------------------------------------------------


def _writers(run: Run, machine: _Machine, seconds: float) -> None:
    titles = {"without": "without a resync", "with": "with a resync", "beside": "with a resync, beside the store"}
    workloads = {
        kind: Workload(f"writers-{kind}", f"write of 4 KiB {title}, p99", "µs", less_is_better=True)
        for kind, title in titles.items()
    }
    ratios = Workload("writers-ratio", "p99 with a resync by p99 without", "×", less_is_better=True)
    run.outcome.workloads += [*workloads.values(), ratios]
    for turn in range(run.bench.options.turns):
        values = {}
        for kind, workload in workloads.items():
            _rank_store(machine, 0 if kind == "beside" else STORE_NICE)
            found = _write(run, machine, seconds, with_resync=kind != "without")
            workload.add(KEY, found)
            values[kind] = found.value
        ratios.add(KEY, Turn(values["with"] / values["without"]))
        run.bench.say(f"turn {turn + 1} of {run.bench.options.turns} of writers done")


def _rank_store(machine: _Machine, niceness: int) -> None:
    """Where sessions are scheduled as groups, niceness alone counts within each."""
    assert machine.lab.store is not None
    with suppress(OSError):
        Path(f"/proc/{machine.lab.store.pid}/autogroup").write_text(str(niceness))


def _write(run: Run, machine: _Machine, seconds: float, *, with_resync: bool) -> Turn:
    lab = machine.lab
    machine.stop()
    machine.change(_HALF_DIFFERENT if with_resync else 0)
    machine.relay.stand_aside(lab.state)
    run.bench.flush_everything()
    machine.start()
    device = str(lab.asrfs("attach", DISK)["device"])
    taken: list[Change] = []
    resyncing = threading.Thread(target=lambda: taken.append(machine.resync(None)), daemon=True)
    try:
        if with_resync:
            resyncing.start()
            time.sleep(min(1.0, seconds / 4))
        words = ("--rw=randwrite", "--bs=4k", "--iodepth=1", "--refill_buffers", f"--rate_iops={WRITES_PER_S}")
        load = fio(run.bench, [device], (*words, *lasting(seconds)), seconds + 120)
        if with_resync:
            if not resyncing.is_alive():
                run.outcome.notes.append("A resync ended before the writers did: choose a larger image.")
            resyncing.join(WAIT_S_MAX)
    finally:
        lab.asrfs("detach", DISK)
    machine.wait_until_whole()
    return Turn(load.p99_us, {"p50_us": load.p50_us, "written": load.iops, **_resynced(machine, taken)})


def _resynced(machine: _Machine, taken: list[Change]) -> dict[str, float]:
    return {"seconds": taken[0].seconds} if taken else {}
