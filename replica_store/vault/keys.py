"""The vault's keys: its authority and server certificate, and the master key that seals machines' keys.

keys/ca.key ca.crt            the authority; its key is read only to sign a machine's certificate
keys/server.key server.crt    shown on both ports
keys/master.key               32 bytes; without it no object of the vault can be read

Certificates are imported where they are used: reading a point needs none, and importing them takes a good part of the
time until its first byte.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from asrfs.errors import IntegrityError
from asrfs.format.log_object import KEY_BYTES
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import read_whole, write_atomically

if TYPE_CHECKING:
    from asrfs.transport.tls import Credential

_NONCE_BYTES = 12
_KEYS_TYPE = b"asrfs machine keys 1"
_DESCRIPTION_TYPE = b"asrfs machine description 1"


class MachineKeys(msgspec.Struct, frozen=True):
    """The two keys a machine's log objects are sealed with, from which each session derives its own."""

    index_key: bytes
    payload_key: bytes


class MachineDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What an object beside a machine's log says of it, so that the catalog can be made again."""

    id: str
    name: str
    epoch: int
    serial: str
    revoked: bool
    enrolled_ns: int
    generation: int
    sealed_keys: bytes


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """`keys/` of a vault."""

    directory: str

    @classmethod
    def create(cls, directory: str, vault_name: str, server_name: str, now_ns: int) -> KeyFiles:
        """Make all keys anew, durable."""
        from asrfs.transport.tls import make_authority, make_server

        authority = make_authority(vault_name, now_ns)
        server = make_server(authority, server_name, now_ns)
        storage = DirectoryStorage(directory)
        for name, content in (
            ("master.key", os.urandom(KEY_BYTES)),
            ("ca.key", authority.key),
            ("ca.crt", authority.certificate),
            ("server.key", server.key),
            ("server.crt", server.certificate),
        ):
            write_atomically(storage, name, content)
        return cls(directory)

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def read(self, name: str) -> bytes:
        """Raises IntegrityError if the file is not there."""
        try:
            return read_whole(DirectoryStorage(self.directory), name)
        except FileNotFoundError:
            raise IntegrityError(f"{self.path(name)} is missing: bring it back from a copy of the vault") from None

    def authority(self) -> Credential:
        """Raises IntegrityError."""
        return self._credential("ca")

    def server_fingerprint(self) -> bytes:
        """SHA-256 of the server certificate, which tokens carry. Raises IntegrityError."""
        from asrfs.transport.tls import fingerprint

        return fingerprint(self._credential("server").certificate)

    def check(self) -> None:
        """Raise IntegrityError if a file of keys that serving will need some day is not sound."""
        self.authority()
        self._credential("server")
        self.sealer()

    def _credential(self, name: str) -> Credential:
        from asrfs.transport.tls import Credential, check_certificate, check_key

        credential = Credential(self.read(f"{name}.key"), self.read(f"{name}.crt"))
        check_key(credential.key, self.path(f"{name}.key"))
        check_certificate(credential.certificate, self.path(f"{name}.crt"))
        return credential

    def sealer(self) -> Sealer:
        """Raises IntegrityError."""
        master = self.read("master.key")
        if len(master) != KEY_BYTES:
            raise IntegrityError(f"{self.path('master.key')} has {len(master)} bytes instead of {KEY_BYTES}")
        return Sealer(master)


class Sealer:
    """Seals with the master key: AES-256-GCM, random nonce in front, bound to kind and machine."""

    def __init__(self, master_key: bytes) -> None:
        self._cipher = AESGCM(master_key)

    def seal_keys(self, machine_id: str, keys: MachineKeys) -> bytes:
        return self._seal(_KEYS_TYPE, machine_id, msgspec.msgpack.encode(keys))

    def open_keys(self, machine_id: str, sealed: bytes) -> MachineKeys:
        """Raises IntegrityError."""
        where = f"the keys of machine {machine_id}"
        return _decode(self._open(_KEYS_TYPE, machine_id, sealed, where), MachineKeys, where)

    def seal_description(self, description: MachineDescription) -> bytes:
        return self._seal(_DESCRIPTION_TYPE, description.id, msgspec.msgpack.encode(description))

    def open_description(self, machine_id: str, sealed: bytes, where: str) -> MachineDescription:
        """Raises IntegrityError naming `where`."""
        raw = self._open(_DESCRIPTION_TYPE, machine_id, sealed, where)
        return _decode(raw, MachineDescription, where)

    def seal_book(self, kind: bytes, content: bytes) -> bytes:
        return self._seal(kind, "", content)

    def open_book(self, kind: bytes, sealed: bytes, where: str) -> bytes:
        """Raises IntegrityError naming `where`."""
        return self._open(kind, "", sealed, where)

    def _seal(self, kind: bytes, machine_id: str, content: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, content, kind + machine_id.encode())

    def _open(self, kind: bytes, machine_id: str, sealed: bytes, where: str) -> bytes:
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], kind + machine_id.encode())
        except (InvalidTag, ValueError):
            raise IntegrityError(
                f"{where}: the seal is broken, or keys/master.key is not the one it was sealed with"
            ) from None


T = TypeVar("T", MachineKeys, MachineDescription)


def _decode(raw: bytes, kind: type[T], where: str) -> T:
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except msgspec.MsgspecError as error:
        raise IntegrityError(f"{where}: cannot be read: {error}") from None
