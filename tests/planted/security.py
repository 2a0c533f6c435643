"""Bugs in what keeps strangers out and seals together: no level says such a thing twice, so each names its test."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from asrfs.errors import AuthenticationError
from asrfs.format import log_object, object_encoder, object_index
from asrfs.format.log_object import DIGEST_BYTES, decode_object_header
from asrfs.protocol.messages import Acknowledge
from asrfs.protocol.session import ObjectReceived
from asrfs.transport import tls
from asrfs.transport.tls import MachineIdentity
from replica_store.ingest import session
from replica_store.ingest.ingester import Checked, Ingester, Position
from replica_store.ingest.session import StoreSession
from replica_store.vault.rows import MachineRow
from tests.planted import Plant

_INGEST = "tests/t4_sim/test_ingest.py::test_"
_STREAM = "tests/t4_sim/test_stream.py::test_"
_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL."""


def any_certificate_of_the_machine(patch: pytest.MonkeyPatch) -> None:
    """The serial of a certificate is not compared with the one that is good."""
    sound = session.check_identity

    def check_identity(identity: MachineIdentity, machine: MachineRow | None) -> MachineRow:
        return sound(identity, replace(machine, serial=identity.serial) if machine else None)

    patch.setattr(session, "check_identity", check_identity)


def revoked_certificate_is_good(patch: pytest.MonkeyPatch) -> None:
    sound = session.check_identity

    def check_identity(identity: MachineIdentity, machine: MachineRow | None) -> MachineRow:
        return sound(identity, replace(machine, revoked=False) if machine else None)

    patch.setattr(session, "check_identity", check_identity)


def certificate_looked_at_once(patch: pytest.MonkeyPatch) -> None:
    """Who is connected stays so, whatever becomes of the certificate."""

    async def watch(self: StoreSession) -> None:
        await trio.sleep_forever()

    patch.setattr(StoreSession, "_watch", watch)


def certificate_of_any_time(patch: pytest.MonkeyPatch) -> None:
    """Of a certificate's dates the server takes no notice."""
    _with_context(patch, "server_context", lambda context: _add_flags(context, _NO_CHECK_TIME))


def host_takes_any_name(patch: pytest.MonkeyPatch) -> None:
    """A host does not ask whether the certificate is of the store that it wants."""

    def loosen(context: ssl.SSLContext) -> None:
        context.check_hostname = False

    _with_context(patch, "client_context", loosen)


def host_speaks_old_tls(patch: pytest.MonkeyPatch) -> None:
    def loosen(context: ssl.SSLContext) -> None:
        context.minimum_version = ssl.TLSVersion.TLSv1_2

    for name in ("client_context", "pinned_context", "unverified_context"):
        _with_context(patch, name, loosen)


def _with_context(patch: pytest.MonkeyPatch, name: str, loosen: Callable[[ssl.SSLContext], None]) -> None:
    sound = getattr(tls, name)

    def context_of(*arguments: Any) -> ssl.SSLContext:
        context: ssl.SSLContext = sound(*arguments)
        loosen(context)
        return context

    patch.setattr(tls, name, context_of)


def _add_flags(context: ssl.SSLContext, flags: int) -> None:
    context.verify_flags |= flags


def salt_not_compared(patch: pytest.MonkeyPatch) -> None:
    """What was sealed for another session is taken in this one."""
    sound = Ingester._check

    def check(self: Ingester, received: ObjectReceived, position: Position) -> Checked | None:
        self._salt = decode_object_header(received.content, "received").session_salt
        return sound(self, received, position)

    patch.setattr(Ingester, "_check", check)


def previous_digest_not_compared(patch: pytest.MonkeyPatch) -> None:
    """Any object with the right LSN goes on with the history."""
    sound = Ingester._check

    def check(self: Ingester, received: ObjectReceived, position: Position) -> Checked | None:
        header = decode_object_header(received.content, "received")
        return sound(self, received, replace(position, digest=header.previous_digest))

    patch.setattr(Ingester, "_check", check)


def duplicate_not_compared(patch: pytest.MonkeyPatch) -> None:
    """What comes again is acknowledged again, whatever it is."""

    def again(self: Ingester, received: ObjectReceived, *position: object) -> Acknowledge:
        return Acknowledge(lsn=received.begin.last_lsn, digest=received.content[-DIGEST_BYTES:].hex())

    patch.setattr(Ingester, "_again", again)


def identity_not_compared(patch: pytest.MonkeyPatch) -> None:
    """A host that has a certificate may say it is any machine."""
    sound = session.check_hello

    def check_hello(hello: Any, machine: MachineRow) -> None:
        try:
            sound(hello, machine)
        except AuthenticationError:
            return

    patch.setattr(session, "check_hello", check_hello)


def nonce_used_again(patch: pytest.MonkeyPatch) -> None:
    """Each object of a session counts its frames from the same nonce on."""
    sound = log_object.nonce_of
    for module in (log_object, object_encoder, object_index):
        patch.setattr(module, "nonce_of", lambda header, frame: sound(header._replace(first_lsn=1), frame))


def salt_not_in_the_keys(patch: pytest.MonkeyPatch) -> None:
    """All sessions have one key, so that an LSN shipped again is sealed with the same nonce."""
    from asrfs.replication import object_builder

    sound = object_builder.derive_keys

    def derive_keys(*keys: Any) -> log_object.ObjectKeys:
        return sound(*keys[:-1], bytes(log_object.SALT_BYTES))

    patch.setattr(object_builder, "derive_keys", derive_keys)


def header_not_under_the_seal(patch: pytest.MonkeyPatch) -> None:
    """Neither side authenticates the clear header with what it seals and opens."""

    class Loose:
        def __init__(self, key: bytes) -> None:
            self._cipher = AESGCM(key)

        def encrypt_into(self, nonce: bytes, content: bytes, clear: bytes, into: memoryview) -> int:
            return self._cipher.encrypt_into(nonce, content, None, into)

        def decrypt(self, nonce: bytes, content: bytes, clear: bytes) -> bytes:
            return self._cipher.decrypt(nonce, content, None)

    for module in (log_object, object_encoder):
        patch.setattr(module, "AESGCM", Loose)


_CUT = f"{_INGEST}a_certificate_that_is_good_no_more_is_cut_within_ten_seconds"
_WHO = f"{_INGEST}who_may_not_write_is_told_why"
_LIE = f"{_INGEST}what_cannot_be_is_refused_and_changes_nothing"
_NONCES = "tests/t1_unit/test_object_builder.py::test_no_pair_of_key_and_nonce_seals_twice"
_OLD_TLS = "tests/t5_system/test_security.py::test_a_host_speaks_to_no_store_below_tls_1_3"
_NOT_REFUSED = r"isinstance\(Acknowledge\(.*, Refused\)"
_BROKEN = (
    (any_certificate_of_the_machine, "a certificate's serial is not compared", _WHO, "it has enrolled again since"),
    (revoked_certificate_is_good, "a revoked certificate is taken", _WHO, "it is revoked"),
    (certificate_looked_at_once, "who is connected stays so", f"{_CUT}[revoked]", r"isinstance\(None, Refused\)"),
    (
        certificate_of_any_time,
        "an expired certificate is taken",
        f"{_STREAM}a_certificate_out_of_its_time_is_an_authentication_error[expired]",
        "DID NOT RAISE.*AuthenticationError",
    ),
    (
        host_takes_any_name,
        "a host speaks to any store of the authority",
        f"{_STREAM}a_certificate_of_another_authority_is_an_authentication_error",
        "DID NOT RAISE.*AuthenticationError",
    ),
    (host_speaks_old_tls, "a host speaks TLS 1.2", _OLD_TLS, "data: TLSv1_2"),
    (identity_not_compared, "a host may say it is another one", _WHO, "the certificate is of another machine"),
    (salt_not_compared, "an object of another session is taken", f"{_LIE}[sealed for another session]", _NOT_REFUSED),
    (previous_digest_not_compared, "an object of another history is taken", f"{_LIE}[another history]", _NOT_REFUSED),
    (
        duplicate_not_compared,
        "a duplicate is acknowledged whatever it holds",
        f"{_INGEST}a_duplicate_is_acknowledged_again_only_if_it_is_the_same",
        _NOT_REFUSED,
    ),
    (nonce_used_again, "objects of a session share nonces", _NONCES, "have sealed two things"),
    (salt_not_in_the_keys, "sessions share keys", _NONCES, "have sealed two things"),
    (
        header_not_under_the_seal,
        "the header is not under the seal",
        "tests/t1_unit/test_log_object.py::test_seals_bind_the_header",
        "times differ from the header's",
    ),
)
PLANTS = tuple(
    Plant(apply.__name__.replace("_", "-"), text, test, 1, apply, shows) for apply, text, test, shows in _BROKEN
)
