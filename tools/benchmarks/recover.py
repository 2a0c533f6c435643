"""`recover`: how soon disks are back over a long unapplied journal, and how fast a point becomes a file again."""

from __future__ import annotations

import filecmp
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from lab import Lab, LabError, wait_until
from lab import run as run_program

from asrfs.model.quantities import format_size

from .benchmark import Run
from .measuring import MIB, fio, resident_now, resident_peak
from .own_peers import AsrfsPeer, ShippingPeer
from .packages import version_of
from .results import Turn, Workload
from .workbench import Workbench

DISK_BYTES, DISK_BYTES_TINY = 1 << 40, 1 << 30
BLOCK = 4096
FILL_SECONDS_MAX = 1200
CHANGED_EVERY = 100
EXPORT, COPY, RSYNC, RSYNC_AGAIN = "replica-store-export", "cp", "rsync", "rsync-again"

NOTES = (
    "For the restart the agent is stopped while 4 KiB writes go to random places of a sparse disk. `taken over`: the "
    "disk server alone is killed; the time until a read that waits is answered. `restarted`: everything is killed; the "
    "time from `asrfs serve` to `ready` and a first read, with the journal in the page cache, or read from the disk.",
    "Export, cp and rsync make the same bytes, which are compared each time, and end with fdatasync. cp and rsync read "
    "the disk's image on the same machine, which they could not do at the other site. `rsync, changed` finds a copy of "
    "which every hundredth block differs.",
)


def run(bench: Workbench, name: str, command: str) -> Run:
    options = bench.options
    settings = {
        "unapplied journal": format_size(options.backlog_bytes),
        "disk to export": format_size(options.size_bytes),
        "turns": options.turns,
    }
    run = Run(bench, name, command, settings)
    run.use_fio()
    run.outcome.notes += NOTES
    if bench.wants("asrfs"):
        _restarts(run)
    _exports(run)
    return run


# ---- restart ----------------------------------------------------------------------------------------------------


def _restarts(run: Run) -> None:
    bench, size_bytes = run.bench, DISK_BYTES_TINY if run.bench.options.tiny else DISK_BYTES
    backlog = format_size(bench.options.backlog_bytes)
    takeover, warm, cold = (
        Workload(key, f"disks back with {backlog} unapplied, {how}", "s", less_is_better=True)
        for key, how in (
            ("takeover", "taken over"),
            ("restart", "restarted"),
            ("restart-cold", "restarted, nothing cached"),
        )
    )
    memory = Workload("map-memory", f"growth of the disk server over {backlog} unapplied", "MiB", less_is_better=True)
    run.outcome.workloads += [takeover, warm, cold, memory]
    facts = run.facts(AsrfsPeer.key)
    with bench.stack() as stack:
        peer = AsrfsPeer(bench, size_bytes)
        peer.start(stack)
        facts.version = peer.version()
        for turn in range(bench.options.turns):
            for workload, is_cold in ((warm, False), (cold, True)):
                before = resident_now(peer.processes()["disk server"])
                records = _leave_unapplied(bench, peer)
                after = peer.processes()["disk server"]
                grown = max(0, resident_now(after) - before)
                memory.add(peer.key, Turn(grown / MIB, {"resident_mib": resident_peak(after) / MIB}))
                facts.resident_bytes_max["disk server"] = max(
                    resident_peak(after), facts.resident_bytes_max.get("disk server", 0)
                )
                takeover.add(peer.key, Turn(_take_over(peer), {"records": records}))
                workload.add(peer.key, Turn(_restart(peer, is_cold), {"records": records}))
                peer.settle()
                facts.resident_bytes_max["agent"] = max(
                    resident_peak(peer.processes()["agent"]), facts.resident_bytes_max.get("agent", 0)
                )
            bench.say(f"turn {turn + 1} of {bench.options.turns} of restarts done")


def _leave_unapplied(bench: Workbench, peer: AsrfsPeer) -> int:
    """Stop the agent and write; how many records lie in the journal that no image holds."""
    os.kill(peer.processes()["agent"], signal.SIGSTOP)
    words = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--norandommap", "--refill_buffers", "--end_fsync=1"]
    words += [f"--size={peer.size_bytes}", f"--io_size={bench.options.backlog_bytes}"]
    return fio(bench, [_served(peer)], words, FILL_SECONDS_MAX).operations


def _take_over(peer: AsrfsPeer) -> float:
    """Kill the disk server; seconds until a read is answered by the next."""
    begin = time.monotonic()
    os.kill(peer.processes()["disk server"], signal.SIGKILL)
    _read_a_block(peer)
    return time.monotonic() - begin


def _restart(peer: AsrfsPeer, is_cold: bool) -> float:
    """Kill everything and serve again; seconds until a read is answered."""
    assert peer.lab.host is not None
    peer.bench.flush_everything()
    pids = peer.processes()
    peer.lab.host.kill()
    peer.lab.host.wait()
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not peer.processes(), "the end of what was killed")
    if is_cold:
        for segment in (peer.lab.state / "journal").iterdir():
            _forget(segment)
    begin = time.monotonic()
    peer.lab.start_host(wait_for_agent=False)
    _read_a_block(peer)
    seconds = time.monotonic() - begin
    wait_until(lambda: "agent" in peer.processes(), "the start of the agent")
    return seconds


def _read_a_block(peer: AsrfsPeer) -> None:
    """In a process of its own, which may be given up where nobody answers."""
    run_program(["dd", f"if={_served(peer)}", "of=/dev/null", f"bs={BLOCK}", "count=1", "status=none"], timeout=120)


def _served(peer: AsrfsPeer) -> Path:
    return peer.lab.disks / "bench.img"


# ---- export -----------------------------------------------------------------------------------------------------


def _exports(run: Run) -> None:
    bench = run.bench
    speed = Workload("export", "a point, or its image, becomes a file", "MiB/s", COPY)
    run.outcome.workloads.append(speed)
    run.facts(EXPORT, "replica-store export")
    run.facts(COPY, "cp --sparse=always", f"coreutils {version_of('coreutils')}")
    for key, title in ((RSYNC, "rsync --inplace, new"), (RSYNC_AGAIN, "rsync --inplace, changed")):
        run.facts(key, title).unavailable = bench.packages.missing(("rsync",))
        run.facts(key).version = f"rsync {version_of('rsync')}" if version_of("rsync") else ""
    with bench.stack() as stack:
        peer = ShippingPeer(bench, bench.options.size_bytes)
        run.begin(peer, stack, filled=True)
        run.facts(EXPORT).version = peer.version()
        peer.lab.asrfs("point", "create", "--name", "full", "--wait", "--timeout", "300s")
        peer.settle()
        image = peer.image()
        places = bench.directory("copies")
        old = places / "old.img"
        _make_older_copy(image, old)
        for turn in range(bench.options.turns):
            for key, step in _steps(bench, peer.lab, image, old, places / "new.img").items():
                if bench.wants(key) and not run.facts(key).unavailable:
                    with run.or_gone(key):
                        speed.add(key, Turn(bench.options.size_bytes / MIB / step()))
            bench.say(f"turn {turn + 1} of {bench.options.turns} of exports done")


def _steps(bench: Workbench, lab: Lab, image: Path, old: Path, new: Path) -> dict[str, Callable[[], float]]:
    """By peer: make the file, check it, remove it; the seconds of the making."""

    def make(words: list[str], base: Path | None = None) -> float:
        if base is not None:
            shutil.copyfile(base, new)
        bench.flush_everything()
        begin = time.monotonic()
        if words:
            run_program(words, timeout=FILL_SECONDS_MAX)
        else:
            lab.replica_store("export", lab.machine, "bench", "--point", "full", "--output", new)
        with new.open("rb+") as file:
            os.fdatasync(file.fileno())
        seconds = time.monotonic() - begin
        if not filecmp.cmp(image, new, shallow=False):
            raise LabError(f"{' '.join(words) or 'the export'} made something else than the disk")
        new.unlink()
        return seconds

    rsync = ["rsync", "--inplace", "--no-whole-file", str(image), str(new)]
    return {
        EXPORT: lambda: make([]),
        COPY: lambda: make(["cp", "--sparse=always", str(image), str(new)]),
        RSYNC: lambda: make(rsync),
        RSYNC_AGAIN: lambda: make(rsync, old),
    }


def _make_older_copy(image: Path, old: Path) -> None:
    """A copy of which every hundredth block differs, and the time too, so that rsync looks at all of it."""
    shutil.copyfile(image, old)
    with old.open("rb+") as file:
        for offset in range(0, image.stat().st_size, BLOCK * CHANGED_EVERY):
            file.seek(offset)
            file.write(b"\xa5" * BLOCK)


def _forget(path: Path) -> None:
    """Have the page cache forget a file."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
