"""Enrolment, the host's side: a one-time token becomes keys and a certificate.

    check the token ─▶ look at the store's certificate, compare fingerprints ─▶ key and request ─▶
    say the secret over a connection that trusts exactly that certificate ─▶ write keys/

The secret is said to nobody whose certificate is not the token's. Nothing is written before the store agreed.
"""

from __future__ import annotations

import secrets
from typing import Any

import httpx2
import msgspec
from cryptography import x509

from asrfs.daemon.enrolment import Enrolment, decode_key, load_enrolment, save_enrolment
from asrfs.daemon.state import StateDirectory
from asrfs.errors import (
    BadInputError,
    IntegrityError,
    NoSpaceError,
    RefusedError,
    TemporaryError,
    error_class,
    foreign_line,
)
from asrfs.model.arrival import Arrival
from asrfs.model.names import is_id
from asrfs.model.rejoining import REJOIN_FILE, RejoinOrder
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import write_atomically
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.enrolment import (
    ENROL_PATH,
    ApiFailure,
    EnrolReply,
    EnrolRequest,
    Token,
    check_fingerprint,
    decode_token,
    encode_base64url,
    fetch_certificate,
)
from asrfs.transport.stream import format_address, parse_address
from asrfs.transport.tls import check_certificate, make_key_and_request, pinned_context, server_name_of

MANAGE_PORT_DEFAULT = 443
REPLY_S_MAX = 30.0
REPLY_BYTES_MAX = 64 << 10
_HEADERS = {"content-type": "application/json", "accept-encoding": "identity"}


def enroll(
    state: StateDirectory,
    store: str,
    token_text: str,
    *,
    instead: bool = False,
    above_epoch: int | None = None,
    arrival: Arrival | None = None,
) -> dict[str, Any]:
    """Enrol the machine of `state` with the store whose management address is `store`; a document that says with whom.

    `instead`: it takes the place of another store that the machine was enrolled with; what is missing there is sent.
    `above_epoch`: it goes on there in a new epoch, higher than that one, from the first word it says. `arrival`: what
    the store says that it comes from.
    Raises BadInputError (token, address), AuthenticationError (fingerprint, used or expired token), RefusedError
    (enrolled with another store, superseded, a trial), TemporaryError (no answer).
    """
    token = decode_token(token_text)
    host, port = parse_address(store, MANAGE_PORT_DEFAULT)
    recovered = state.load_recovered()
    if recovered is not None and recovered.is_trial:  # the store would take it for the machine, and refuse that
        raise RefusedError(
            f"this is machine {recovered.name} in a test failover, and the machine itself goes on: it alone is enrolled"
        )
    if above_epoch is not None and state.is_fenced():
        raise RefusedError("this host was superseded, and another side of the machine goes on: enrol that one")
    with state.enrolment_lock():
        return _enroll(state, host, port, token, None if instead else load_enrolment(state), above_epoch, arrival)


def _enroll(
    state: StateDirectory,
    host: str,
    port: int,
    token: Token,
    known: Enrolment | None,
    above_epoch: int | None,
    arrival: Arrival | None,
) -> dict[str, Any]:
    machine = state.load_machine()
    if token.machine != machine.name:
        raise BadInputError(f"the token is for machine {token.machine}, and this is {machine.name}: ask for another")
    where = format_address(host, port)
    certificate = fetch_certificate(host, port)
    check_fingerprint(certificate, token, where)
    _check_same_store(known, _server_names(certificate))
    key, request = make_key_and_request(machine.name, machine.id)
    reply = _ask(where, certificate, token, machine.id, request, arrival)
    enrolment = Enrolment(
        store_id=reply.store_id,
        server_name=reply.server_name,
        host=host,
        data_port=reply.data_port,
        manage_port=port,
        payload_key=reply.payload_key,
        index_key=reply.index_key,
    )
    decode_key(enrolment.payload_key, "payload key")
    decode_key(enrolment.index_key, "index key")
    _check_same_store(known, [reply.server_name])
    if above_epoch is not None:
        _order_rejoining(state, where, above_epoch)  # first: without it, the old side of a history is all it could be
    save_enrolment(state, enrolment, key=key, certificate=reply.certificate.encode(), authority=reply.ca.encode())
    return {"machine": machine.name, "store": reply.store_id, "data": enrolment.data_address, "manage": where}


def _order_rejoining(state: StateDirectory, where: str, above_epoch: int) -> None:
    """Raises NoSpaceError."""
    order = RejoinOrder(
        id=secrets.token_hex(16),
        by="person",
        why=f"it was enrolled with the store at {where}, to go on above epoch {above_epoch}",
        time_ns=SystemClock().time_ns(),
        above=above_epoch,
    )
    try:
        write_atomically(DirectoryStorage(state.root), REJOIN_FILE, msgspec.json.encode(order))
    except OSError as error:
        raise NoSpaceError(f"cannot write {state.path(REJOIN_FILE)}: {error.strerror}") from None


def _ask(
    where: str, certificate: bytes, token: Token, machine_id: str, request: bytes, arrival: Arrival | None
) -> EnrolReply:
    """Say the secret, get the certificate."""
    body = EnrolRequest(
        secret=encode_base64url(token.secret),
        machine=token.machine,
        machine_id=machine_id,
        csr=request.decode(),
        arrival=arrival,
    )
    url = f"https://{where}{ENROL_PATH}"
    try:
        with httpx2.Client(verify=pinned_context(certificate), timeout=REPLY_S_MAX, trust_env=False) as client:
            with client.stream("POST", url, content=msgspec.json.encode(body), headers=_HEADERS) as response:
                content = _content(response, where)
    except httpx2.HTTPError as error:
        if "CERTIFICATE_REQUIRED" in str(error):
            raise BadInputError(f"{where} is the store's data port: give the address of its management port") from None
        raise TemporaryError(f"the store at {where} did not answer: {error}") from None
    if response.status_code != 200:
        raise_failure(where, response.status_code, content)
    return decode_reply(content, where)


def _content(response: httpx2.Response, where: str) -> bytes:
    """The body as it came, if it is of sensible size: nothing in it is unpacked."""
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if len(body) > REPLY_BYTES_MAX:
            raise IntegrityError(f"the reply of the store at {where} is longer than {REPLY_BYTES_MAX} bytes")
    return bytes(body)


def decode_reply(content: bytes, where: str) -> EnrolReply:
    """What the store at `where` gave. Raises IntegrityError for what would leave this machine enrolled with nothing."""
    place = f"the reply of the store at {where}"
    try:
        reply = msgspec.json.decode(content, type=EnrolReply)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{place} cannot be read: {error}") from None
    if not is_id(reply.store_id) or reply.server_name != server_name_of(reply.store_id):
        raise IntegrityError(f"{place} names no store: {foreign_line(reply.store_id)[:40]!r}")
    for certificate in (reply.certificate, reply.ca):
        check_certificate(certificate.encode(), place)
    return reply


def raise_failure(where: str, status_code: int, content: bytes) -> None:
    """Raise what the store's refusal means here."""
    try:
        failure = msgspec.json.decode(content, type=ApiFailure)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise TemporaryError(f"{where} answered with HTTP status {status_code}: is it a store?") from None
    raise error_class(failure.exit_code)(f"the store refused: {foreign_line(failure.error)}")


def _check_same_store(known: Enrolment | None, server_names: list[str]) -> None:
    """A history goes to one store; another one would begin in the middle of it. Asked before the token is used up."""
    if known is not None and known.server_name not in server_names:
        raise RefusedError(
            f"this machine is enrolled with store {known.store_id} at {known.data_address}, and this is another one: "
            "a machine replicates to one store; `--instead` has this one take the other's place"
        )


def _server_names(certificate: bytes) -> list[str]:
    """The DNS names in a certificate (DER)."""
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        alternative = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return alternative.get_values_for_type(x509.DNSName)
    except (ValueError, x509.ExtensionNotFound):
        return []
