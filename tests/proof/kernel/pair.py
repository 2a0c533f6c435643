"""A host and its store, each with its files on a filesystem of its own on a device that remembers every write.

What a filesystem syncs for its own reasons hides what we forgot to sync. So nothing here waits for its timer, the
catalog's log is one that was filled before, in which a commit changes no metadata, and at the end the host's agent
hangs, whose saves carry along the names that others made.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asrfs.daemon import control
from asrfs.journal.segments import Listing, list_journal, spare_name
from asrfs.storage.directory import DirectoryStorage, open_path
from tests.proof.kernel import witness
from tests.proof.kernel.filesystems import mounted_copy
from tests.proof.kernel.loads import StampLoad
from tests.proof.kernel.moments import Answered, Life, Loss
from tests.proof.kernel.power import RecordedDevice, end_at_once
from tests.proof.kernel.world import PROGRAM, StruckStore, ask_asrfs
from tests.proof.level import Notes
from tests.t5_system.machine import HostUnderTest, run_tool
from tests.t5_system.stamps import Stamper, StampWriter
from tests.waiting import wait_until

BLOCKS = 512
PUNCH_BYTES = 256 << 10
OPTIONS = {"ext4": "noatime,noinit_itable,commit=300", "xfs": "noatime"}
WRITES_A_ROLL = 240
WRITES_AFTER = 64
ROLLS = 3
WAIT_S_MAX = 60.0
LOG_PAGES = 1000
"""Of a catalog's log when SQLite begins it anew."""


class Pair:
    """`bare` is written with stamps; discards of `rolled` make the journal begin new segments."""

    def __init__(self, scratch: Path, kind: str, host_device: RecordedDevice, vault_device: RecordedDevice) -> None:
        self.scratch = scratch
        self.kind = kind
        self.host_device = host_device
        self.vault_device = vault_device
        self.host_at = scratch / "host"
        self.vault_at = scratch / "store"
        self.points: dict[str, tuple[int, int]] = {}
        self.store = StruckStore(scratch, name="store/vault")
        self._host: HostUnderTest | None = None

    @property
    def host(self) -> HostUnderTest:
        assert self._host is not None
        return self._host

    def asrfs(self, *words: str | Path) -> Any:
        """See `ask_asrfs`."""
        return ask_asrfs(self.host.path, *words)

    def find_host(self) -> HostUnderTest:
        """The host whose files are below `host_at` now."""
        with contextlib.suppress(FileNotFoundError):
            (self.host_at / "disks").rmdir()
        self._host = HostUnderTest(self.host_at, program=PROGRAM)
        return self._host

    def export(self, selector: str) -> Path:
        output = self.scratch / "point.export"
        words = ("export", self.host.name, "bare", "--point", selector, "--output", output, "--force")
        self.store.ask(*words)
        return output

    def close(self) -> None:
        """End what still runs."""
        self.store.close()
        if self._host is not None and self._host.supervisor is not None:
            end_at_once(self._host)

    # ---- life ---------------------------------------------------------------------------------------------------

    def live(self, stamper: Stamper, notes: Notes) -> Life:
        """Make both, have the host ship, trim and lose its agent, under writes; then end everything at once."""
        seen = self.scratch / "seen"
        answered: list[Answered] = []
        with contextlib.ExitStack() as mounted:
            for device, where in ((self.host_device, self.host_at), (self.vault_device, self.vault_at)):
                where.mkdir()
                run_tool(f"mkfs.{self.kind}", "-q", device.device)
                run_tool("mount", "-o", OPTIONS[self.kind], device.device, where)
                mounted.callback(run_tool, "umount", where)
            mounted.callback(self.close)
            self._serve_both(seen)
            load = StampLoad(
                stamper,
                [self.host.mount / "bare.img"],
                on_synced=lambda done: answered.append(Answered(done, self.host_device.now())),
            )
            mounted.callback(load.abandon)
            self._ship_and_trim(load)
            notes.fired("segments freed")
            self._lose_agent(load)
            end = self.vault_device.now()
        load.check_alive()
        self.host_device.end()
        self.vault_device.end()
        return Life(answered, witness.read_notes(seen), end)

    def _serve_both(self, seen: Path) -> None:
        self.store.ask("init", "--name", "site-b")
        watched = witness.environment(seen, self.host_device.socket, self.vault_device.socket)
        os.environ.update(watched)
        try:
            self.store.serve()
        finally:
            for name in watched:
                del os.environ[name]
        fill_log(self.store.path / "catalog.sqlite3")
        run_tool("sync", "--file-system", self.vault_at)
        host = self.find_host()
        host.init(bare=f"{BLOCKS * 4}K", rolled="1M")
        self.asrfs("enroll", "--store", self.store.manage, "--token", self.store.token(host.name))
        host.serve()

    def _ship_and_trim(self, load: StampLoad) -> None:
        log = self.store.path / "catalog.sqlite3-wal"
        size = log.stat().st_size
        for number in range(ROLLS):
            load.go_on(WRITES_A_ROLL, "writes")
            with load.quiet():
                made = self.asrfs("point", "create", "--name", f"point-{number}")
                self.points[f"point-{number}"] = (made["lsn"], load.writer.done)
            self._roll()
        load.go_on(WRITES_AFTER, "writes in the last segment")
        wait_until(lambda: self._journal().segments[0] > ROLLS, WAIT_S_MAX, "the first segments to be freed")
        assert log.stat().st_size == size, "the catalog's log grew: its syncs commit names, nothing can be seen here"

    def _lose_agent(self, load: StampLoad) -> None:
        """The agent hangs, the next disk server takes a spare, its next segment is the other one."""
        self.asrfs("drain", "--timeout", "60s")
        wait_until(self._has_fresh_spares_only, WAIT_S_MAX, "two fresh spares")
        agent = self.host.kill("agent", signal.SIGSTOP)
        wait_until(lambda: ") T " in Path(f"/proc/{agent}/stat").read_text(), what="the agent to hang")
        assert self._has_fresh_spares_only()
        self.host.wait_for_next("disk_server", self.host.kill("disk_server"))
        load.go_on(WRITES_AFTER, "writes to the next disk server")
        self._roll()
        load.go_on(WRITES_AFTER, "writes in its next segment")

    def _has_fresh_spares_only(self) -> bool:
        """Others are removed: parts of them were never written, and the sync of a write there commits names."""
        for number in self._journal().spares:
            with contextlib.suppress(FileNotFoundError):
                (self.host.path / "journal" / spare_name(number)).unlink()
        return len(self._journal().fresh) >= 2

    def _journal(self) -> Listing:
        return list_journal(DirectoryStorage(str(self.host.path / "journal")))

    def _open_segment(self) -> int:
        return int(control.call(self.host.state.socket_path("disk_server"), "positions")["segment"])

    def _roll(self) -> None:
        """Have a new segment begun: one takes only so many blocks that read as zeros."""
        begun = self._open_segment()
        disk = open_path(str(self.host.mount / "rolled.img"), write=True)
        try:
            at = 0
            while self._open_segment() == begun:
                for _ in range(64):
                    disk.punch(at, PUNCH_BYTES)
                    at = (at + PUNCH_BYTES) % (1 << 20)
        finally:
            disk.close()

    # ---- after the loss -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def after(self, loss: Loss, rng: random.Random, notes: Notes) -> Iterator[None]:
        """Both as the loss left them, mounted, nothing started."""
        cuts = self.scratch / "host.cut", self.scratch / "vault.cut"
        self.host_device.cut(loss.host, cuts[0], rng, notes)
        self.vault_device.cut(loss.vault, cuts[1], rng, notes)
        options = OPTIONS[self.kind]
        with (
            mounted_copy(cuts[0], self.host_at, self.kind, options),
            mounted_copy(cuts[1], self.vault_at, self.kind, options),
        ):
            self.find_host()
            try:
                yield
            finally:
                self.close()

    def check(self, loss: Loss, stamper: Stamper) -> None:
        """Start both, and go on."""
        received, shipped = self._check_store(loss, stamper)
        host, image = self.host, self.host.image("bare")
        told = host.state.load_positions().acknowledged.lsn
        assert told <= received, f"I3: the host was told that LSN {told} is durable, the store has {received}"
        ahead = stamper.greatest([image])
        host.serve()
        k = stamper.check([host.mount / "bare.img"], at_least=loss.done)
        assert ahead <= k, f"I1: the image had operation {ahead} before its record, the history ends at {k}"
        assert shipped <= k, f"I1: the store had operation {shipped}, the host's history ends at {k}"
        writer = StampWriter(stamper, [host.mount / "bare.img"])
        writer.done = k
        k = writer.write(WRITES_AFTER)
        writer.fsync()
        writer.close()
        self.asrfs("drain", "--timeout", "60s")
        stamper.check([self.export("latest")], exactly=k)
        assert not self.store.ask("verify")["uncatalogued"]
        assert host.stop() == 0, host.said()
        stamper.check([image], exactly=k)
        assert self.store.stop() == 0, self.store.log()

    def _check_store(self, loss: Loss, stamper: Stamper) -> tuple[int, int]:
        """The store has what it promised, its points are what they were; the last LSN and operation it has."""
        self.store.serve()
        received = int(self.store.ask("machine", "show", self.host.name)["acknowledged_lsn"])
        assert received >= loss.acknowledged, f"I3: LSN {loss.acknowledged} was promised, the store has {received}"
        assert not self.store.ask("verify")["damages"]
        points = self.store.ask("point", "list", self.host.name)
        listed = {point["name"]: point["lsn"] for point in points if point["name"]}  # the schedule's have none
        assert listed == {name: lsn for name, (lsn, _) in self.points.items() if lsn <= received}, f"I5: {listed}"
        for name in listed:
            stamper.check([self.export(name)], exactly=self.points[name][1])
        return received, stamper.check([self.export(f"lsn:{received}")])


def fill_log(catalog: Path) -> None:
    """Have a catalog's log filled and begun anew, as it is when a store has served for a while, all of it durable."""
    log = catalog.with_name(f"{catalog.name}-wal")
    with contextlib.closing(sqlite3.connect(catalog, isolation_level=None)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute("PRAGMA synchronous = OFF")
        for _ in range(LOG_PAGES + LOG_PAGES // 10):
            connection.execute(f"PRAGMA user_version = {version}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    assert log.stat().st_size >= LOG_PAGES * 4096, "SQLite did not keep its log"
