"""A state directory and a vault whose small files lie on `CrashStorage`s: disks added and removed, and enrolment.

The real modules run; only the storage they open is the double's. Locks are taken on a real, otherwise empty directory.
"""

from __future__ import annotations

import base64
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from unittest import mock

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from asrfs.daemon import disks as disks_room
from asrfs.daemon import enrolment as enrolment_room
from asrfs.daemon import state as state_room
from asrfs.daemon.enrolment import Enrolment, load_enrolment, save_enrolment
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AuthenticationError, NotFoundError, RefusedError
from asrfs.model.machine import MachineConfig
from asrfs.storage.interface import Storage, read_whole
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.enrolment import EnrolReply, EnrolRequest, decode_token, encode_base64url
from asrfs.transport.tls import make_key_and_request
from replica_store.vault import rebuild as rebuild_room
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.enrolment import enrol, make_token, newest_description
from replica_store.vault.schema import REBUILDABLE
from replica_store.vault.vault import Vault
from tests.fakes.crash_storage import CrashStorage, Fate
from tests.fakes.memory_catalog import MemoryCatalog
from tests.fakes.vault_world import open_vault

MACHINE_ID = "5a" * 16
SIZE_BYTES = 8192
_DIRECTORIES = ("journal", "images", "keys", "run", "log")


@contextmanager
def on_double(root: Path, storage: CrashStorage) -> Iterator[StateDirectory]:
    """The state directory at `root`, the files of which are in `storage`."""

    def open_storage(path: str) -> Storage:
        below = os.path.relpath(path, root)
        return storage if below == "." else storage.below(below)

    for name in _DIRECTORIES:
        (root / name).mkdir(parents=True, exist_ok=True)
        storage.make_directory(name)
    rooms = (state_room, enrolment_room, disks_room)
    patches = [mock.patch.object(room, "DirectoryStorage", open_storage) for room in rooms]
    patches.append(mock.patch.object(disks_room, "tell", return_value=None))
    for patch in patches:
        patch.start()
    try:
        yield StateDirectory(str(root))
    finally:
        for patch in patches:
            patch.stop()


@dataclass(frozen=True)
class EditLook:
    """After an operation of an edit. `allowed`: what `machine.json` may be, what was acknowledged first."""

    kind: str
    name: str
    storage: CrashStorage
    allowed: tuple[MachineConfig | None, ...]


@contextmanager
def _watching(
    state: StateDirectory, storage: CrashStorage, allowed: list[MachineConfig | None], looks: list[EditLook] | None
) -> Iterator[None]:
    """Each machine is told to `allowed` before it is saved, and each operation looked at, and the end."""
    save = state.save_machine

    def tell_and_save(machine: MachineConfig) -> None:
        allowed.append(machine)
        save(machine)

    def look(kind: str, name: str) -> None:
        if looks is not None:
            looks.append(EditLook(kind, name, storage.killed(), tuple(allowed)))

    storage.after_operation = look
    try:
        with mock.patch.object(state, "save_machine", tell_and_save):
            yield
    finally:
        look("end", "")
        storage.after_operation = None


def edit_machine(root: Path, storage: CrashStorage, rng: random.Random, looks: list[EditLook] | None = None) -> None:
    """Make a machine, add disks, remove one, change a setting, add one of the same name again."""
    allowed: list[MachineConfig | None] = [None]
    with on_double(root, storage) as state, _watching(state, storage, allowed, looks):
        state.save_machine(MachineConfig(id=MACHINE_ID, name="web1"))
        for step in ("+root", "+spare", "-root", "=", "+root", "-spare"):
            del allowed[:-1]
            _edit(state, step, rng)


def _edit(state: StateDirectory, step: str, rng: random.Random) -> None:
    if step == "=":
        state.change_settings({"object_size": f"{rng.randint(1, 4)}M"})
    elif step[0] == "+":
        disks_room.add_sized(state, step[1:], SIZE_BYTES)
    else:
        disks_room.remove(state, step[1:], lambda: None)


def check_edited(
    root: Path, storage: CrashStorage, look: EditLook, rng: random.Random, again: list[EditLook] | None = None
) -> None:
    """What is found is one of those states, whole, and the same commands work again, looked at if `again` is given."""
    with on_double(root, storage) as state:
        machine = _load_settled(state, storage)
        assert machine in look.allowed, f"machine.json is {machine}, which was never written"
        if machine is not None:
            check_images(storage, machine)
        lost = storage.crash(Fate.LOST, rng)
        with on_double(root, lost) as after:
            assert _load_settled(after, lost) == machine, "what a start has found is not durable"
    with on_double(root, storage) as state, _watching(state, storage, allowed := [machine], again):
        if machine is None:
            state.save_machine(MachineConfig(id=MACHINE_ID, name="web1"))
        else:
            for disk in machine.disks:  # the same command goes on
                if disk.removed and not disk.released:
                    del allowed[:-1]
                    assert disks_room.remove(state, disk.name, lambda: None).released
        for name in ("root", "spare"):
            del allowed[:-1]
            with suppress(RefusedError):
                disks_room.add_sized(state, name, SIZE_BYTES)
    with on_double(root, storage) as state:
        machine = state.load_machine()
        assert sorted(disk.name for disk in machine.live_disks()) == ["root", "spare"]
        assert len({disk.slot for disk in machine.disks}) == len(machine.disks)
        after_loss = storage.crash(Fate.LOST, rng)
        check_images(after_loss, machine)
    with on_double(root, after_loss) as state:
        assert state.load_machine() == machine, "what was acknowledged is durable"


def _load_settled(state: StateDirectory, storage: CrashStorage) -> MachineConfig | None:
    """As every start does; looking changes nothing."""
    state.settle()
    before = storage.contents()
    try:
        machine: MachineConfig | None = state.load_machine()
    except NotFoundError:
        machine = None
    state.load_settings()
    assert storage.contents() == before, "looking changes nothing"
    return machine


def check_images(storage: CrashStorage, machine: MachineConfig) -> None:
    """I7: a disk that `machine.json` names has its image."""
    for disk in machine.disks:
        name = f"images/{disk.id}.img"
        assert storage.exists(name), f"I7: disk {disk.name} has no image"
        assert len(read_whole(storage, name)) == SIZE_BYTES


@dataclass(frozen=True)
class EnrolLook:
    """After an operation of either side. `replies`: those that were given; `done`: enrolments the host had finished."""

    side: str
    kind: str
    name: str
    host: CrashStorage
    store: CrashStorage
    catalog: bytes
    replies: tuple[EnrolReply, ...]
    used: tuple[str, ...]
    done: int


class EnrolWorld:
    """Both sides of enrolment. `root` holds the vault's keys in `vault`, the host's locks in `host`."""

    def __init__(self, root: Path, host: CrashStorage, store: CrashStorage, catalog: bytes | None) -> None:
        self.root = root
        self.host = host
        self.storage = store
        self.catalog = MemoryCatalog(catalog)
        self.vault: Vault = open_vault(root / "vault", store, self.catalog)
        self.replies: list[EnrolReply] = []
        self.used: list[str] = []
        self.done = 0

    def enrol_twice(self, looks: list[EnrolLook] | None = None) -> None:
        """The second time for a new certificate."""
        with self.watching(looks):
            for _ in range(2):
                self.enrol()

    @contextmanager
    def watching(self, looks: list[EnrolLook] | None) -> Iterator[None]:
        """Each operation of both sides is looked at, and the end."""

        def look(side: str, kind: str, name: str) -> None:
            assert looks is not None
            host, store, catalog = self.host.killed(), self.storage.killed(), self.catalog.commits[-1]
            replies, used = tuple(self.replies), tuple(self.used)
            looks.append(EnrolLook(side, kind, name, host, store, catalog, replies, used, self.done))

        if looks is not None:
            self.host.after_operation = lambda kind, name: look("host", kind, name)
            self.storage.after_operation = lambda kind, name: look("store", kind, name)
            self.catalog.on_commit = lambda: look("store", "commit", "catalog")
        try:
            yield
        finally:
            if looks is not None:
                look("store", "end", "")
            self.host.after_operation = self.storage.after_operation = self.catalog.on_commit = None

    def enrol(self) -> EnrolReply:
        """A token, the store's answer, and the host's files."""
        token = make_token(self.vault, "web1", SystemClock())
        key, request = make_key_and_request("web1", MACHINE_ID)
        reply = self.ask(token, request)
        self.used.append(token)
        self.replies.append(reply)
        enrolment = Enrolment(
            store_id=reply.store_id,
            server_name=reply.server_name,
            host="store",
            data_port=reply.data_port,
            manage_port=443,
            payload_key=reply.payload_key,
            index_key=reply.index_key,
        )
        with on_double(self.root / "host", self.host) as state:
            certificate, authority = reply.certificate.encode(), reply.ca.encode()
            save_enrolment(state, enrolment, key=key, certificate=certificate, authority=authority)
        self.done += 1
        return reply

    def ask(self, token: str, request: bytes) -> EnrolReply:
        secret = encode_base64url(decode_token(token).secret)
        wanted = EnrolRequest(secret=secret, machine="web1", machine_id=MACHINE_ID, csr=request.decode())
        return enrol(self.vault, wanted, SystemClock(), 9443)

    def check(self, look: EnrolLook, again: list[EnrolLook] | None = None) -> None:
        """Enrolled means whole, a used token stays used, keys are never drawn twice, and enrolling again works.

        `again`: looks at all of that."""
        self.replies, self.used, self.done = list(look.replies), list(look.used), look.done
        found = self._check_host(look)
        row = self.vault.catalog.machine_by_id(MACHINE_ID)
        if look.replies:
            assert row is not None, "I6: the store has answered and does not know the machine"
        keys = None if row is None else self.vault.machine_keys(row)
        if found is not None:
            assert keys is not None
            assert _keys_of(found) == (keys.payload_key, keys.index_key), "the host has other keys than the store"
        first = self._start()
        killed = EnrolWorld(self.root, self.host.killed(), self.storage.killed(), self.catalog.commits[-1])
        assert killed._start() == first, "both sides start twice and find or leave something else"
        with self.watching(again):
            for token in look.used:
                try:
                    self.ask(token, make_key_and_request("web1", MACHINE_ID)[1])
                except AuthenticationError:
                    continue
                raise AssertionError("I6: a token worked twice")
            reply = self.enrol()
        if keys is not None:
            assert _keys_of(reply) == (keys.payload_key, keys.index_key), "keys were drawn a second time"
        row = self.vault.catalog.machine_by_id(MACHINE_ID)
        assert row is not None
        assert int(row.serial, 16) == x509.load_pem_x509_certificate(reply.certificate.encode()).serial_number
        rebuilt = MemoryCatalog()
        rebuild_room._fill(rebuilt, self.vault.objects, self.vault.sealer, lambda done, total: None)
        assert rebuilt.machines() == self.catalog.machines(), "I6: a rebuild finds another enrolment"

    def _start(self) -> tuple[object, ...]:
        """Both sides start: what they find, and what they leave."""
        with on_double(self.root / "host", self.host) as state:
            state.settle()
            enrolment = load_enrolment(state)
        cast(DirectoryObjects, self.vault.objects).sweep()
        description = newest_description(self.vault, MACHINE_ID)
        tables = {name: self.catalog.table(name) for name in (*REBUILDABLE, "tokens")}
        return enrolment, description, tables, self.host.contents(), self.storage.contents()

    def _check_host(self, look: EnrolLook) -> Enrolment | None:
        with on_double(self.root / "host", self.host) as state:
            found = load_enrolment(state)
            if found is None:
                assert not look.done, "the host was enrolled and is not any more"
                return None
            pem = read_whole(self.host, "keys/machine.key")
        certificate = x509.load_pem_x509_certificate(pem)
        key = load_pem_private_key(pem, None)
        assert key.public_key() == certificate.public_key(), "machine.key holds a key of another certificate"
        issued = [x509.load_pem_x509_certificate(reply.certificate.encode()) for reply in look.replies]
        assert certificate in issued
        assert read_whole(self.host, "keys/ca.crt").decode() == look.replies[0].ca
        return found


def _keys_of(said: Enrolment | EnrolReply) -> tuple[bytes, bytes]:
    return base64.b64decode(said.payload_key), base64.b64decode(said.index_key)
