"""A run of proofs that is stopped, by its time limit or by hand: it ends soon, says what ended, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests import sweep
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
ENDS_S_MAX = 25.0


def is_running(pid: int) -> bool:
    """A process that has ended has no command line, whether anybody has asked how it ended or not."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def test_a_run_that_is_stopped_ends_soon_and_leaves_a_report_and_no_process(scratch: Path) -> None:
    names = ["model", "fuzz", "planted"]
    with (scratch / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.proof", *names, "--jobs", "2", "--report", str(scratch / "report")],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
    base = sweep.run_directory(process.pid)
    try:
        wait_until(lambda: base.is_dir() and len(os.listdir(base)) == 2, what="two levels that play")
        children = [int(each) for each in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.send_signal(signal.SIGINT)  # to the parent alone, as `timeout --foreground` does
        assert process.wait(ENDS_S_MAX) == 1
    finally:
        process.kill()
        process.wait()
    assert len(children) >= 2
    wait_until(lambda: not any(map(is_running, children)), 5.0, "the end of what the run had started")
    assert not base.exists()
    report = json.loads((scratch / "report" / "report.json").read_text())
    assert report["passed"] is False and report["unended"] == names
    text = (scratch / "said").read_text()
    assert "Did not end: model, fuzz, planted." in text, text
    assert text.count("Traceback") == text.count("Exception ignored in"), text  # a collector's callback may have got it
