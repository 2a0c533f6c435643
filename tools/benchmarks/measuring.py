"""Measuring: fio on a device, processor time and resident memory of processes from /proc."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lab import run

from .workbench import Workbench

MIB = 1 << 20
_TICKS = os.sysconf("SC_CLK_TCK")


class Load(NamedTuple):
    """What fio reached: operations a second, bytes a second, latencies from submission to completion (the worse
    direction), in all."""

    iops: float
    bytes_per_s: float
    p50_us: float
    p99_us: float
    operations: int


def fio(bench: Workbench, targets: Sequence[str | Path], words: Iterable[str], seconds_max: float) -> Load:
    """Run fio with direct I/O, one job a target at once; the sum. Raises LabError."""
    command = ["fio", f"--aux-path={bench.root}", "--direct=1", "--ioengine=libaio", "--randrepeat=0"]
    command += ["--output-format=json", "--group_reporting", "--lat_percentiles=1", *words]
    for i, target in enumerate(targets):
        command += [f"--name=job{i}", f"--filename={target}"]
    said = run(command, timeout=seconds_max)
    return _load(json.loads(said[said.index("{") :])["jobs"])


def _load(jobs: Sequence[dict[str, Any]]) -> Load:
    sides = [job[side] for job in jobs for side in ("read", "write") if job[side]["total_ios"]]
    return Load(
        iops=sum(side["iops"] for side in sides),
        bytes_per_s=sum(side["bw_bytes"] for side in sides),
        p50_us=max((_percentile(side, "50.000000") for side in sides), default=0.0),
        p99_us=max((_percentile(side, "99.000000") for side in sides), default=0.0),
        operations=sum(side["total_ios"] for side in sides),
    )


def _percentile(side: dict[str, Any], rank: str) -> float:
    found: float = side["lat_ns"].get("percentile", {}).get(rank, 0) / 1000
    return found


def lasting(seconds: float) -> tuple[str, ...]:
    """fio's words for a job that lasts so long."""
    return "--time_based", f"--runtime={seconds * 1000:.0f}ms"


def fill(bench: Workbench, target: str | Path, seconds_max: float = 900) -> None:
    """Write the whole of a device once, with bytes that do not compress."""
    words = ("--rw=write", "--bs=1M", "--iodepth=4", "--refill_buffers", "--end_fsync=1")
    fio(bench, [target], words, seconds_max)


# ---- processes ------------------------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and what descends from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
    return found


def processor_seconds(pid: int) -> float:
    """User and system time of a process and its descendants so far; 0 once it is gone."""
    ticks = 0
    for each in family(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text(errors="replace").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def resident_peak(pid: int) -> int:
    """The most bytes that a process and its descendants had resident (VmHWM); 0 once it is gone."""
    return _status_bytes(pid, "VmHWM:")


def resident_now(pid: int) -> int:
    """Bytes resident now (VmRSS)."""
    return _status_bytes(pid, "VmRSS:")


def _status_bytes(pid: int, key: str) -> int:
    total = 0
    for each in family(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{each}/status").read_text().splitlines():
                if line.startswith(key):
                    total += int(line.split()[1]) * 1024
    return total
