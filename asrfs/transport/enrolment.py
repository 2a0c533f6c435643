"""Enrolment as both sides know it: the token, the request and the reply, and the look at the store's certificate.

    token    "asrfs1." + base64url(MessagePack {machine, secret, fingerprint}), no padding
    request  POST https://HOST:PORT/api/v1/enroll, JSON `EnrolRequest`
    reply    200 and JSON `EnrolReply`, else JSON `ApiFailure`

The host looks at the store's certificate, compares its SHA-256 with the token's, and only then says the secret, over a
connection that trusts exactly this certificate (`tls.pinned_context`).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import socket
import ssl
from typing import Annotated

import msgspec

from asrfs.errors import AuthenticationError, BadInputError, TemporaryError
from asrfs.model.arrival import Arrival
from asrfs.model.names import check_name
from asrfs.transport.tls import fingerprint, unverified_context

ENROL_PATH = "/api/v1/enroll"
HEALTH_PATH = "/api/v1/health"
SECRET_BYTES = 32
_PREFIX = "asrfs1."
_TOKEN_CHARACTERS_MAX = 1000


Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """What a one-time token says. `fingerprint`: SHA-256 of the management port's certificate in DER."""

    machine: str
    secret: bytes
    fingerprint: bytes


class EnrolRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`secret` is base64url without padding, `csr` is PEM. `arrival`: of a machine that was failed over, what the store
    says that it comes from."""

    secret: str
    machine: str
    machine_id: str
    csr: str
    arrival: Arrival | None = None


class EnrolReply(msgspec.Struct, frozen=True, kw_only=True):
    """`certificate` and `ca` are PEM, the two keys base64 of 32 bytes; `data_port` is on the host asked."""

    certificate: str
    ca: str
    store_id: str
    server_name: str
    data_port: Port
    payload_key: str
    index_key: str


class ApiFailure(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every reply that is not 2xx: one line for people, and the exit code of the error's class."""

    error: str
    exit_code: int = 1


def encode_token(token: Token) -> str:
    return _PREFIX + encode_base64url(msgspec.msgpack.encode(token))


def decode_token(text: str) -> Token:
    """Raises BadInputError for anything that is not a token."""
    text = text.strip()
    if not text.startswith(_PREFIX) or len(text) > _TOKEN_CHARACTERS_MAX:
        raise BadInputError("this is not an enrolment token: give the line that `replica-store token` printed")
    try:
        token = msgspec.msgpack.decode(decode_base64url(text.removeprefix(_PREFIX)), type=Token)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise BadInputError("the enrolment token is damaged: copy the whole line of `replica-store token`") from None
    check_name(token.machine, "machine")
    if len(token.secret) != SECRET_BYTES or len(token.fingerprint) != 32:
        raise BadInputError("the enrolment token is damaged: copy the whole line of `replica-store token`")
    return token


def encode_base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode_base64url(text: str) -> bytes:
    """Raises ValueError."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError(str(error)) from None


def fetch_certificate(host: str, port: int, timeout: float = 10.0) -> bytes:
    """The certificate (DER) that answers at a management address. Nothing is said to it. Raises TemporaryError."""
    try:
        with (
            socket.create_connection((host, port), timeout=timeout) as connection,
            unverified_context().wrap_socket(connection, server_hostname=host) as secured,
        ):
            certificate = secured.getpeercert(binary_form=True)
    except (OSError, ssl.SSLError, UnicodeError) as error:
        raise TemporaryError(f"no store answers at {host}:{port}: {describe(error)}") from None
    if certificate is None:
        raise AuthenticationError(f"{host}:{port} shows no certificate")
    return certificate


def check_fingerprint(certificate: bytes, token: Token, where: str) -> None:
    """Raises AuthenticationError unless the certificate (DER) is the one the token was made for."""
    if not hmac.compare_digest(fingerprint(certificate), token.fingerprint):
        raise AuthenticationError(
            f"the certificate at {where} is not the one the token was made for: "
            "check the address, or make a new token with `replica-store token`"
        )


def describe(error: Exception) -> str:
    """The system's words for an error of a connection, without numbers and brackets."""
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (getattr(error, "strerror", None) or str(error)).lower()
