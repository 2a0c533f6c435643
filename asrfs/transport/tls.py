"""Certificates and TLS contexts: the vault's authority, its server certificate, one certificate for each machine.

TLS 1.3 only, both sides with a certificate of the vault's authority on the data port. A machine is named by the URI
in its certificate, never by what it says of itself. Keys are EC P-256 and leave this room only as PEM text.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from asrfs.errors import AuthenticationError, BadInputError, IntegrityError
from asrfs.model.names import check_name, is_id

MACHINE_URN = "urn:asrfs:machine:"
NBD_URN = "urn:asrfs:nbd:"
AUTHORITY_DAYS = 3653
SERVER_DAYS = 3653
MACHINE_DAYS = 1826
NBD_DAYS = 7
CLOCK_SKEW = timedelta(days=1)
"""Certificates begin to hold this long before they are made, for hosts whose clock is behind."""
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What the library raises for a certificate it can make nothing of."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A private key and its certificate, both PEM."""

    key: bytes
    certificate: bytes


@dataclass(frozen=True, slots=True)
class MachineIdentity:
    """Whom a machine's certificate names. `serial` is the certificate's own number in hexadecimal digits."""

    machine_id: str
    name: str
    serial: str


def server_name_of(store_id: str) -> str:
    """The name in a store's certificate, which a host asks for whatever address it dials."""
    return f"{store_id}.store.asrfs"


def make_authority(name: str, now_ns: int) -> Credential:
    """A new authority, self-signed, good for ten years."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"asrfs vault {name}"[:64])])
    certificate = (
        _builder(subject, subject, key.public_key(), now_ns, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA256())
    )
    return Credential(_key_pem(key), certificate.public_bytes(Encoding.PEM))


def make_server(authority: Credential, server_name: str, now_ns: int) -> Credential:
    """A key and certificate for the store's two ports."""
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.DNSName(server_name), x509.DNSName("localhost")]
    names.append(x509.IPAddress(ip_address("127.0.0.1")))
    certificate = _sign(authority, key.public_key(), server_name, names, now_ns, SERVER_DAYS, server=True)
    return Credential(_key_pem(key), certificate.public_bytes(Encoding.PEM))


def make_key_and_request(name: str, machine_id: str) -> tuple[bytes, bytes]:
    """For a host that enrols: a new private key and the request for its certificate, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name, "machine"))]))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(MACHINE_URN + machine_id)]), critical=False
        )
        .sign(key, SHA256())
    )
    return _key_pem(key), request.public_bytes(Encoding.PEM)


def sign_request(
    authority: Credential, request: bytes, name: str, machine_id: str, now_ns: int
) -> tuple[bytes, MachineIdentity]:
    """The certificate (PEM) of machine `machine_id` for the key in `request`. Raises BadInputError.

    Of the request only the key is taken; whom the certificate names is decided by the caller.
    """
    if not is_id(machine_id):
        raise BadInputError(f"{machine_id[:40]!r} is not the id of a machine")
    try:
        parsed = x509.load_pem_x509_csr(request)
        key = parsed.public_key()
        sound = parsed.is_signature_valid
    except _UNREADABLE as error:
        raise BadInputError(f"the certificate request cannot be read: {error}") from None
    if not sound or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadInputError("the certificate request is not signed by an EC P-256 key")
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(MACHINE_URN + machine_id)]
    name = check_name(name, "machine")
    certificate = _sign(authority, key, name, names, now_ns, MACHINE_DAYS, server=False)
    identity = MachineIdentity(machine_id, name, f"{certificate.serial_number:x}")
    return certificate.public_bytes(Encoding.PEM), identity


def make_nbd_client(authority: Credential, machine_id: str, now_ns: int) -> Credential:
    """A key and certificate for who may use what is exported of one machine over NBD, for a week, and nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(NBD_URN + machine_id)]
    certificate = _sign(authority, key.public_key(), "asrfs nbd client", names, now_ns, NBD_DAYS, server=False)
    return Credential(_key_pem(key), certificate.public_bytes(Encoding.PEM))


def machine_identity(der: bytes) -> MachineIdentity:
    """Whom a peer's certificate names; its chain has been verified by TLS. Raises AuthenticationError."""
    return _identity(der, MACHINE_URN)


def nbd_machine_id(der: bytes) -> str | None:
    """The machine that a certificate of `make_nbd_client` was made for; None for any other certificate."""
    try:
        return _identity(der, NBD_URN).machine_id
    except AuthenticationError:
        return None


def _identity(der: bytes, urn: str) -> MachineIdentity:
    try:
        certificate = x509.load_der_x509_certificate(der)
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = alternative.get_values_for_type(x509.UniformResourceIdentifier)
        (common_name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except _UNREADABLE as error:
        raise AuthenticationError(f"the certificate names no machine: {error}") from None
    ids = [uri.removeprefix(urn) for uri in uris if uri.startswith(urn)]
    if len(ids) != 1 or not is_id(ids[0]):
        raise AuthenticationError("the certificate names no machine")
    return MachineIdentity(ids[0], str(common_name.value), f"{certificate.serial_number:x}")


def fingerprint(certificate: bytes) -> bytes:
    """SHA-256 (32 bytes) of a certificate's DER form; takes PEM or DER."""
    if certificate.lstrip().startswith(b"-----BEGIN"):
        certificate = ssl.PEM_cert_to_DER_cert(certificate.decode().strip())
    return sha256(certificate).digest()


def check_key(pem: bytes, where: str) -> None:
    """Raise IntegrityError naming `where` unless this is a private key of ours."""
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IntegrityError(f"{where}: not a private key: bring it back from a copy ({error})"[:300]) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IntegrityError(f"{where}: not an EC private key: bring it back from a copy")


def check_certificate(pem: bytes, where: str) -> None:
    """Raise IntegrityError naming `where` unless this is a certificate."""
    try:
        x509.load_pem_x509_certificate(pem)
    except _UNREADABLE as error:
        raise IntegrityError(f"{where}: not a certificate: bring it back from a copy ({error})"[:300]) from None


# ---- contexts ------------------------------------------------------------------------------------------------------


def server_context(certificate_file: str, key_file: str, authority_file: str) -> ssl.SSLContext:
    """For the data port: demands a certificate of the vault's authority from whoever connects."""
    context = manage_context(certificate_file, key_file)
    context.verify_mode = ssl.CERT_REQUIRED
    _load(context.load_verify_locations, authority_file)
    return context


def manage_context(certificate_file: str, key_file: str) -> ssl.SSLContext:
    """For the management port: server certificate only, because who enrols has none yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # a resumed session would not show its certificate again
    context.options |= ssl.OP_NO_COMPRESSION
    _load(context.load_cert_chain, certificate_file, key_file)
    return context


def client_context(certificate_file: str, key_file: str, authority_file: str) -> ssl.SSLContext:
    """For a host: shows its certificate, trusts the authority of its store alone. Use with the store's server name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.hostname_checks_common_name = False  # a machine's certificate has its name there, which may be any
    _load(context.load_cert_chain, certificate_file, key_file)
    _load(context.load_verify_locations, authority_file)
    return context


def member_context(certificate_file: str, key_file: str, authority_file: str) -> ssl.SSLContext:
    """For a member that dials its coordinator: any certificate of the vault's authority passes, so whoever uses this
    must compare the identity in it (`machine_identity`) before anything is said."""
    context = client_context(certificate_file, key_file, authority_file)
    context.check_hostname = False
    return context


def pinned_context(certificate: bytes) -> ssl.SSLContext:
    """For enrolling: trusts exactly this one certificate (DER), whatever name it bears."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=certificate)
    return context


def unverified_context() -> ssl.SSLContext:
    """Only for looking at a certificate whose fingerprint is then compared; nothing is ever said over it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


# ---- parts ---------------------------------------------------------------------------------------------------------


def _load(load: object, *files: str) -> None:
    assert callable(load)
    try:
        load(*files)
    except ssl.SSLError as error:
        raise IntegrityError(f"{_either(files)}: cannot be used for TLS ({error.reason or error})") from None
    except OSError as error:
        raise IntegrityError(f"{_either(files)}: cannot be read ({error.strerror})") from None


def _either(files: tuple[str, ...]) -> str:
    return " or ".join(dict.fromkeys(files))


def _sign(
    authority: Credential,
    public_key: ec.EllipticCurvePublicKey,
    common_name: str,
    names: list[x509.GeneralName],
    now_ns: int,
    days: int,
    *,
    server: bool,
) -> x509.Certificate:
    signer = load_pem_private_key(authority.key, None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    uses = [ExtendedKeyUsageOID.SERVER_AUTH]
    if not server:  # a machine is a client of its store, and either among the members of a group
        uses.append(ExtendedKeyUsageOID.CLIENT_AUTH)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    return (
        _builder(subject, issuer.subject, public_key, now_ns, days, end=issuer.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, SHA256())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now_ns: int,
    days: int,
    end: datetime | None = None,
) -> x509.CertificateBuilder:
    now = datetime.fromtimestamp(now_ns // 1_000_000_000, UTC)
    not_after = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(min(not_after, end) if end else not_after)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
