"""Each benchmark runs, very small, and says a number or a reason of every peer. What the numbers are is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[2]
OURS = {"asrfs", "asrfs-shipping"}
LIMITS = {"raw", "passthrough"}


def bench(scratch: Path, *words: str) -> dict[str, Any]:
    """Run `tools/bench` without its set-up and without installing anything; its results by benchmark."""
    output = scratch / "results"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks",
            *words,
            "--tiny",
            "--no-install",
            "--scratch",
            scratch,
            "--output",
            output,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (output / "results.md").read_text().startswith("# Benchmarks")
    assert ElementTree.parse(output / "results.svg").getroot().tag.endswith("svg")
    found = {each["benchmark"]: each for each in json.loads((output / "results.json").read_text())["benchmarks"]}
    for each in found.values():
        assert each["command"].startswith(f"tools/bench {each['benchmark']}")
        assert str(scratch) not in each["command"]
    assert not list(scratch.glob("bench-*")), "the scratch directory of the run stays behind"
    return found


def check(outcome: dict[str, Any], measured: set[str]) -> None:
    """Every workload has these peers' numbers, and every peer has numbers or a reason."""
    peers = outcome["peers"]
    gone = {key: facts["unavailable"] for key, facts in peers.items() if facts["unavailable"]}
    assert measured <= set(peers) - set(gone), gone
    assert outcome["workloads"]
    for workload in outcome["workloads"]:
        turns = workload["turns"]
        assert measured <= set(turns), workload["key"]
        for key, facts in peers.items():
            assert turns.get(key) or facts["unavailable"] or key not in measured, (workload["key"], key)
        assert all(turn["value"] >= 0 for each in turns.values() for turn in each)


def test_writes_with_every_peer(scratch: Path) -> None:
    outcome = bench(scratch, "write")["write"]
    check(outcome, OURS | LIMITS)
    assert {"qemu", "qemu-mirror", "qemu-quorum", "nbdkit", "s3backer"} <= set(outcome["peers"])
    for key, facts in outcome["peers"].items():
        assert facts["unavailable"] or all(workload["turns"][key] for workload in outcome["workloads"]), key
    resident = outcome["peers"]["asrfs-shipping"]["resident_bytes_max"]
    assert set(resident) == {"disk server", "agent", "store"}
    assert all(each > 1 << 20 for each in resident.values())
    keys = [workload["key"] for workload in outcome["workloads"]]
    assert keys == ["random-write", "fsync-1", "sequential-write"]


def test_other_blocks_share_their_peers(scratch: Path) -> None:
    found = bench(scratch, "read", "mixed", "fsync", "--peers", "raw,asrfs-shipping")
    assert list(found) == ["read", "mixed", "fsync"]
    for outcome in found.values():
        check(outcome, {"raw", "asrfs-shipping"})


def test_database(scratch: Path) -> None:
    check(bench(scratch, "database", "--peers", "raw,asrfs-shipping")["database"], {"raw", "asrfs-shipping"})


def test_replicate(scratch: Path) -> None:
    outcome = bench(scratch, "replicate", "--seconds", "1", "--rates", "5")["replicate"]
    measured = [workload["key"] for workload in outcome["workloads"] if workload["turns"]]
    assert {"rpo-median", "rpo-p99", "at-5"} <= set(measured)


def test_recover(scratch: Path) -> None:
    outcome = bench(scratch, "recover")["recover"]
    by_key = {workload["key"]: workload["turns"] for workload in outcome["workloads"]}
    for key in ("takeover", "restart", "restart-cold", "map-memory"):
        assert by_key[key]["asrfs"]
    assert {"replica-store-export", "cp"} <= set(by_key["export"])
    assert "rsync" in by_key["export"] or outcome["peers"]["rsync"]["unavailable"]


@pytest.mark.parametrize("name", ["scale", "export"])
def test_scale_and_export(scratch: Path, name: str) -> None:
    words = ("--peers", "passthrough,asrfs-shipping", "--machines", "2") if name == "scale" else ()
    outcome = bench(scratch, name, *words)[name]
    check(outcome, {"passthrough", "asrfs-shipping"} if name == "scale" else set(outcome["peers"]))


def test_failover(scratch: Path) -> None:
    outcome = bench(scratch, "failover", "--seconds", "2")["failover"]
    check(outcome, {"asrfs-shipping"})
    measured = product(("writers", "rpo"), ("sites", "shared"), ("without", "with", "noise"))
    beside = {"-".join(each) for each in measured}
    assert {workload["key"] for workload in outcome["workloads"]} == {"frozen-128M", "crashed-128M"} | beside


def test_barrier(scratch: Path) -> None:
    outcome = bench(scratch, "barrier", "--seconds", "2")["barrier"]
    check(outcome, {"asrfs"})
    by_key = {workload["key"]: workload["turns"]["asrfs"][0] for workload in outcome["workloads"]}
    assert set(by_key) == {"hold-2", "hold-3", "writers-without", "writers-with"}
    assert by_key["hold-3"]["also"]["void"] == 0
    assert by_key["writers-with"]["also"]["points"] >= 2


def test_resync(scratch: Path) -> None:
    outcome = bench(scratch, "resync", "--seconds", "2")["resync"]
    check(outcome, {"asrfs"} if outcome["peers"]["rsync"]["unavailable"] else set())
    by_key = {workload["key"]: workload["turns"]["asrfs"][0] for workload in outcome["workloads"]}
    assert by_key["wire-0"]["value"] < 0.1
    assert by_key["wire-1"]["value"] < by_key["wire-10"]["value"] < 20
    assert by_key["map-read"]["value"] < 2, "only what is dirty is read"
