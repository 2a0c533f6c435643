"""What enrolment left in `keys/`: the machine's key and certificate, the store's authority, address and data keys.

`store.json` is written last, so a machine is enrolled exactly when it is there. `machine.key` holds the key and the
certificate that belongs to it, in one file so that both are replaced at once; `machine.crt` is the certificate alone,
for people.
"""

from __future__ import annotations

import base64
import binascii
import os
from functools import partial

import msgspec

from asrfs.daemon.state import StateDirectory
from asrfs.errors import IntegrityError, NoSpaceError
from asrfs.format.log_object import KEY_BYTES
from asrfs.model.names import id_bytes
from asrfs.replication.object_builder import MachineKeys
from asrfs.replication.shipper import StoreAccess
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import read_whole, write_atomically
from asrfs.transport.enrolment import Port
from asrfs.transport.stream import connect, format_address
from asrfs.transport.tls import client_context

MACHINE_KEY_FILE = "machine.key"
MACHINE_CERTIFICATE_FILE = "machine.crt"
AUTHORITY_FILE = "ca.crt"
STORE_FILE = "store.json"


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """`store.json`. The two keys are base64 of 32 bytes."""

    store_id: str
    server_name: str
    host: str
    data_port: Port
    manage_port: Port
    payload_key: str
    index_key: str

    @property
    def data_address(self) -> str:
        return format_address(self.host, self.data_port)


def is_enrolled(state: StateDirectory) -> bool:
    return os.path.exists(os.path.join(state.keys, STORE_FILE))


def load_enrolment(state: StateDirectory) -> Enrolment | None:
    """None when the machine is not enrolled. Raises IntegrityError."""
    try:
        content = read_whole(DirectoryStorage(state.keys), STORE_FILE)
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(content, type=Enrolment)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{state.keys}/{STORE_FILE} cannot be read: {error}: remove it and enrol again") from None


def save_enrolment(
    state: StateDirectory, enrolment: Enrolment, *, key: bytes, certificate: bytes, authority: bytes
) -> None:
    """Write all of `keys/`, `store.json` last; each file is replaced atomically. Raises NoSpaceError."""
    storage = DirectoryStorage(state.keys)
    os.chmod(state.keys, 0o700)
    try:
        write_atomically(storage, MACHINE_KEY_FILE, key.rstrip() + b"\n" + certificate)
        write_atomically(storage, MACHINE_CERTIFICATE_FILE, certificate)
        write_atomically(storage, AUTHORITY_FILE, authority)
        write_atomically(storage, STORE_FILE, msgspec.json.format(msgspec.json.encode(enrolment)) + b"\n")
    except OSError as error:
        raise NoSpaceError(f"cannot write {state.keys}: {error.strerror}") from None


def certificate_of(state: StateDirectory) -> bytes:
    """The machine's certificate (PEM), empty when it is not there: tells one enrolment from the next."""
    try:
        return read_whole(DirectoryStorage(state.keys), MACHINE_CERTIFICATE_FILE)
    except FileNotFoundError:
        return b""


def store_access(state: StateDirectory, enrolment: Enrolment) -> StoreAccess:
    """The way to the store. Raises IntegrityError for keys that cannot be read."""
    key_file = os.path.join(state.keys, MACHINE_KEY_FILE)
    context = client_context(key_file, key_file, os.path.join(state.keys, AUTHORITY_FILE))
    keys = MachineKeys(
        id_bytes(state.load_machine().id),
        decode_key(enrolment.index_key, "index key"),
        decode_key(enrolment.payload_key, "payload key"),
    )
    return StoreAccess(partial(connect, enrolment.host, enrolment.data_port, context, enrolment.server_name), keys)


def decode_key(text: str, what: str) -> bytes:
    """The 32 bytes of a key. Raises IntegrityError."""
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise IntegrityError(f"the {what} from the store is not {KEY_BYTES} bytes in base64")
    return key
