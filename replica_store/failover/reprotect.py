"""The other direction: a machine that was failed over for good is protected by another store, from where it runs now.

    order: the failover says so ─▶ start: the recovered machine is served ─▶ hydrate: its disks need this vault no more
        ─▶ enrol: certificate of the other store, and a new epoch above all of before ─▶ connect ─▶ (later) done

What this vault says of the machine goes with it when it enrols (`vault/arrivals.py`): whether it is away from home, and
the policy that held, which holds there, too.

Each step is written down or can be seen from what is there, so the same command goes on after any death. It is the
recovered machine's own agent that compares and sends; here it is only looked at.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import msgspec

from asrfs.errors import AsrfsError, BadInputError, IntegrityError, RefusedError, TemporaryError
from asrfs.model.arrival import Arrival
from asrfs.model.clock import Clock
from asrfs.model.protection_states import ProtectionEvent
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import write_atomically
from asrfs.transport.enrolment import Token, decode_token
from asrfs.transport.stream import format_address, parse_address
from replica_store.failover import places, processes
from replica_store.failover.actions import Failovers
from replica_store.failover.leaving import asrfs, status_of, statuses_of
from replica_store.failover.preparation import Told, has_bases
from replica_store.vault.arrivals import departure_of
from replica_store.vault.operations import Operation, Reprotection, change, holder, operations, sealed_operation
from replica_store.vault.protection import check_event
from replica_store.vault.vault import Vault

MANAGE_PORT_DEFAULT = 443
CONNECT_S_MAX = 120.0
REFUSED_S = 5.0
"""It may be the store of before that refused."""
LOOK_EVERY_S = 0.1
"""Whether a disk still has a base: that is one small file."""
ASK_EVERY_S = 5.0
_DEPARTURE_FILE = "departure.json"


@dataclass(frozen=True, slots=True)
class Wish:
    """`store`: management address of the other store. `paused`: it is enrolled and sends nothing until `asrfs resume`,
    so that seeds can be brought first. `wait`: until the other store has all of it. `seconds_max`: for all that is
    waited for, but an enrolment that has begun."""

    machine: str
    store: str
    token: str
    paused: bool = False
    wait: bool = False
    seconds_max: float | None = None


class Reprotecting:
    """Of the vault at `root`. `told`: called with the name of each step before it begins. `status`: what the recovered
    machine last said of itself."""

    def __init__(self, root: str, clock: Clock, told: Told = lambda step: None) -> None:
        self._root = os.path.abspath(root)
        self._clock = clock
        self._told = told
        self._failovers = Failovers(self._root, clock)
        self.status: dict[str, Any] | None = None

    def run(self, wish: Wish) -> Operation:
        """As far as it goes at once. Raises RefusedError before commit, and for a store that would protect itself."""
        token = decode_token(wish.token)
        host, port = parse_address(wish.store, MANAGE_PORT_DEFAULT)
        store = format_address(host, port)
        deadline = math.inf if wish.seconds_max is None else time.monotonic() + wish.seconds_max
        self._told("order")
        found = self._order(wish.machine, store, token)
        self._told("start")
        with processes.within(deadline - time.monotonic()):
            found = self._failovers.resume(found.id)
        self._told("hydrate")
        self._hydrate(found, deadline)
        self._told("enrol")
        found = self._enrol(found, wish)
        if wish.paused:
            return found
        self._told("connect")
        with closing(statuses_of(found)) as statuses:
            found = self._note_whole(found, self._connect(found, statuses, deadline))
            if wish.wait:
                self._told("replicate")
            while wish.wait and found.reprotection is not None and found.reprotection.done_ns is None:
                _check_time(deadline, "it goes on by itself; look with `replica-store failover show`")
                found = self._note_whole(found, next(statuses))
        return found

    # ---- steps ------------------------------------------------------------------------------------------------

    def _order(self, machine: str, store: str, token: Token) -> Operation:
        with Vault.open(self._root) as vault:
            row = vault.machine(machine)
            if token.fingerprint == vault.keys.server_fingerprint():
                raise RefusedError(
                    f"the token is of this very store: machine {machine} runs from what is here, so another one must "
                    "protect it: make the token there"
                )
            if token.machine != machine:
                raise BadInputError(f"the token is for machine {token.machine}, and this is {machine}: ask for another")
            holding = holder(operations(vault.catalog, row.id))
            if holding is not None and _is_done(holding, store):
                return holding
            check_event(vault, row, ProtectionEvent.REPROTECT)
        assert holding is not None, "the table allows it for what a failover holds alone"

        def order(vault: Vault, before: Operation) -> Operation:
            check_event(vault, vault.machine(machine), ProtectionEvent.REPROTECT)
            if before.reprotection is not None and before.reprotection.store == store:
                return before
            now_ns = self._clock.time_ns()
            after = before.to(before.state, now_ns, f"it is to be protected by the store at {store}")
            return msgspec.structs.replace(after, reprotection=Reprotection(store=store, begun_ns=now_ns))

        with places.take_lock(holding.places):
            return change(self._root, holding.id, order)

    def _hydrate(self, found: Operation, deadline: float) -> None:
        """Until its disks are whole: what another store protects must not hang on this vault."""
        if not has_bases(found):
            return
        asrfs(found, "set", "hydration=on")
        asked = time.monotonic()
        while has_bases(found):
            _check_time(deadline, "hydration goes on by itself: begin again later")
            time.sleep(LOOK_EVERY_S)
            if time.monotonic() - asked >= ASK_EVERY_S:
                asked = time.monotonic()
                for alarm in status_of(found)["alarms"]:
                    if alarm["id"] == "hydration" and alarm["severity"] == "critical":
                        raise TemporaryError(alarm["text"])

    def _enrol(self, found: Operation, wish: Wish) -> Operation:
        with places.take_lock(found.places):
            with Vault.open(self._root) as vault:
                found = sealed_operation(vault, found.id)
                departure = departure_of(vault, vault.machine(found.machine))
            wanted = found.reprotection
            if wanted is None or found.epoch is None:
                raise RefusedError(f"failover {found.id[:12]} is {found.state} meanwhile: begin again")
            known = _enrolled_at(found)
            if wish.paused:
                asrfs(found, "pause")
            if known != wanted.store or not wanted.enrolled:
                if known != wanted.store:
                    instead = ["--instead"] if known is not None else []
                    words = ["enroll", "--store", wanted.store, "--token", "-", *instead]
                    words += ["--above-epoch", str(found.epoch), "--arrival", _write_departure(found, departure)]
                    try:
                        asrfs(found, *words, said=f"{wish.token}\n".encode())
                    except AsrfsError:
                        if _enrolled_at(found) != wanted.store:  # not by one whose command died before it either
                            raise
                return self._note(found, enrolled=True)
            return found

    def _connect(self, found: Operation, statuses: Iterator[dict[str, Any]], deadline: float) -> dict[str, Any]:
        """Until the other store has welcomed it, in its new epoch; how it stands then."""
        begun = time.monotonic()
        deadline = min(deadline, begun + CONNECT_S_MAX)
        for status in statuses:
            is_rejoined = found.epoch is None or status["epoch"] > found.epoch
            if status["link"] == "connected" and is_rejoined:
                return status
            reason = status["link_reason"] or status["link"]
            if status["link"] == "paused":
                raise RefusedError(
                    f"it is enrolled, and shipping is paused: `asrfs resume --state {found.places.state}`"
                )
            is_over = status["link"] == "refused" and time.monotonic() > begun + REFUSED_S
            if is_over or time.monotonic() > deadline:
                raise TemporaryError(f"it is enrolled, and not connected yet, which it tries by itself: {reason}")
        raise AssertionError("statuses end by raising")

    # ---- looking ----------------------------------------------------------------------------------------------

    def look(self, found: Operation) -> Operation:
        """Note that the other store has all of it, once that is so."""
        wanted = found.reprotection
        if wanted is None or not wanted.enrolled or wanted.done_ns is not None:
            return found
        return self._note_whole(found, status_of(found))

    def _note_whole(self, found: Operation, status: dict[str, Any]) -> Operation:
        """The same by what is known of it."""
        self.status = status
        if found.reprotection is None or found.reprotection.done_ns is not None:
            return found
        is_rejoined = found.epoch is None or status["epoch"] > found.epoch
        if status["state"] != "protected" or status["link"] != "connected" or not is_rejoined:
            return found
        return self._note(found, done_ns=self._clock.time_ns())

    def look_at_all(self) -> list[Operation]:
        """The same for every machine; those of which it is so now. What cannot be asked is asked the next time."""
        done = []
        for each in reprotecting(self._root):
            try:
                after = self.look(each)
            except (AsrfsError, OSError):
                continue
            if after != each:
                done.append(after)
        return done

    def _note(self, found: Operation, **changes: Any) -> Operation:
        def note(vault: Vault, before: Operation) -> Operation:
            wanted = before.reprotection
            if wanted is None or before.state != "committed":
                raise RefusedError(f"failover {before.id[:12]} is {before.state} meanwhile")
            if "done_ns" in changes:
                before = before.to(before.state, changes["done_ns"], f"the store at {wanted.store} has all of it")
            return msgspec.structs.replace(before, reprotection=msgspec.structs.replace(wanted, **changes))

        return change(self._root, found.id, note)


def reprotecting(root: str) -> list[Operation]:
    """Failovers whose machine is on its way into another store."""
    with Vault.open(root) as vault:
        return [
            each
            for each in operations(vault.catalog)
            if each.state == "committed"
            and each.reprotection is not None
            and each.reprotection.enrolled
            and each.reprotection.done_ns is None
        ]


def _is_done(found: Operation, store: str) -> bool:
    wanted = found.reprotection
    return wanted is not None and wanted.store == store and wanted.done_ns is not None


def _write_departure(found: Operation, departure: Arrival) -> str:
    """Where the machine's own program reads it."""
    storage = DirectoryStorage(found.places.directory)
    write_atomically(storage, _DEPARTURE_FILE, msgspec.json.encode(departure))
    return storage.path(_DEPARTURE_FILE)


def _enrolled_at(found: Operation) -> str | None:
    """Management address of the store that the recovered machine has a certificate of."""
    path = os.path.join(found.places.state, "keys", "store.json")
    try:
        with open(path, "rb") as file:
            known = msgspec.json.decode(file.read(1 << 16))
        return format_address(str(known["host"]), int(known["manage_port"]))
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError):
        raise IntegrityError(f"{path} cannot be read: remove it, and begin again with a new token") from None


def _check_time(deadline: float, advice: str) -> None:
    if time.monotonic() > deadline:
        raise TemporaryError(f"its time is up; {advice}")
