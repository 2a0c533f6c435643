"""Whole sessions in one thread and in virtual time: the store's and the host's own tasks over a scripted stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import trio
import trio.testing

from asrfs.errors import AsrfsError, FormatError
from asrfs.format.log_object import SALT_BYTES
from asrfs.journal.reader import JournalReader
from asrfs.model.configuration import HostConfiguration, check_configuration
from asrfs.model.digest_tree import LeafDigester, Region, node_digests
from asrfs.model.positions import Cursor, Positions
from asrfs.protocol.frames import FRAME_HEADER_BYTES, ProtocolError
from asrfs.protocol.messages import PROTOCOL_VERSION, Compare, Fetch, Promote, Welcome
from asrfs.protocol.session import Bytes, Event, ObjectReceived, Session
from asrfs.replication.comparer import chunks_in
from asrfs.replication.object_builder import MachineKeys as HostKeys
from asrfs.replication.object_builder import ObjectBuilder
from asrfs.replication.outlet import Outlet
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.shipping_session import ShippingSession
from asrfs.replication.source import ShippingSettings, Source
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.tls import MachineIdentity
from replica_store.ingest.budget import Budget
from replica_store.ingest.configurations import Configurations
from replica_store.ingest.handovers import Handovers
from replica_store.ingest.ingester import Ingester
from replica_store.ingest.links import Links
from replica_store.ingest.promoting import Promotions
from replica_store.ingest.session import StoreSession
from replica_store.vault.keys import MachineKeys
from replica_store.vault.rows import MachineRow
from replica_store.vault.vault import Vault
from tests.fakes.comparing import InlineComparing, InlineFetching
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.journal_world import MACHINE_ID, JournalWorld
from tests.fakes.memory_objects import MemoryObjects
from tests.fakes.scripted_host import HostHistory

SALT = bytes(range(SALT_BYTES))
"""Of every session here, so that what is said in one can be made beforehand."""
WELCOME = Welcome(
    protocol=PROTOCOL_VERSION,
    store_id="5" * 32,
    session_salt=SALT,
    epoch=1,
    acknowledged_lsn=0,
    acknowledged_time_ns=0,
    last_digest="",
    compares=4,
    takes_fetches=True,
)
_GAP_S = 0.4
_MACHINE = "0123456789abcdef" * 2
_HISTORY_TABLES = ("points", "disks", "links", "objects")

T = TypeVar("T")


class ScriptedStream:
    """Says these pieces, `gap_s` of virtual time between them, then nothing more; keeps what it is told."""

    def __init__(self, pieces: Sequence[bytes], gap_s: float = 0.0) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self._gap_s = gap_s
        self.said = bytearray()

    async def send_all(self, data: Bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.said += data

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._gap_s:
            await trio.sleep(self._gap_s)  # sleep: virtual, nothing waits
        else:
            await trio.lowlevel.checkpoint()
        return self._pieces.pop(0) if self._pieces else b""

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def run_virtually(function: Callable[[], Any]) -> None:
    trio.run(function, clock=trio.testing.MockClock(autojump_threshold=0))


# ---- the store ----------------------------------------------------------------------------------------------------


class _InlineStore:
    """What a `StoreSession` needs, working in the task. Its salt is known beforehand."""

    def __init__(self, vault: Vault) -> None:
        self.vault = vault
        self.links = Links(vault, SystemClock())
        self.budget = Budget()
        self.configurations = Configurations(vault, self.in_thread)
        self.handovers = Handovers(vault, SystemClock(), self.in_thread)
        self.promotions = Promotions(vault, SystemClock(), self.in_thread)
        self.promotions._wanted = {_MACHINE: Promote(id="d" * 32, wanted="write", lsn=2)}
        self.comparing = InlineComparing(vault)
        self.fetching = InlineFetching(vault)
        self.ingester = Ingester(vault, _MACHINE, lambda: "deadbeef")

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    def make_salt(self) -> bytes:
        return SALT

    def now_ns(self) -> int:
        return 1

    async def take_turn(self, machine_id: str, session: StoreSession) -> Ingester:
        await trio.lowlevel.checkpoint()
        return self.ingester


@dataclass
class StoreWorld:
    """A vault with one machine and no history, which each call begins anew."""

    vault: Vault
    keys: MachineKeys
    machine_id: str = _MACHINE
    _store: _InlineStore = field(init=False)

    @classmethod
    @contextmanager
    def open(cls, scratch: Path) -> Iterator[StoreWorld]:
        with Vault.create(str(scratch / "vault"), "site-b", SystemClock()) as vault:
            vault.catalog.select("PRAGMA synchronous = OFF")  # no crash happens here
            keys = MachineKeys(bytes(32), bytes(range(32)))
            sealed = vault.sealer.seal_keys(_MACHINE, keys)
            with vault.catalog.transaction():
                vault.catalog.put_machine(MachineRow(_MACHINE, "web1", 1, "1", False, 0, 1, sealed))
            yield cls(vault, keys)

    def forget(self) -> None:
        """No history yet."""
        self.vault.objects = MemoryObjects()
        with self.vault.catalog.transaction():
            for table in _HISTORY_TABLES:
                self.vault.catalog.change(f"DELETE FROM {table}")
        self._store = _InlineStore(self.vault)

    def ingester(self) -> Ingester:
        """Of a machine without history, for objects sealed with `SALT`."""
        self.forget()
        ingester = self._store.ingester
        ingester.begin_session(self.vault.machine("web1"), SALT)
        return ingester

    def serve(self, pieces: Sequence[bytes]) -> list[Event]:
        """One connection of the machine that says this; what the store answered."""
        self.forget()
        stream = ScriptedStream(pieces)
        run_virtually(StoreSession(stream, MachineIdentity(_MACHINE, "web1", "1"), self._store).run)
        assert self._store.budget.used == 0, "what was received is given back"
        end = Session("host")
        heard: list[Event] = []
        if stream.said:
            end.send(HostHistory(_MACHINE, self.keys).hello())
            heard = end.receive(bytes(stream.said))
        return heard

    def links_can_be_saved(self) -> None:
        """What the host said of itself goes to the catalog in the store's own loop: nothing may stop that."""
        self._store.links.save(self._store.links.changed())

    def stored(self) -> list[bytes]:
        assert isinstance(self.vault.objects, MemoryObjects)
        return list(self.vault.objects.content.values())


# ---- the host -----------------------------------------------------------------------------------------------------


class _InlineSource(Source):
    """Works in the task: virtual time would run on while a thread works."""

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        await trio.lowlevel.checkpoint()
        return function(*arguments)


@dataclass(frozen=True)
class Shipped:
    """What one session came to. `objects`: last LSN and digest of each that was sent whole. `followed`: what the store
    wanted of the host and the host takes. `differing`: chunks that are different, by its word, of a disk that was asked
    about."""

    objects: list[tuple[int, str]]
    acknowledged_lsn: int
    followed: list[HostConfiguration]
    differing: list[int]


class HostWorld:
    """A journal with durable records that nobody has acknowledged; each call ships it anew."""

    def __init__(self) -> None:
        self._world = JournalWorld(CrashStorage(), seed=3)
        for number in range(9):
            self._world.disks[number % 2].write(4096 * number, bytes([number]) * 4096)
        self._world.sync()
        self.durable_lsn = self._world.journal.durable_lsn
        end = self._world.journal
        with end.lock:
            self._durable = Cursor(lsn=end.durable_lsn, segment=1 << 20, offset=1, time_ns=1)

    def ship(self, pieces: Sequence[bytes]) -> Shipped:
        """One connection to a store that says this."""
        journal = self._world.journal_storage
        positions = PositionsFile(Positions(), lambda positions: None)
        progress = Progress(positions.current)
        progress.note_host(appended_lsn=self.durable_lsn, durable=self._durable, epoch=1)
        readers = [JournalReader(journal, MACHINE_ID) for _ in range(2)]
        stream = ScriptedStream(pieces, _GAP_S)
        followed: list[HostConfiguration] = []
        differing: list[int] = []

        def configured(configuration: HostConfiguration) -> None:
            with contextlib.suppress(FormatError):
                followed.append(check_configuration(configuration))

        async def run() -> None:
            source = _InlineSource(
                machine_id=MACHINE_ID,
                machine_name="web1",
                journal=journal,
                reader=readers[0],
                builder=ObjectBuilder(readers[1]),
                positions=positions,
                progress=progress,
                settings=ShippingSettings(object_size=3 * 4096),
                threads=trio.CapacityLimiter(1),
                journal_turn=trio.Lock(),
                configured=configured,
                handover=lambda wanted: None,
                promotion=lambda wanted: None,
            )
            keys = HostKeys(MACHINE_ID, b"i" * 32, b"p" * 32)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_compare, source.outlet, differing)
                try:
                    await ShippingSession(stream, source, keys, lambda: None).run()
                except AsrfsError:
                    nursery.cancel_scope.cancel()
                    return
                raise AssertionError("a session ended without a reason")

        try:
            run_virtually(run)
        finally:
            for reader in readers:
                reader.close()
        return Shipped(_objects_in(bytes(stream.said)), positions.current.acknowledged.lsn, followed, differing)


async def _compare(outlet: Outlet, differing: list[int]) -> None:
    """Ask about a disk of 5 MiB of zeros, then for what it was."""
    region = Region(5 << 20, 0, 2)
    leaves = LeafDigester(region).finish()
    digests = node_digests(leaves)
    asked = Compare(number=0, slot=0, disk_id="0" * 32, size_bytes=5 << 20, first=0, digests=digests)
    await outlet.wait_open()
    with contextlib.suppress(AsrfsError):
        differing += chunks_in(await outlet.ask(asked), region, leaves)
        wanted = Fetch(number=0, slot=0, disk_id="0" * 32, size_bytes=5 << 20, lsn=2, offset=0)
        answer = await outlet.fetch(wanted)
        assert 0 < answer.next <= wanted.size_bytes and len(answer.content) <= answer.next, "what is given fits"


def _objects_in(said: bytes) -> list[tuple[int, str]]:
    """What the host sent, heard by a store that welcomes it."""
    end = Session("store")
    try:
        length = FRAME_HEADER_BYTES + int.from_bytes(said[4:8], "little")
        heard = end.receive(said[:length])
        end.send(WELCOME)
        heard += end.receive(said[length:])
    except ProtocolError:
        return []
    return [(each.begin.last_lsn, each.content[-32:].hex()) for each in heard if isinstance(each, ObjectReceived)]
