"""Receiving a tail: whose may be offered, where it leaves the history, and its objects. Blocks; runs in a thread.

    HELLO that offers a tail ─▶ fenced ─▶ may it? ─▶ branch, or the end of what has come ─▶ objects … ─▶ whole

Nothing here writes to the history: a host that was superseded adds to a room of its own (I6), and all that is asked of
its log objects is asked as of any other: machine, epoch, session, chain, digests, seals, extents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from asrfs.errors import FencedError
from asrfs.format.log_object import NO_DIGEST
from asrfs.protocol.frames import ProtocolError
from asrfs.protocol.messages import PROTOCOL_VERSION, Acknowledge, Hello, KeptTail
from asrfs.protocol.session import ObjectReceived
from asrfs.transport.tls import MachineIdentity
from replica_store.ingest.ingester import Checked, Ingester, Position
from replica_store.vault.catalog import Catalog
from replica_store.vault.operations import operations
from replica_store.vault.rows import Entry, MachineRow
from replica_store.vault.tail_keeping import adopt_tail, make_whole
from replica_store.vault.tails import (
    Tail,
    TailRows,
    append_to_tail,
    ends_at,
    point_of_tail,
    put_tail,
    tail_of,
)
from replica_store.vault.vault import Vault


def may_offer(catalog: Catalog, identity: MachineIdentity, hello: Hello) -> MachineRow | None:
    """The machine, if who greets may keep a tail here: it is of an epoch that is over, and its certificate is the one
    that is good now, or was until a failover was committed. None if not."""
    row = catalog.machine_by_id(identity.machine_id)
    if row is None or row.revoked or hello.machine_id != row.id or hello.protocol != PROTOCOL_VERSION:
        return None
    if hello.rejoin or not hello.tail_lsn or not 0 < hello.epoch < row.epoch:
        return None
    left_behind = {each.closed_serial for each in operations(catalog, row.id) if each.epoch is not None}
    return row if identity.serial == row.serial or identity.serial in left_behind else None


class TailIngester(Ingester):
    """An ingester of one tail instead of a history. `begin` comes before `take`."""

    def __init__(self, vault: Vault, machine: MachineRow, hello: Hello, make_nonce: Callable[[], str]) -> None:
        super().__init__(vault, machine.id, make_nonce)
        self._epoch = hello.epoch
        self._end_lsn = hello.tail_lsn
        self._tail = Tail(machine.id, hello.epoch, 0, NO_DIGEST)
        self._offered = (hello.acknowledged_lsn, hello.last_digest)

    @property
    def is_whole(self) -> bool:
        return self._tail.is_whole

    def begin(self, session_salt: bytes) -> Position:
        """Behind what the tail goes on: what has come of it before, else the log object of the history that the host
        holds for acknowledged, else the newest that is not of a later epoch."""
        catalog = self._vault.catalog
        known = adopt_tail(self._vault, self._machine_id, self._epoch)
        self._tail = known or Tail(self._machine_id, self._epoch, *self._branch())
        rows = TailRows(catalog, self._tail)
        self._salt = session_salt
        self._disks = [row.record for row in rows.disk_rows("")]
        last = rows.last_object("")
        self._position = Position(self._epoch, 0, NO_DIGEST, 0)
        if last is not None:
            self._position = Position(self._epoch, last.last_lsn, last.digest, last.last_time_ns)
        return self._position

    def finish_if_whole(self) -> KeptTail | None:
        """What the host is told once all that it offered is here, durable; None while more is to come."""
        if not self._tail.is_whole and self._position.lsn >= self._end_lsn and self._has_records():
            make_whole(self._vault, self._tail)
            self._tail = replace(self._tail, is_whole=True)
        if not self._tail.is_whole:
            return None
        is_point = point_of_tail(self._vault.catalog, self._tail) is not None
        return KeptTail(lsn=self._position.lsn, time_ns=self._position.time_ns, is_point=is_point)

    def _has_records(self) -> bool:
        return self._position.lsn > self._tail.branch_lsn

    def _branch(self) -> tuple[int, bytes]:
        catalog, (lsn, said) = self._vault.catalog, self._offered
        row = catalog.object_with(self._machine_id, lsn)
        digest = row.digest if row is not None else NO_DIGEST
        is_same = said == (digest.hex() if lsn else "")
        if is_same and ends_at(catalog, self._machine_id, self._epoch, lsn, digest):
            return lsn, digest
        received = catalog.last_object(self._machine_id)
        rows = catalog.objects_of(self._machine_id, received.last_lsn) if received is not None else []
        ours = [row for row in rows if row.epoch <= self._epoch]
        return (ours[-1].last_lsn, ours[-1].digest) if ours else (0, NO_DIGEST)

    def _check(self, received: ObjectReceived, position: Position) -> Checked | None:
        if received.begin.omitted:
            raise ProtocolError("a log object of a tail came without all of its frames")
        checked = super()._check(received, position)
        if checked is None:
            return None
        entry, content = checked
        return replace(entry, row=replace(entry.row, is_tail=True)), content

    def _again(self, received: ObjectReceived, position: Position, entries: Sequence[Entry]) -> Acknowledge:
        raise ProtocolError(f"LSN {received.begin.first_lsn} of a tail came where {position.lsn + 1} was due")

    def _catalogue(self, entries: Sequence[Entry]) -> None:
        catalog = self._vault.catalog
        with catalog.transaction():
            machine = catalog.machine_by_id(self._machine_id)
            if machine is None or machine.revoked:
                raise FencedError("the machine's certificates are revoked: nothing of it is taken any more")
            known = tail_of(catalog, self._machine_id, self._epoch)
            last = TailRows(catalog, known).last_own() if known is not None else None
            end = (
                (last.last_lsn, last.digest) if last is not None else (self._tail.branch_lsn, self._tail.branch_digest)
            )
            if end != (self._position.lsn, self._position.digest) or (known is not None and known.is_whole):
                raise FencedError("the tail has gone on over another connection")
            if known is None:
                put_tail(catalog, self._tail)
            append_to_tail(catalog, self._tail, entries)
