"""Small files of both sides, enrolment in both directions, certificates and their requests."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asrfs.consistency.hooks import decode_hook
from asrfs.daemon import enroll as host_enroll
from asrfs.daemon import enrolment as host_enrolment
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError
from asrfs.format.log_object import KEY_BYTES
from asrfs.journal.recovery import recover
from asrfs.model.configuration import check_configuration
from asrfs.model.machine import decode_disk
from asrfs.model.marker import decode_marker
from asrfs.storage.system_clock import SystemClock
from asrfs.transport import tls
from asrfs.transport.enrolment import ApiFailure, EnrolReply, EnrolRequest, decode_token, encode_base64url
from replica_store.api.app import decode_request
from replica_store.vault.enrolment import enrol, make_token
from replica_store.vault.vault import Vault, describe
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.memory_objects import MemoryObjects
from tests.proof.fuzzing.mutations import Strike, as_json, as_msgpack, flip, mutate_bytes, mutate_document
from tests.proof.fuzzing.target import Target, Trial, refused
from tests.proof.fuzzing.texts import is_label

_ID = "0123456789abcdef" * 2
_POSITIONS = {
    "format": 1,
    "epoch": 1,
    "applied": {"lsn": 7, "segment": 1, "offset": 9000, "time_ns": 5},
    "acknowledged": {"lsn": 4, "segment": 1, "offset": 8192, "time_ns": 4},
    "last_digest": "ab" * 32,
}
_MACHINE = {
    "format": 1,
    "id": _ID,
    "name": "web1",
    "disks": [
        {"slot": 0, "id": "0" * 32, "name": "root", "size_bytes": 1 << 20, "adopted": None, "removed": False},
        {"slot": 1, "id": "1" * 32, "name": "db", "size_bytes": 1 << 30, "adopted": "/dev/sdx", "gap": True},
    ],
}
_STORE = {
    "store_id": "5" * 32,
    "server_name": f"{'5' * 32}.store.asrfs",
    "host": "127.0.0.1",
    "data_port": 9443,
    "manage_port": 443,
    "payload_key": base64.b64encode(bytes(KEY_BYTES)).decode(),
    "index_key": base64.b64encode(bytes(KEY_BYTES)).decode(),
}


_CONFIGURATION = {
    "generation": 5,
    "policy": "gold",
    "keys": {"crash_interval": "60s", "retention": "7d"},
    "groups": [
        {
            "id": "c" * 32,
            "name": "shop",
            "coordinator": "a" * 32,
            "members": [{"machine_id": "a" * 32, "name": "web1", "address": "10.0.0.7", "port": 20004}],
            "interval_s": 60.0,
        }
    ],
}


def broken_json(rng: random.Random, document: Any, strike: Strike) -> bytes:
    """As bytes or as a document."""
    if rng.random() < 0.3:
        good = msgspec.json.encode(document)
        return mutate_bytes(rng, good, good, strike)
    return as_json(rng, mutate_document(rng, document, strike))


# ---- the state directory ------------------------------------------------------------------------------------------


@contextmanager
def open_state(scratch: Path) -> Iterator[Trial]:
    """machine.json, settings.json, positions.json, configuration.json, keys/store.json, run/served.json."""
    state = StateDirectory.create(str(scratch / "state"), "web1")
    root = Path(state.root)

    def machine() -> None:
        known = state.load_machine()
        assert is_label(known.name) and all(is_label(disk.name) for disk in known.disks)
        assert all("/" not in disk.id for disk in known.disks)
        known.live_disks()

    def positions() -> None:
        found = state.load_positions()
        recover(CrashStorage(), found, bytes(16), segment_bytes=1 << 16)

    def settings() -> None:
        state.load_settings().quota_bytes(1 << 30, 1 << 40)

    def configuration() -> None:
        """Never refused: the store says it again, and until then there are defaults."""
        check_configuration(state.load_configuration())
        settings()

    def store() -> None:
        enrolment = host_enrolment.load_enrolment(state)
        assert enrolment is not None and enrolment.data_address
        assert 0 < enrolment.data_port < 65536, "a port nobody can dial"
        host_enrolment.decode_key(enrolment.payload_key, "payload key")

    places: list[tuple[str, Any, Callable[[], None]]] = [
        ("machine.json", _MACHINE, machine),
        ("positions.json", _POSITIONS, positions),
        ("settings.json", {"object_age": "1s", "journal_quota": "50%", "crash_interval": "5s"}, settings),
        ("configuration.json", _CONFIGURATION, configuration),
        ("keys/store.json", _STORE, store),
    ]
    for name, document, load in places:
        (root / name).write_bytes(msgspec.json.encode(document))
        load()

    def trial(rng: random.Random, strike: Strike) -> None:
        name, document, load = rng.choice(places)
        (root / name).write_bytes(broken_json(rng, document, strike))
        refused(load)

    yield trial


@contextmanager
def open_vault_file(scratch: Path) -> Iterator[Trial]:
    good = {"format": 1, "id": "5" * 32, "name": "site-b"}

    def trial(rng: random.Random, strike: Strike) -> None:
        (scratch / "vault.json").write_bytes(broken_json(rng, good, strike))
        found = refused(lambda: describe(str(scratch)))
        assert found is None or (is_label(found.name) and is_label(found.id) and len(found.id) == 32)

    yield trial


# ---- notes of records ---------------------------------------------------------------------------------------------


@contextmanager
def open_notes(_scratch: Path) -> Iterator[Trial]:
    """DISK and MARKER payloads from a host."""
    disk = {"slot": 3, "id": _ID, "name": "root", "size_bytes": 1 << 20, "removed": False, "gap": True}
    hook = {"name": "10-db", "phase": "pre", "exit_code": 1, "happened": None, "seconds": 0.5, "output": "no"}
    marker = {
        "id": _ID,
        "consistency": "crash",
        "group": "g1",
        "name": "noon",
        "hold_ms": 0.5,
        "note": "why",
        "wanted": "application",
        "failed": "hook 10-db: exit code 1",
        "freeze_ms": 1.5,
        "hooks": [hook],
        "group_point": _ID,
        "members": [_ID],
        "ready": 1,
        "unfinished": False,
        "completes": 5,
    }

    def trial(rng: random.Random, strike: Strike) -> None:
        good, decode = rng.choice(((disk, decode_disk), (marker, decode_marker)))
        if rng.random() < 0.3:
            payload = mutate_bytes(rng, msgspec.msgpack.encode(good), msgspec.msgpack.encode(disk), strike)
        else:
            payload = as_msgpack(rng, mutate_document(rng, good, strike))
        found = refused(lambda: decode(payload))  # type: ignore[operator]
        if found is not None:
            assert found == decode(msgspec.msgpack.encode(found)), "what was read says the same when written again"  # type: ignore[operator]
            assert all(is_label(name) for name in (found.name, getattr(found, "group", None)) if name is not None)

    yield trial


# ---- hooks --------------------------------------------------------------------------------------------------------


@contextmanager
def open_hook(_scratch: Path) -> Iterator[Trial]:
    """What says which program runs as root."""
    good = {"name": "db", "phase": "pre", "argv": ["/bin/true", "-x"], "order": 10, "timeout_s": 5.0}
    assert decode_hook(msgspec.json.encode(good), "db.json").order == 10

    def trial(rng: random.Random, strike: Strike) -> None:
        body = broken_json(rng, good, strike)
        hook = refused(lambda: decode_hook(body, "db.json"))
        if hook is not None:
            assert hook.name == "db" and hook.argv[0].startswith("/") and 0 < hook.timeout_s <= 3600
            assert not any("\0" in word for word in hook.argv) and 0 <= hook.order <= 9999

    yield trial


# ---- enrolment ----------------------------------------------------------------------------------------------------


@contextmanager
def open_enrol_request(scratch: Path) -> Iterator[Trial]:
    """A host that lies to the store's API: with a token that is good, or without."""
    clock = SystemClock()
    with Vault.create(str(scratch / "vault"), "site-b", clock) as vault:
        vault.catalog.select("PRAGMA synchronous = OFF")  # no crash happens here
        vault.objects = MemoryObjects()
        secret = encode_base64url(decode_token(make_token(vault, "web1", clock)).secret)
        _, csr = tls.make_key_and_request("web1", _ID)
        good = {"secret": secret, "machine": "web1", "machine_id": _ID, "csr": csr.decode()}
        der = tls.x509.load_pem_x509_csr(csr).public_bytes(tls.Encoding.DER)

        def as_pem(raw: bytes) -> str:
            text = base64.encodebytes(raw).decode()
            return f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n"

        def ask(body: bytes) -> EnrolReply:
            request = decode_request(body)
            reply = enrol(vault, request, clock, 9443)
            assert is_label(request.machine)
            with vault.catalog.transaction():  # the token is good again, the machine unknown
                vault.catalog.change("DELETE FROM machines")
                vault.catalog.change("UPDATE tokens SET used_ns = NULL")
            return reply

        assert msgspec.json.encode(ask(msgspec.json.encode(EnrolRequest(**good))))

        def trial(rng: random.Random, strike: Strike) -> None:
            vault.objects = MemoryObjects()
            if rng.random() < 0.4:
                body = msgspec.json.encode({**good, "csr": as_pem(mutate_bytes(rng, der, der, strike))})
            else:
                body = broken_json(rng, good, strike)
            reply = refused(lambda: ask(body))
            if reply is None:
                assert not vault.machines(), "a machine was made although its host was refused"

        yield trial


@contextmanager
def open_enrol_reply(scratch: Path) -> Iterator[Trial]:
    """A store that lies to a host that enrols."""
    authority = tls.make_authority("site-b", 1_700_000_000_000_000_000)
    key, csr = tls.make_key_and_request("web1", _ID)
    certificate, _ = tls.sign_request(authority, csr, "web1", _ID, 1_700_000_000_000_000_000)
    good = {
        "certificate": certificate.decode(),
        "ca": authority.certificate.decode(),
        "store_id": "5" * 32,
        "server_name": f"{'5' * 32}.store.asrfs",
        "data_port": 9443,
        "payload_key": _STORE["payload_key"],
        "index_key": _STORE["index_key"],
    }
    state = StateDirectory.create(str(scratch / "state"), "web1")
    host_enroll.decode_reply(msgspec.json.encode(good), "here")

    def trial(rng: random.Random, strike: Strike) -> None:
        if rng.random() < 0.2:
            failure = msgspec.json.encode(ApiFailure(error="no", exit_code=4))
            document = mutate_document(rng, msgspec.json.decode(failure), strike)
            with pytest.raises(AsrfsError) as raised:
                host_enroll.raise_failure("here", 500, as_json(rng, document))
            assert len(str(raised.value)) < 1000, "a store fills the terminal"
            return
        body = broken_json(rng, good, strike)
        reply = refused(lambda: host_enroll.decode_reply(body, "here"))
        if reply is None:
            return
        assert 0 < reply.data_port < 65536
        files = (reply.certificate.encode(), reply.ca.encode())
        if rng.random() < 0.02:
            enrolment = host_enrolment.Enrolment(
                store_id=reply.store_id,
                server_name=reply.server_name,
                host="127.0.0.1",
                data_port=reply.data_port,
                manage_port=443,
                payload_key=reply.payload_key,
                index_key=reply.index_key,
            )
            host_enrolment.save_enrolment(state, enrolment, key=key, certificate=files[0], authority=files[1])
            refused(lambda: host_enrolment.store_access(state, enrolment))

    yield trial


@contextmanager
def open_certificate(_scratch: Path) -> Iterator[Trial]:
    """A peer's certificate, and keys and certificates that lie in files."""
    authority = tls.make_authority("site-b", 1_700_000_000_000_000_000)
    key, csr = tls.make_key_and_request("web1", _ID)
    pem, _ = tls.sign_request(authority, csr, "web1", _ID, 1_700_000_000_000_000_000)
    der = tls.ssl.PEM_cert_to_DER_cert(pem.decode())
    assert tls.machine_identity(der).machine_id == _ID

    def trial(rng: random.Random, strike: Strike) -> None:
        chance = rng.random()
        if chance < 0.7:
            identity = refused(lambda: tls.machine_identity(mutate_bytes(rng, der, der, strike)))
            assert identity is None or is_label(identity.machine_id)
        elif chance < 0.85:
            refused(lambda: tls.check_key(mutate_bytes(rng, key, key, strike), "here"))
        else:
            refused(lambda: tls.check_certificate(mutate_bytes(rng, pem, flip(rng, pem), strike), "here"))

    yield trial


TARGETS = (
    Target("state directory", 10, open_state),
    Target("vault.json", 4, open_vault_file),
    Target("hook", 1, open_hook),
    Target("record notes", 24, open_notes),
    Target("enrolment request", 4, open_enrol_request),
    Target("enrolment reply", 12, open_enrol_reply),
    Target("certificate", 6, open_certificate),
)
