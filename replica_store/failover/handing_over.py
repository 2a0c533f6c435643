"""The store's part in a planned failover before anything is recovered: the host is there, and has handed over.

The command asks by writing it down; `serve` tells the host and writes its answer down (`vault/handovers.py`). So either
may die: the answer is there or is still to come, and what nobody waits for any more is cancelled when its time is up.
"""

from __future__ import annotations

import time

from asrfs.errors import IntegrityError, RefusedError, TemporaryError
from asrfs.model.clock import Clock
from asrfs.model.quantities import NS_PER_SECOND, format_duration
from replica_store.vault.operations import HandoverAsked, Operation, operation
from replica_store.vault.vault import Vault

PRESENT_S_MAX = 10.0
"""For so long a command waits for a host that has just connected: links are written down every few seconds."""
AWAY_S_MAX = 30.0
BACK_S_MAX = 15.0
OTHERWISE = "use `failover unplanned`"
GONE_S = 6.0
"""Who is not there for so long is not waited for: links are written down every 5 s."""
_LOOK_EVERY_S = 0.2


def asked(clock: Clock, seconds_max: int) -> HandoverAsked:
    """What a failover that begins now asks."""
    return HandoverAsked(seconds_max=seconds_max, until_ns=clock.time_ns() + seconds_max * NS_PER_SECOND)


def check_present(root: str, machine: str, clock: Clock, otherwise: str = OTHERWISE) -> None:
    """Return when the host is connected to a store that serves. Raises RefusedError if it is not, after a moment."""
    deadline = clock.monotonic() + PRESENT_S_MAX
    while not is_present(root, machine, clock):
        if clock.monotonic() >= deadline:
            raise RefusedError(
                f"the host of machine {machine} is not connected to this store, and this needs it: see that "
                f"`replica-store serve` and the host run, or {otherwise}"
            )
        time.sleep(_LOOK_EVERY_S)  # sleep: another process writes it down


def wait_answer(root: str, operation_id: str, clock: Clock) -> Operation:
    """The failover once its host has handed over.

    Raises TemporaryError when it did not, will not in time, or is away; IntegrityError when a disk differs.
    """
    seen = clock.monotonic()
    while True:
        with Vault.open(root) as vault:
            found = operation(vault.catalog, operation_id)
        handover = found.handover
        assert handover is not None
        if handover.lsn is not None:
            return found
        if handover.error is not None:
            kind = IntegrityError if handover.chunks_different else TemporaryError
            raise kind(f"machine {found.machine} was not handed over: {handover.error}")
        if found.state != "preparing":
            raise RefusedError(f"failover {found.id[:12]} is {found.state} meanwhile")
        now = clock.monotonic()
        seen = now if is_present(root, found.machine, clock) else seen
        if clock.time_ns() >= handover.until_ns:
            limit = format_duration(float(handover.seconds_max))
            raise TemporaryError(f"machine {found.machine} was not handed over within {limit}")
        if now >= seen + AWAY_S_MAX:
            raise TemporaryError(f"the host of machine {found.machine} was away for {AWAY_S_MAX:g} s")
        time.sleep(_LOOK_EVERY_S)  # sleep: another process writes it down


def wait_back(root: str, found: Operation, clock: Clock) -> Operation:
    """The same when its host has taken its machine back, or later: who is away is told when it comes."""
    seen = clock.monotonic()
    deadline = seen + BACK_S_MAX
    while found.handover is not None and not found.handover.is_back and (now := clock.monotonic()) < deadline:
        seen = now if is_present(root, found.machine, clock) else seen
        if now >= seen + GONE_S:
            break
        time.sleep(_LOOK_EVERY_S)  # sleep: another process writes it down
        with Vault.open(root) as vault:
            found = operation(vault.catalog, found.id)
    return found


def is_present(root: str, machine: str, clock: Clock) -> bool:
    """Whether its host said something lately to a store that serves."""
    with Vault.open(root) as vault:
        link = vault.catalog.link(vault.machine(machine).id)
    return link is not None and link.connected and clock.time_ns() - link.heard_ns < AWAY_S_MAX * NS_PER_SECOND
