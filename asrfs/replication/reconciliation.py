"""The decision at the handshake: where shipping goes on, or why it must not. Pure.

The store's word decides what is durable there (I3). It may know more than we do: an acknowledgement was lost. It may
know less: it was rolled back or replaced, and only what the journal still has can be sent again (I4). It must never
know more than we ever made durable, or something else under the same LSN. A host that was set back to a backup, or
cloned, has the same numbers for other records once it has written enough: so the last record that the store has is
compared with ours of the same LSN, by its time. Times are drawn at nanoseconds when a record is appended and never go
back, so what agrees in one record agrees in all before it.
"""

from __future__ import annotations

from typing import NamedTuple

from asrfs.errors import (
    AsrfsError,
    AuthenticationError,
    FencedError,
    IntegrityError,
    NoSpaceError,
    TemporaryError,
    foreign_line,
)
from asrfs.format.log_object import DIGEST_BYTES, SALT_BYTES
from asrfs.protocol.frames import ProtocolError
from asrfs.protocol.messages import PROTOCOL_VERSION, Welcome


class Side(NamedTuple):
    """What one end holds for acknowledged. `last_digest` is hex or empty when it is not known."""

    epoch: int
    acknowledged_lsn: int
    last_digest: str


class DivergedError(IntegrityError):
    """Host and store hold different histories of one machine."""


class StoreLostError(IntegrityError):
    """The store misses records that it had acknowledged and that the host has freed: it was set back or replaced.

    The host is ahead of it, so it may go on in a new epoch without asking anybody.
    """


def check_same_history(host: Side, durable_lsn: int, store: Side) -> None:
    """Raise FencedError, DivergedError or StoreLostError if this host may not add to the store's history at all."""
    if store.epoch > host.epoch:
        raise FencedError(
            f"the store is at epoch {store.epoch} of this machine and this host at {host.epoch}: "
            "another side of the machine goes on, and this one can add nothing any more"
        )
    if store.epoch < host.epoch:
        raise StoreLostError(
            f"the store is at epoch {store.epoch} of this machine and this host at {host.epoch}: it was set back or "
            "replaced"
        )
    if store.acknowledged_lsn > durable_lsn:
        raise DivergedError(
            f"the store holds this machine up to LSN {store.acknowledged_lsn}, but this host made nothing durable "
            f"beyond LSN {durable_lsn}: the host was set back or cloned"
        )
    same_lsn = store.acknowledged_lsn == host.acknowledged_lsn
    if same_lsn and host.last_digest and store.last_digest and host.last_digest != store.last_digest:
        raise DivergedError(
            f"host and store hold different log objects up to LSN {host.acknowledged_lsn}: "
            f"{host.last_digest[:16]}… here, {store.last_digest[:16]}… there"
        )


def check_same_record(lsn: int, host_time_ns: int, store_time_ns: int) -> None:
    """Raise DivergedError unless record `lsn` is the same one on both sides."""
    if host_time_ns != store_time_ns:
        raise DivergedError(
            f"record {lsn} of this host (time {host_time_ns}) is not the record {lsn} that the store holds (time "
            f"{store_time_ns}): the host was set back or cloned, and what it wrote since is not in the replica"
        )


def check_can_resend(store_lsn: int, first_kept_lsn: int) -> None:
    """Raise StoreLostError unless the journal, which begins at `first_kept_lsn`, reaches down to the store."""
    if store_lsn + 1 < first_kept_lsn:
        raise StoreLostError(
            f"the store holds this machine up to LSN {store_lsn} only, and the journal begins at LSN "
            f"{first_kept_lsn}: LSN {store_lsn + 1} to {first_kept_lsn - 1} are lost to the replica"
        )


def refusal(code: str, text: str) -> AsrfsError:
    """The error a REFUSED message means."""
    text = f"the store refused: {foreign_line(text)}"
    if code == "authentication":
        return AuthenticationError(text)
    if code == "fenced":
        return FencedError(text)
    if code == "diverged":
        return DivergedError(text)
    return NoSpaceError(text) if code == "space" else TemporaryError(text)


def check_welcome(welcome: Welcome) -> None:
    """Raise ProtocolError for a WELCOME that makes no sense."""
    if welcome.protocol != PROTOCOL_VERSION:
        raise ProtocolError(f"the store speaks protocol {welcome.protocol}, this program {PROTOCOL_VERSION}")
    if len(welcome.session_salt) != SALT_BYTES or min(welcome.acknowledged_lsn, welcome.acknowledged_time_ns) < 0:
        raise ProtocolError("the store's WELCOME has a salt or LSN that cannot be")
    try:
        digest = bytes.fromhex(welcome.last_digest)
    except ValueError:
        digest = b"?"
    if len(digest) not in (0, DIGEST_BYTES):
        raise ProtocolError("the store's WELCOME has a digest that cannot be")
