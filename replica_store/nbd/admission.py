"""Who may use what is exported over NBD, and the certificates for it.

In the clear the server listens on this machine alone. Over TLS a client shows a certificate of the vault's authority:
one made for this machine's disks (`write_credentials`), or the machine's own, while it is the one that is good. Another
machine of the same vault is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address

from asrfs.errors import AuthenticationError, BadInputError
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import write_atomically
from asrfs.transport.tls import machine_identity, make_nbd_client, nbd_machine_id, server_context
from replica_store.nbd.server import TlsTerms
from replica_store.vault.vault import Vault

CREDENTIAL_FILES = ("ca-cert.pem", "client-cert.pem", "client-key.pem")
"""As QEMU and libnbd look for them."""


def check_address(host: str) -> None:
    """Raise BadInputError unless disks may be shown at `host` in the clear."""
    try:
        is_own = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        is_own = False
    if not is_own:
        raise BadInputError(f"{host or 'every address'} can be reached from elsewhere: add --tls, or leave --host away")


def tls_terms(vault: Vault, machine_id: str) -> TlsTerms:
    """TLS with the vault's server certificate, for clients who may use this machine's disks."""
    keys = vault.keys
    context = server_context(keys.path("server.crt"), keys.path("server.key"), keys.path("ca.crt"))

    def good_serial() -> str | None:
        row = vault.catalog.machine_by_id(machine_id)
        return None if row is None or row.revoked else row.serial

    return TlsTerms(context, admission(machine_id, good_serial))


def admission(machine_id: str, good_serial: Callable[[], str | None]) -> Callable[[bytes], None]:
    """A check of certificates (DER). `good_serial`: of the machine's own certificate, None while none is good."""

    def admit(certificate: bytes) -> None:
        if nbd_machine_id(certificate) == machine_id:
            return
        identity = machine_identity(certificate)
        if identity.machine_id != machine_id or identity.serial != good_serial():
            raise AuthenticationError(f"the certificate of {identity.name!r} is not good for the disks of this machine")

    return admit


def write_credentials(vault: Vault, machine_id: str, directory: str, now_ns: int) -> None:
    """Put a new client's key and certificate into `directory`, durable; those before stay good for their week."""
    authority = vault.keys.authority()
    client = make_nbd_client(authority, machine_id, now_ns)
    storage = DirectoryStorage(directory)
    contents = (authority.certificate, client.certificate, client.key)
    for name, content in zip(CREDENTIAL_FILES, contents, strict=True):
        write_atomically(storage, name, content)
