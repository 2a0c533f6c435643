"""A block device that remembers every write and flush, so that power can be cut at any of them afterwards.

The device is a disk of another machine of ours, `outer`: its journal is the order in which writes reached the device,
and each record says up to which one a flush had made them durable. A power cut at a record leaves everything flushed
by then, and of what was written since whatever a disk's cache happened to have on its platter: any writes, any
sectors of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from asrfs.daemon.state import ROLES
from tests.proof.kernel.witness import Instant, ask_instant
from tests.proof.kernel.write_log import Record, put_into_file, read_write_log
from tests.proof.level import Notes
from tests.t5_system.machine import HostUnderTest, mounts_below, run_tool

SECTOR = 512
END_S_MAX = 20.0
TORN = 0.5
"""Of the writes that a power cut leaves, how many it tears."""


class RecordedDevice:
    """`device` is a loop device until `end`; then `records` are all that was written there."""

    def __init__(self, scratch: Path, size: str) -> None:
        scratch.mkdir()
        self.size = size
        self.scratch = scratch
        self.records: list[Record] = []
        self._outer = HostUnderTest(scratch, name="outer")
        self._outer.init(device=size)
        self._outer.serve()
        # Its agent would free what was applied; we want all of it.
        self._outer.kill("agent", signal.SIGSTOP)
        disk = self._outer.mount / "device.img"
        self.device = run_tool("losetup", "--find", "--show", "--direct-io=on", disk).strip()
        self._is_attached = True
        self._base = scratch / "flushed.img"
        run_tool("truncate", "-s", size, self._base)
        self._flushed_lsn = 0

    @property
    def socket(self) -> str:
        """Where `ask_instant` asks."""
        return self._outer.state.socket_path("disk_server")

    def now(self) -> Instant:
        """Which writes have reached the device, which of them are flushed."""
        return ask_instant(self.socket)

    def end(self) -> None:
        """No more writes: read what there were."""
        last = self.now().appended
        self.close()
        self.records = read_write_log(self._outer.path / "journal", last)

    def close(self) -> None:
        """Detach the device, once: its number is another's afterwards. End the outer machine, whatever its state."""
        if self._is_attached:
            self._is_attached = False
            subprocess.run(
                ["losetup", "--detach", self.device],
                check=False,
                timeout=20,
                capture_output=True,
                stdin=subprocess.DEVNULL,
            )
        if self._outer.supervisor is not None:
            end_at_once(self._outer)

    def flushed_lsn(self, lsn: int) -> int:
        """What was flushed when record `lsn` reached the device."""
        return self.records[lsn - 1].durable_lsn

    def at(self, lsn: int) -> Instant:
        """The instant at which record `lsn` reached the device."""
        return Instant(lsn, self.flushed_lsn(lsn))

    def cut(self, at: Instant, output: Path, rng: random.Random, notes: Notes) -> None:
        """The device as a power cut at that instant may leave it. Going back in time takes longer."""
        lsn, flushed = at.appended, max(at.flushed, self.flushed_lsn(at.appended))
        if flushed < self._flushed_lsn:
            run_tool("truncate", "-s", "0", self._base)
            run_tool("truncate", "-s", self.size, self._base)
            self._flushed_lsn = 0
        with self._base.open("r+b") as base:
            for record in self.records[self._flushed_lsn : flushed]:
                put_into_file(base.fileno(), record)
        self._flushed_lsn = flushed
        run_tool("cp", "--sparse=always", "--reflink=auto", self._base, output, seconds_max=60)
        keeps = rng.choice((0.0, 0.5, 0.9, 1.0))
        with output.open("r+b") as device:
            for record in self.records[flushed:lsn]:
                if rng.random() >= keeps:
                    notes.fired("write lost")
                elif record.payload and rng.random() < TORN:
                    notes.fired("write torn")
                    for at in range(0, record.length, SECTOR):
                        if rng.random() < 0.5:
                            os.pwrite(device.fileno(), record.payload[at : at + SECTOR], record.offset + at)
                else:
                    put_into_file(device.fileno(), record)


def end_at_once(machine: HostUnderTest) -> None:
    """SIGKILL of all its processes, and its mount taken away, so that the filesystem below can be unmounted."""
    assert machine.supervisor is not None
    supervisor = machine.supervisor.pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(supervisor, signal.SIGSTOP)  # it starts nobody any more
    ends = []
    for pid in {supervisor, *_children(supervisor), *filter(None, map(machine.pid, ROLES))}:
        with contextlib.suppress(ProcessLookupError):
            ends.append(os.pidfd_open(pid))
            os.kill(pid, signal.SIGKILL)
    machine.wait()
    for end in ends:  # its locks go before the last of its files does
        assert select.select([end], [], [], END_S_MAX)[0], f"a process of {machine.name} does not end"
        os.close(end)
    if mounts_below(machine.mount):
        run_tool("umount", "--lazy", machine.mount)


def _children(pid: int) -> list[int]:
    """Also those that have just been started and hold no lock yet."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for children in lists for word in children.read_text().split()]


@contextlib.contextmanager
def recorded_device(scratch: Path, size: str) -> Iterator[RecordedDevice]:
    made = RecordedDevice(scratch, size)
    try:
        yield made
    finally:
        made.close()
