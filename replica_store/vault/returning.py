"""A machine that was failed over from here comes back: which of its sides that is, and what ends with it (I6).

    commit ─▶ certificate of until then noted, unused tokens no longer good ─▶ every session: fenced
        ─▶ (a person) new token ─▶ enrolled by the side that went on ─▶ HELLO above the epoch of the commit
        ─▶ new epoch ─▶ the failover is `returned` ─▶ WELCOME

The side that was left behind shows the certificate of before, or, if it was given a new token by mistake, an epoch
below the commit's: every epoch it was ever told here is. The side that went on was enrolled elsewhere above the epoch
of the commit (`replica-store reprotect`), and each later step raised it. Until the failover is `returned` nothing is
received from anybody.
"""

from __future__ import annotations

import msgspec

from asrfs.errors import FencedError, RefusedError
from replica_store.vault.catalog import Catalog
from replica_store.vault.operations import Operation, change, committed_by, operation
from replica_store.vault.rows import MachineRow
from replica_store.vault.vault import Vault


def check_side(catalog: Catalog, machine: MachineRow, epoch: int) -> Operation | None:
    """The failover by which the machine runs elsewhere, if who greets with this epoch is the side that went on there;
    None if it runs nowhere else. The certificate is the one that is good now.

    Raises FencedError for the side that was left behind, RefusedError for one that this failover made itself.
    """
    committed_id = committed_by(catalog, machine.id)
    if committed_id is None:
        return None
    found = operation(catalog, committed_id)
    text = f"machine {machine.name} was failed over and runs elsewhere since (failover {found.id[:12]}): "
    is_new = found.closed_serial is not None and machine.serial != found.closed_serial
    if not is_new or found.epoch is None or epoch < found.epoch:
        raise FencedError(f"{text}this side can add nothing any more")
    if epoch == found.epoch:
        raise RefusedError(f"{text}that side is not protected by the store it came from: see `replica-store reprotect`")
    return found


def close_side(vault: Vault, found: Operation) -> Operation:
    """What tells the two sides apart from now on. Inside the transaction that commits the failover."""
    machine = vault.machine(found.machine)
    vault.catalog.change("UPDATE tokens SET expires_ns = 0 WHERE machine_name = ? AND used_ns IS NULL", (machine.name,))
    return msgspec.structs.replace(found, closed_serial=machine.serial)


def end_by_return(root: str, operation_id: str, epoch: int, time_ns: int) -> None:
    """The machine is received again, in an epoch that it has not been told yet; durable when this returns.

    What the failover left where it ran is not touched: it may hold what nobody else has.
    """

    def back(vault: Vault, before: Operation) -> Operation:
        if before.state != "committed":
            return before
        return before.to("returned", time_ns, f"the machine came back, in epoch {epoch}")

    change(root, operation_id, back)
