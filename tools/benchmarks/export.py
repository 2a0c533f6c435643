"""`export`: how soon the first byte of a point of a large disk with a long history is there, and in what memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from lab import LabError, command, stop, wait_until

from asrfs.model.quantities import format_size
from replica_store.vault.vault import Vault

from . import long_history
from .benchmark import Run
from .long_history import BLOCK, DISK, MACHINE, LongHistory
from .measuring import MIB, resident_peak
from .own_peers import AsrfsPeer
from .results import Turn, Workload
from .workbench import Workbench, is_mounted

DISK_BYTES, DISK_BYTES_TINY = 1 << 40, 1 << 30
SECONDS_MAX = 600.0
EXPORT, MOUNT = "replica-store-export", "replica-store-mount"
_LOOK_S = 0.002

NOTES = (
    "The history consists of 4 KiB writes at random places, in objects of 4 MiB as a host ships them; their bytes "
    "repeat, so that it fits. A point is `lsn:N` after so many records.",
    "`export`: from the start of the command until its file has a block; the command is stopped then. `mount`: from "
    "the opening of the file in a tree that nobody looked at before until a written block of it is read.",
    "Memory is the most that the whole process had resident.",
    "Map checkpoints are there as `replica-store serve` makes them, except where it says that there are none, as when "
    "they were deleted.",
)


def run(bench: Workbench, name: str, command: str) -> Run:
    records = bench.options.records
    counts = tuple(sorted({records // 4, records // 2, records}))
    size_bytes = DISK_BYTES_TINY if bench.options.tiny else DISK_BYTES
    settings = {"disk": format_size(size_bytes), "records": records, "turns": bench.options.turns}
    run = Run(bench, name, command, settings)
    run.outcome.notes += NOTES
    bench.say(f"making a history of {records:,} records")
    history = long_history.make(bench.root / "vault", records, size_bytes, counts)
    version = AsrfsPeer(bench, 0).version()
    for key, title in ((EXPORT, "replica-store export"), (MOUNT, "replica-store mount")):
        run.facts(key, title, version)
    steps: list[tuple[int, Workload, Workload, Workload]] = []
    for count in counts:
        label = f"{count / 1e6:g}M" if count >= 1e6 else f"{count / 1e3:g}k"
        soon = Workload(f"first-byte-{label}", f"first byte after {label} records", "s", less_is_better=True)
        memory = Workload(f"memory-{label}", f"memory for {label} records", "MiB", less_is_better=True)
        title = f"first byte after {label} records, no map checkpoints"
        steps.append((count, soon, memory, Workload(f"bare-{label}", title, "s", less_is_better=True)))
    for column in zip(*(step[1:] for step in steps), strict=True):
        run.outcome.workloads += column
    ways: dict[str, Callable[[Workbench, LongHistory, int], tuple[float, int]]] = {EXPORT: _export, MOUNT: _mount}
    for turn in range(bench.options.turns):
        for count, _, _, bare in steps:
            for key, way in ways.items():
                shutil.rmtree(history.vault / "maps", ignore_errors=True)  # what the one before left
                seconds, _ = way(bench, history, count)
                bare.add(key, Turn(seconds, {"per_million": seconds / count * 1e6}))
        shutil.rmtree(history.vault / "maps", ignore_errors=True)
        run.outcome.notes += (_make_maps(history),)
        for count, soon, memory, _ in steps:
            millions = count / 1e6
            for key, way in ways.items():
                seconds, peak = way(bench, history, count)
                soon.add(key, Turn(seconds, {"per_million": seconds / millions}))
                memory.add(key, Turn(peak / MIB, {"per_million": peak / MIB / millions}))
        bench.say(f"turn {turn + 1} of {bench.options.turns} done")
    return run


def _make_maps(history: LongHistory) -> str:
    """As `serve` has it done; what it took."""
    before = os.times()
    with Vault.open(str(history.vault)) as vault:
        (machine,) = vault.machines()
    words = command("replica_store.daemon.map_worker", history.vault, machine.id)
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    if done.returncode:
        raise LabError(f"no map checkpoints were made: {done.stderr[-300:]}")
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    sizes = [path.stat().st_size for path in (history.vault / "maps").glob("*/*.map")]
    took = f"{seconds:.1f} s of processor time, {len(sizes)} files, {sum(sizes) / MIB:.0f} MiB"
    return f"Making all map checkpoints of the history at once: {took}."


def _export(bench: Workbench, history: LongHistory, lsn: int) -> tuple[float, int]:
    """Seconds until something of the file is written, and the memory by then."""
    directory = bench.directory("export")
    words = ("export", MACHINE, DISK, "--point", f"lsn:{lsn}", "--output", directory / "disk.img")
    log = directory.with_suffix(".log")
    with log.open("w") as said:
        begin = time.monotonic()
        process = subprocess.Popen(
            command("replica_store.cli.main", "--vault", history.vault, *words),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            text=True,
        )
        try:
            while not any(path.stat().st_blocks for path in _files(directory)):
                if process.poll() or time.monotonic() - begin > SECONDS_MAX:
                    raise LabError(f"nothing was exported: {log.read_text()[-300:]}")
                time.sleep(_LOOK_S)
            seconds = time.monotonic() - begin
            return seconds, resident_peak(process.pid)
        finally:
            stop(process)
            for path in _files(directory):
                path.unlink()


def _mount(bench: Workbench, history: LongHistory, lsn: int) -> tuple[float, int]:
    """Seconds until a block that was written just before the point is read, and the memory by then."""
    directory = bench.directory("points")
    with bench.stack() as stack:
        bench.unmount_at_end(stack, directory)
        words = command("replica_store.cli.main", "--vault", history.vault, "mount", directory)
        process = bench.start(stack, words, lambda: is_mounted(directory))
        path = directory / MACHINE / f"lsn:{lsn}" / f"{DISK}.img"
        begin = time.monotonic()
        words = ["dd", f"if={path}", f"bs={BLOCK}", f"skip={history.written[lsn] // BLOCK}", "count=1", "status=none"]
        done = subprocess.run(words, capture_output=True, timeout=SECONDS_MAX, check=False)
        seconds = time.monotonic() - begin
        if len(done.stdout) != BLOCK or not any(done.stdout):
            raise LabError(f"{path} does not hold what was written: {done.stderr.decode(errors='replace')[-300:]}")
        peak = resident_peak(process.pid)
    wait_until(lambda: not is_mounted(directory), f"the unmounting of {directory}")
    return seconds, peak


def _files(directory: Path) -> list[Path]:
    """What is there, by whatever name the export gives it before it is whole."""
    return [path for path in directory.iterdir() if path.is_file()]
