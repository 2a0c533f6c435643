"""A host and a store as a pair over connections that break at any byte, with a list of log objects as the model.

Both ends are the product's state machines without I/O: `Session` on either side, behind the store's one the real
ingester and vault, behind the host's one the handshake's decision and a window of objects that are not acknowledged.
Each direction of a connection carries so many bytes and then no more, so a cut falls into a frame, an object, or
between an object that was taken and its acknowledgement. What a host should never send is sent too now and then: an
object once more, or one that was sealed for a connection before this one.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field

from asrfs.errors import AsrfsError
from asrfs.format.log_object import NO_DIGEST, SALT_BYTES
from asrfs.protocol.frames import ProtocolError
from asrfs.protocol.messages import PROTOCOL_VERSION, Acknowledge, Heartbeat, Hello, Message, Refused, Welcome
from asrfs.protocol.session import Event, ObjectReceived, Role, State
from asrfs.replication.reconciliation import Side, check_same_history, check_same_record
from replica_store.ingest.greeting import check_hello, check_position, refusal_code
from replica_store.ingest.ingester import Ingester
from tests.fakes.crash_storage import Fate
from tests.fakes.scripted_host import BuiltObject
from tests.fakes.vault_world import MACHINE_ID, VaultWorld
from tests.fakes.wire import SessionPair, cut_at

WINDOW = 4
CONNECTIONS_MAX = 400

CUT = "connection cut with bytes under way"
CUT_IN_OBJECT = "connection cut inside an object"
ACKNOWLEDGEMENT_LOST = "acknowledgement lost"
SENT_TWICE = "object delivered twice"
SENT_LATE = "object of an earlier connection"
STORE_DIED = "store killed between connections"
EVENTS = (CUT, CUT_IN_OBJECT, ACKNOWLEDGEMENT_LOST, SENT_TWICE, SENT_LATE, STORE_DIED)


class Broken(Exception):
    """The connection is over."""


@dataclass
class Exchange:
    """`taken`: the objects of which the store has acknowledged or catalogued that it has them, in their order."""

    world: VaultWorld
    rng: random.Random
    events: Counter[str] = field(default_factory=Counter)
    acknowledged_lsn: int = 0
    last_digest: str = ""
    taken: list[BuiltObject] = field(default_factory=list)
    built: dict[str, BuiltObject] = field(default_factory=dict)
    """Every object that was ever sent, by its digest."""
    earlier: BuiltObject | None = None
    ingester: Ingester | None = None

    def run(self) -> None:
        """Connect until all of the history is acknowledged; then all is there, once, and survives a power loss."""
        for _ in range(CONNECTIONS_MAX):
            try:
                Connection(self).run()
            except Broken:
                pass
            self.check()
            if self.acknowledged_lsn == self.world.history.last_lsn:
                break
            if self.rng.random() < 0.1:
                self.world = self.world.next_start(self.world.storage.killed(), self.world.catalogs[-1])
                self.ingester = None
                self.events[STORE_DIED] += 1
        assert self.acknowledged_lsn == self.world.history.last_lsn, "the exchange never comes to its end"
        self.world.acknowledged = self.acknowledged_lsn
        self.world.check(self.rng, self.world.storage.crash(Fate.LOST, self.rng))

    def check(self) -> None:
        """What the store has is the sequence that was sent: no gap, nothing twice, byte for byte; what was acknowledged
        is a prefix of it."""
        vault = self.world.vault
        rows = vault.objects_of(MACHINE_ID, 1 << 62)
        lsn, digest = 0, NO_DIGEST
        for row in rows:
            sent = self.built[row.digest.hex()]
            assert row.first_lsn == lsn + 1, f"I3: LSN {row.first_lsn} follows LSN {lsn}"
            assert (row.first_lsn, row.last_lsn) == (sent.begin.first_lsn, sent.begin.last_lsn)
            assert vault.objects.read(row.name) == sent.content
            lsn, digest = row.last_lsn, row.digest
        names = [row.name for row in rows]
        assert len(set(names)) == len(names)
        known = {each.digest for each in self.taken}
        found = [row.digest for row in rows if row.digest in known]
        assert [each.digest for each in self.taken] == found, "I3: what was acknowledged is not there, or in disorder"
        ends = {0: "", **{row.last_lsn: row.digest.hex() for row in rows}}
        assert ends.get(self.acknowledged_lsn) == self.last_digest, "I3: acknowledged is what is not there"
        assert digest == NO_DIGEST or digest.hex() in self.built


class Connection:
    """One connection. `run` ends when all is acknowledged, and raises Broken otherwise."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._rng = rng = exchange.rng
        self._pair = SessionPair()
        # So many bytes each direction carries before it breaks; a third of the connections hold.
        reach = rng.choice((200, 2_000, 20_000, 60_000))
        self._left: dict[Role, float] = dict.fromkeys(self._pair.ends, math.inf)
        if rng.random() < 0.67:
            self._left[rng.choice(("host", "store", "host"))] = rng.randrange(reach)
        self._said: dict[Role, list[Event]] = {"host": [], "store": []}
        self._heard: dict[Role, int] = {"host": 0, "store": 0}
        self._in_flight: list[BuiltObject] = []
        self._salt = b""
        self._digest = NO_DIGEST
        self._sent_lsn = 0

    def run(self) -> None:
        self._greet()
        history = self._exchange.world.history
        while self._exchange.acknowledged_lsn < history.last_lsn:
            self._host_speaks()
            received = self._carry("host")
            self._store_takes([event for event in received if isinstance(event, ObjectReceived)])
            if self._rng.random() < 0.7:
                self._host_hears()

    # ---- bytes ----

    def _say(self, role: Role, message: Message) -> None:
        self._said[role].append(message)
        self._pair.say(role, message)

    def _carry(self, sender: Role) -> list[Event]:
        """As far as the connection goes. What is heard is what was said, in order, and never more."""
        sent, left = self._pair.sent[sender], self._left[sender]
        is_cut = len(sent) >= left
        if is_cut:
            self._exchange.events[CUT] += len(sent) > left
            del sent[int(left) :]
        self._left[sender] -= len(sent)
        places = [self._rng.randrange(len(sent) + 1) for _ in range(self._rng.choice((0, 1, 5, 40)))]
        heard = self._pair.carry(sender, cut_at(*places))
        at = self._heard[sender]
        assert heard == self._said[sender][at : at + len(heard)], f"what {sender} said was heard as something else"
        self._heard[sender] += len(heard)
        if is_cut:
            self._break(sender, heard)
        return heard

    def _break(self, sender: Role, heard: list[Event]) -> None:
        """Both ends learn of it. What the store has whole it takes in all the same, and nobody hears of that."""
        exchange, store = self._exchange, self._pair.ends["store"]
        exchange.events[CUT_IN_OBJECT] += store.state is State.IN_OBJECT
        if sender == "host":
            self._take([event for event in heard if isinstance(event, ObjectReceived)])
        received = exchange.world.vault.received_lsn(MACHINE_ID)
        exchange.events[ACKNOWLEDGEMENT_LOST] += received > exchange.acknowledged_lsn
        for end in self._pair.ends.values():
            try:
                end.receive_end()
            except ProtocolError:
                pass
            assert end.state is State.CLOSED
        if self._in_flight:
            exchange.earlier = self._in_flight[0]
        raise Broken

    # ---- greeting ----

    def _greet(self) -> None:
        exchange = self._exchange
        history = exchange.world.history
        hello = history.hello(exchange.acknowledged_lsn, exchange.last_digest)
        self._say("host", hello)
        for event in self._carry("host"):
            assert isinstance(event, Hello)
            self._welcome(event)
        for event in self._carry("store"):
            assert isinstance(event, Welcome)
            ours = Side(history.epoch, exchange.acknowledged_lsn, exchange.last_digest)
            theirs = Side(event.epoch, event.acknowledged_lsn, event.last_digest)
            check_same_history(ours, history.last_lsn, theirs)
            assert event.acknowledged_lsn >= exchange.acknowledged_lsn, "I3: the store forgot what it acknowledged"
            if event.acknowledged_lsn:
                time_ns = history.records[event.acknowledged_lsn - 1].time_ns
                check_same_record(event.acknowledged_lsn, time_ns, event.acknowledged_time_ns)
            exchange.acknowledged_lsn, exchange.last_digest = event.acknowledged_lsn, event.last_digest
            self._salt, self._sent_lsn = event.session_salt, event.acknowledged_lsn
            self._digest = bytes.fromhex(event.last_digest) or NO_DIGEST

    def _welcome(self, hello: Hello) -> None:
        """As `StoreSession._greet`."""
        exchange = self._exchange
        vault = exchange.world.vault
        machine = vault.machine("web1")
        check_hello(hello, machine)
        if exchange.ingester is None:
            exchange.ingester = Ingester(vault, MACHINE_ID, lambda: f"{self._rng.getrandbits(32):08x}")
        salt = self._rng.randbytes(SALT_BYTES)
        position = exchange.ingester.begin_session(machine, salt)
        row = vault.catalog.object_with(MACHINE_ID, hello.acknowledged_lsn)
        ends_there = row is not None and row.last_lsn == hello.acknowledged_lsn
        check_position(hello, position, row.digest.hex() if row is not None and ends_there else None)
        self._say(
            "store",
            Welcome(
                protocol=PROTOCOL_VERSION,
                store_id=vault.id,
                session_salt=salt,
                epoch=position.epoch,
                acknowledged_lsn=position.lsn,
                acknowledged_time_ns=position.time_ns,
                last_digest=position.digest_hex,
            ),
        )

    # ---- host ----

    def _host_speaks(self) -> None:
        history, rng = self._exchange.world.history, self._rng
        if self._exchange.earlier is not None and rng.random() < (0.05 if self._in_flight else 0.3):
            self._send(self._exchange.earlier)
        for _ in range(rng.randint(0, 3)):
            if self._sent_lsn < history.last_lsn and len(self._in_flight) < WINDOW:
                first = self._sent_lsn + 1
                built = history.next_object(first, rng.randint(1, 3), self._salt, self._digest, rng)
                self._exchange.built[built.digest.hex()] = built
                self._in_flight.append(built)
                self._sent_lsn, self._digest = built.begin.last_lsn, built.digest
                self._send(built)
            if rng.random() < 0.3:
                self._say("host", Heartbeat(appended_lsn=history.last_lsn, durable_lsn=rng.randrange(1 << 60)))
        if self._in_flight and rng.random() < 0.1:
            self._send(rng.choice(self._in_flight))
            self._exchange.events[SENT_TWICE] += 1

    def _send(self, built: BuiltObject) -> None:
        self._said["host"].append(ObjectReceived(built.begin, built.content))
        self._pair.say_object(built.begin, built.pieces)

    def _host_hears(self) -> None:
        """As `ShippingSession._on_acknowledge`: an object in flight ends there, and is the one that was sent."""
        for event in self._carry("store"):
            if isinstance(event, Refused):
                raise Broken
            if not isinstance(event, Acknowledge) or event.lsn <= self._exchange.acknowledged_lsn:
                continue
            places = [i for i, each in enumerate(self._in_flight) if each.begin.last_lsn == event.lsn]
            assert places, f"LSN {event.lsn} was acknowledged, where nothing ends that was sent"
            assert self._in_flight[places[0]].digest.hex() == event.digest
            del self._in_flight[: places[0] + 1]
            self._exchange.acknowledged_lsn, self._exchange.last_digest = event.lsn, event.digest

    # ---- store ----

    def _take(self, batch: list[ObjectReceived]) -> AsrfsError | None:
        """What stopped it. Acknowledgements are said by whoever still can."""
        exchange = self._exchange
        if exchange.ingester is None or not batch:
            return None
        earlier = exchange.earlier
        is_late = [earlier is not None and each.content == earlier.content for each in batch]
        taken = exchange.ingester.take(batch)
        for acknowledge in taken.acknowledged:
            built = exchange.built[acknowledge.digest]
            assert all(built.digest != each.digest for each in [earlier] if each), "an old object was acknowledged"
            if built not in exchange.taken:
                exchange.taken.append(built)
            if self._pair.ends["store"].state is not State.CLOSED:
                self._say("store", acknowledge)
        if any(is_late):
            assert taken.error is not None, "an object of an earlier connection was taken"
            exchange.events[SENT_LATE] += 1
        assert any(is_late) or taken.error is None, f"refused although nothing is wrong: {taken.error}"
        return taken.error

    def _store_takes(self, batch: list[ObjectReceived]) -> None:
        error = self._take(batch)
        if error is not None:
            self._say("store", Refused(code=refusal_code(error), text="no"))
            self._host_hears()
            raise Broken


def exchange_over_broken_connections(world: VaultWorld, rng: random.Random) -> Counter[str]:
    """The whole history of `world` over connections that break. Returns what happened: `EVENTS`."""
    exchange = Exchange(world, rng)
    try:
        exchange.run()
    finally:
        exchange.world.vault.close()
    return exchange.events
