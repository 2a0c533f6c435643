"""Benchmarks. Each runs its peers in turns (A B A B …) on one machine and prints medians, spreads and ratios.

    tools/bench write [--turns N] [--seconds S] [--size SIZE] [--json FILE]

`write`: 4 KiB random write at depth 16, 4 KiB write + fsync at depth 1, 1 MiB sequential write at depth 4, for a raw
file over a loop device with direct I/O and for an asrfs disk over a loop device with its agent shipping to a store on
this machine. The store runs at the lowest priority, since in earnest it is another computer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lab import Lab, LabError, run, wait_until

MIB = 1 << 20


class Workload(NamedTuple):
    name: str
    fio: tuple[str, ...]


WRITE_WORKLOADS = (
    Workload("4 KiB random write, depth 16", ("--rw=randwrite", "--bs=4k", "--iodepth=16")),
    Workload("4 KiB random write + fsync, depth 1", ("--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=1")),
    Workload("1 MiB sequential write, depth 4", ("--rw=write", "--bs=1M", "--iodepth=4")),
)


class Measurement(NamedTuple):
    """One turn of one workload on one peer. `p99_us`: 99th percentile of completion latency, microseconds."""

    iops: float
    mib_per_s: float
    p99_us: float


Results = dict[str, dict[str, list[Measurement]]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench", description="Benchmarks of asrfs beside what it stands on.")
    parser.add_argument("benchmark", choices=["write"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="of each workload in each turn")
    parser.add_argument("--size", default="1G", help="of the disk")
    parser.add_argument("--json", type=Path, help="also write the results here")
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        print("bench: error: loop devices need root", file=sys.stderr)
        return 2
    try:
        return bench_write(chosen.turns, chosen.seconds, chosen.size, chosen.json)
    except LabError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1


def bench_write(turns: int, seconds: int, size: str, output: Path | None) -> int:
    lab = Lab(store_nice=19)
    try:
        peers = {"raw file over loop": raw_loop(lab, size), "asrfs over loop, shipping": asrfs_loop(lab, size)}
        results: Results = {workload.name: {peer: [] for peer in peers} for workload in WRITE_WORKLOADS}
        peak = {"disk_server": 0, "agent": 0}
        for turn in range(turns):
            for workload in WRITE_WORKLOADS:
                for peer, device in peers.items():
                    results[workload.name][peer].append(measure(device, workload, seconds))
                    watch_memory(lab, peak)
                    settle(lab)
            print(f"turn {turn + 1} of {turns} done", file=sys.stderr)
        report(results, peak, lab.status(), size, seconds)
        if output is not None:
            output.write_text(json.dumps(document(results, peak), indent=2) + "\n")
    finally:
        lab.close()
    return 0


def raw_loop(lab: Lab, size: str) -> str:
    """A loop device with direct I/O over a raw file whose blocks are all written once, as a used disk's are."""
    path = lab.root / "raw.img"
    run(["fallocate", "-l", size, str(path)])
    fill(path)
    device = run(["losetup", "--find", "--show", "--direct-io=on", str(path)]).strip()
    lab.at_close(lambda: run(["losetup", "--detach", device]))
    return device


def asrfs_loop(lab: Lab, size: str) -> str:
    """A loop device over a disk of a host that ships to a store on this machine."""
    lab.start_store()
    lab.asrfs("init", lab.machine)
    lab.asrfs("disk", "add", "bench", "--size", size)
    lab.enroll()
    lab.start_host()
    device = lab.attach("bench")
    fill(Path(device))
    settle(lab)
    return device


def fill(path: Path) -> None:
    """Write the whole of a file or device once, with bytes that do not compress."""
    run(["fio", "--name=fill", f"--filename={path}", "--rw=write", "--bs=1M", "--direct=1", "--end_fsync=1"])


def measure(device: str, workload: Workload, seconds: int) -> Measurement:
    options = ["--name=bench", f"--filename={device}", "--direct=1", "--ioengine=libaio", *workload.fio]
    options += ["--time_based", f"--runtime={seconds}", "--randrepeat=0", "--output-format=json"]
    job = json.loads(run(["fio", *options]))["jobs"][0]["write"]
    percentiles = job["clat_ns"].get("percentile", {})
    return Measurement(job["iops"], job["bw_bytes"] / MIB, percentiles.get("99.000000", 0) / 1000)


def settle(lab: Lab) -> None:
    """Wait until nothing of the former measurement is left to ship, apply or write back."""
    lab.asrfs("drain", "--timeout", "300s")
    wait_until(lambda: lab.status()["lsn"]["applied"] >= lab.status()["lsn"]["durable"], "applying", 300)
    subprocess.run(["sync"], check=True, timeout=300)


def watch_memory(lab: Lab, peak: dict[str, int]) -> None:
    """Keep the greatest resident size, in bytes, of each process (VmHWM)."""
    for role, most in peak.items():
        for line in Path(f"/proc/{lab.pid(role)}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak[role] = max(most, int(line.split()[1]) * 1024)


def report(results: Results, peak: dict[str, int], status: Any, size: str, seconds: int) -> None:
    print(f"\n{platform.platform()}, {os.cpu_count()} cores, disk {size}, {seconds} s a measurement")
    baseline, *_ = next(iter(results.values()))
    for workload, peers in results.items():
        print(f"\n{workload}")
        for peer, turns in peers.items():
            iops = [turn.iops for turn in turns]
            ratio = statistics.median(iops) / statistics.median(turn.iops for turn in peers[baseline])
            print(
                f"  {peer:28} {statistics.median(iops):10.0f} /s  ({min(iops):.0f} to {max(iops):.0f})  "
                f"{median_of(turns, lambda turn: turn.mib_per_s):8.1f} MiB/s  "
                f"p99 {median_of(turns, lambda turn: turn.p99_us):8.0f} µs  {ratio:5.2f} × raw"
            )
    print(f"\nresident at most: disk server {peak['disk_server'] / MIB:.0f} MiB, agent {peak['agent'] / MIB:.0f} MiB")
    print(f"alarms at the end: {[alarm['text'] for alarm in status['alarms']] or 'none'}")


def median_of(turns: list[Measurement], pick: Callable[[Measurement], float]) -> float:
    return statistics.median(pick(turn) for turn in turns)


def document(results: Results, peak: dict[str, int]) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "resident_bytes_max": peak,
        "workloads": {
            workload: {peer: [turn._asdict() for turn in turns] for peer, turns in peers.items()}
            for workload, peers in results.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
