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
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from asrfs.daemon import control
from asrfs.daemon.state import ROLES
from tests.proof.kernel.write_log import Record, put_into_file, read_write_log
from tests.proof.level import Notes
from tests.t5_system.machine import HostUnderTest, mounts_below, run_tool

SECTOR = 512


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
        self._base = scratch / "flushed.img"
        run_tool("truncate", "-s", size, self._base)
        self._flushed_lsn = 0

    def positions(self) -> dict[str, int]:
        """`appended` and `durable`: which writes have reached the device, which of them are flushed."""
        return control.call(self._outer.state.socket_path("disk_server"), "positions")

    def end(self) -> None:
        """No more writes: read what there were."""
        last = self.positions()["appended"]
        run_tool("losetup", "--detach", self.device)
        self.close()
        self.records = read_write_log(self._outer.path / "journal", last)

    def close(self) -> None:
        """End the outer machine, whatever state it is in."""
        if self._outer.supervisor is None:
            return
        for pid in [pid for role in ROLES if (pid := self._outer.pid(role))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._outer.wait()
        if mounts_below(self._outer.mount):
            run_tool("umount", "--lazy", self._outer.mount)

    def flushed_lsn(self, lsn: int) -> int:
        """What was flushed when record `lsn` reached the device."""
        return self.records[lsn - 1].durable_lsn

    def cut(self, lsn: int, output: Path, rng: random.Random, notes: Notes) -> None:
        """The device as a power cut right after record `lsn` may leave it. `lsn` never goes back."""
        flushed = self.flushed_lsn(lsn)
        with self._base.open("r+b") as base:
            for record in self.records[self._flushed_lsn : flushed]:
                put_into_file(base, record)
        self._flushed_lsn = flushed
        run_tool("cp", "--sparse=always", "--reflink=auto", self._base, output, seconds_max=60)
        keeps = rng.choice((0.0, 0.5, 0.9, 1.0))
        with output.open("r+b") as device:
            for record in self.records[flushed:lsn]:
                if rng.random() >= keeps:
                    notes.fired("write lost")
                elif record.payload and rng.random() < 0.3:
                    notes.fired("write torn")
                    for at in range(0, record.length, SECTOR):
                        if rng.random() < 0.5:
                            device.seek(record.offset + at)
                            device.write(record.payload[at : at + SECTOR])
                else:
                    put_into_file(device, record)


@contextlib.contextmanager
def recorded_device(scratch: Path, size: str) -> Iterator[RecordedDevice]:
    made = RecordedDevice(scratch, size)
    try:
        yield made
    finally:
        subprocess.run(
            ["losetup", "--detach", made.device], check=False, timeout=20, capture_output=True, stdin=subprocess.DEVNULL
        )
        made.close()
