"""The state of a machine's protection as the store has it: from its failover if it has one, else from its history."""

from __future__ import annotations

from asrfs.errors import FencedError, RefusedError
from asrfs.model.protection_states import ProtectionEvent, ProtectionState, next_state
from replica_store.vault.catalog import Catalog
from replica_store.vault.operations import Operation, committed_by, holder, operations
from replica_store.vault.rows import MachineRow
from replica_store.vault.vault import Vault


def protection_of(vault: Vault, machine: MachineRow) -> ProtectionState:
    """The state by which events are allowed. A certificate that is revoked takes nothing from the history that is here:
    a machine whose host was stolen can be failed over."""
    holding = holder(operations(vault.catalog, machine.id))
    if holding is not None:
        return state_of(holding)
    received = vault.received_lsn(machine.id)
    if not received:
        return ProtectionState.UNPROTECTED
    is_whole = vault.gap_at(machine.id, received) is None
    return ProtectionState.PROTECTED if is_whole else ProtectionState.INITIAL_REPLICATION


def state_of(holding: Operation) -> ProtectionState:
    """What a failover that holds a machine makes of it. `protected` is so in the other direction: by another store."""
    if holding.state != "committed":
        return ProtectionState.FAILED_OVER
    if holding.reprotection is None:
        return ProtectionState.COMMITTED
    return ProtectionState.REPROTECTING if holding.reprotection.done_ns is None else ProtectionState.PROTECTED


def check_event(vault: Vault, machine: MachineRow, event: ProtectionEvent) -> None:
    """Raise RefusedError where the table does not let it be, and for whatever would begin here with a machine that
    another store protects: what is here is of before, and it goes on elsewhere."""
    state = protection_of(vault, machine)
    holding = holder(operations(vault.catalog, machine.id))
    if holding is not None and holding.reprotection is not None and state is ProtectionState.PROTECTED:
        raise RefusedError(
            f"machine {machine.name} is {state} in the other direction, by the store at {holding.reprotection.store}: "
            f"{event} is refused; allowed: failover and failback there"
        )
    next_state(state, event, machine.name)


def check_not_committed(catalog: Catalog, machine: MachineRow) -> None:
    """Raise FencedError if the machine runs elsewhere for good: nothing of its old side is taken any more (I6)."""
    committed = committed_by(catalog, machine.id)
    if committed is not None:
        raise FencedError(
            f"machine {machine.name} was failed over and runs elsewhere since (failover {committed[:12]}): "
            "this side can add nothing any more"
        )
