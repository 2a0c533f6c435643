"""What lies in the way of directories that are to go: the tools that see to it, and what is counted there."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from replica_store.failover import mounts
from tests.waiting import wait_until


def test_a_tool_that_does_not_end_in_time_is_held_until_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropped while it runs, it would warn of that, which is an error here."""
    with monkeypatch.context() as patched:
        patched.setattr(mounts, "_TOOL_S_MAX", 0.01)
        assert mounts._run("sleep", "600") == -signal.SIGKILL
    (held,) = mounts._undying

    def is_reaped() -> bool:
        assert mounts._run("true") == 0 and mounts._run("false") == 1
        return not mounts._undying

    wait_until(is_reaped)
    assert held.returncode == -signal.SIGKILL


def test_what_files_take(scratch: Path) -> None:
    assert mounts.allocated_bytes(str(scratch / "never-made/state")) == 0
    assert mounts.allocated_bytes(str(scratch)) == 0
    (scratch / "below").mkdir()
    (scratch / "below/file").write_bytes(b"\1" * (1 << 20))
    assert mounts.allocated_bytes(str(scratch)) >= 1 << 20
