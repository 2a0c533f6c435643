"""The decision at a session's beginning: may this host add to this history? Pure."""

from __future__ import annotations

from collections.abc import Mapping

from asrfs.errors import AsrfsError, AuthenticationError, FencedError, NoSpaceError, RefusedError, TemporaryError
from asrfs.protocol.frames import ProtocolError
from asrfs.protocol.messages import PROTOCOL_VERSION, Hello, RefusalCode
from asrfs.transport.tls import MachineIdentity
from replica_store.ingest.ingester import Position
from replica_store.ingest.seeding import SeedUselessError
from replica_store.vault.row_checks import EPOCH_END
from replica_store.vault.rows import MachineRow


class DivergedError(RefusedError):
    """The host's history is not the one that is here: it was set back, cloned, or talks to another store."""


def check_not_replaced(identity: MachineIdentity, machine: MachineRow | None, hello: Hello) -> None:
    """Raise FencedError for a side that was left behind before another one enrolled: that its certificate is good no
    more would not stop it (I6). The certificate is of the vault's authority."""
    if machine is not None and not machine.revoked and machine.serial != identity.serial and not hello.rejoin:
        _check_not_superseded(hello, machine.epoch)


def check_identity(identity: MachineIdentity, machine: MachineRow | None) -> MachineRow:
    """Whether a certificate of the vault's authority is the one that is good now. Raises AuthenticationError."""
    if machine is None:
        raise AuthenticationError(
            f"this store knows no machine {identity.name} with id {identity.machine_id}: enrol it"
        )
    if machine.revoked:
        raise AuthenticationError(f"the certificates of machine {machine.name} are revoked: enrol it again")
    if machine.serial != identity.serial:
        raise AuthenticationError(f"machine {machine.name} has enrolled again since: this certificate is good no more")
    return machine


def check_hello(hello: Hello, machine: MachineRow) -> None:
    """What can be said before the history is looked at. Raises AsrfsError.

    A host at a higher epoch than ours was told it by a store of which this one is an older copy, or by another one: it
    is welcomed with ours, and will want to rejoin.
    """
    if hello.machine_id != machine.id:
        raise AuthenticationError(
            f"the certificate is of machine {machine.name} (id {machine.id}), "
            f"but the host says it is {hello.machine_id[:40]}"
        )
    if hello.protocol != PROTOCOL_VERSION:
        raise RefusedError(f"protocol {hello.protocol} is not known here: this store speaks {PROTOCOL_VERSION}")
    if not 0 <= hello.epoch < EPOCH_END:
        raise RefusedError(f"there is no epoch {hello.epoch}")
    _check_not_superseded(hello, machine.epoch)


def check_position(hello: Hello, position: Position, digest_at_acknowledged: str | None) -> None:
    """Whether the host's history continues ours. `digest_at_acknowledged`: of our object that ends where the host's
    acknowledged ones do, None if none does. A host that has been told more than we hold is told so by WELCOME, and who
    rejoins continues nothing."""
    _check_not_superseded(hello, position.epoch)  # again: a catalog that was set back has just caught up
    if hello.rejoin or hello.epoch > position.epoch:
        return
    if hello.appended_lsn < position.lsn:
        raise DivergedError(
            f"the host's history ends at LSN {hello.appended_lsn}, and LSN {position.lsn} is here: "
            "the host was set back or cloned, and its records must not go under the same numbers"
        )
    if hello.last_digest and digest_at_acknowledged not in (None, hello.last_digest):
        raise DivergedError(
            f"up to LSN {hello.acknowledged_lsn} the host holds log object {hello.last_digest[:16]}… for acknowledged, "
            f"and here is {str(digest_at_acknowledged)[:16]}…"
        )


def granted_before(hello: Hello, epoch: int, granted: Mapping[str, int]) -> int | None:
    """The epoch that the order of a host that rejoins was given already, None if it is to get a new one.

    A HELLO may come late, over a connection that its host has long given up, when the next one was answered: it must
    not supersede the host that said it. A host that knows its epoch and asks again, because it died since, gets
    another. Raises FencedError where somebody else was given a later one.
    """
    before = granted.get(hello.order)
    if before is None or before <= hello.epoch:
        return None
    if before < epoch:
        raise FencedError(f"the machine is at epoch {epoch}: another side of it has rejoined since this one asked")
    return before


def _check_not_superseded(hello: Hello, epoch: int) -> None:
    if hello.epoch < epoch and not hello.rejoin:
        raise FencedError(
            f"the machine is at epoch {epoch} and this host at {hello.epoch}: another side of it goes on, and this one "
            "can add nothing any more"
        )


def refusal_code(error: AsrfsError) -> RefusalCode:
    """How the protocol calls an error that ends a session."""
    codes: tuple[tuple[type[AsrfsError], RefusalCode], ...] = (
        (SeedUselessError, "seed"),
        (AuthenticationError, "authentication"),
        (FencedError, "fenced"),
        (DivergedError, "diverged"),
        (NoSpaceError, "space"),
        (TemporaryError, "space"),
        (ProtocolError, "corrupt"),
        (RefusedError, "state"),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), "corrupt")
