"""Who may say what: certificates, replay, splices, names, and what a certificate of a host opens.

The store is the real process; the peers are as hostile as a certificate that is good, was good, or never was allows.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import msgspec
import pytest
import trio
from starlette.routing import Route

from asrfs.errors import AuthenticationError
from asrfs.protocol.frames import FrameType
from asrfs.protocol.messages import Acknowledge, Goodbye, Heartbeat, Refused, Welcome, encode_message
from asrfs.protocol.session import TABLE
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.enrolment import (
    ENROL_PATH,
    HEALTH_PATH,
    ApiFailure,
    Token,
    encode_token,
    fetch_certificate,
)
from asrfs.transport.stream import LinkError, connect, parse_address
from asrfs.transport.tls import (
    MACHINE_DAYS,
    fingerprint,
    make_authority,
    make_key_and_request,
    make_server,
    manage_context,
    pinned_context,
    sign_request,
    unverified_context,
)
from replica_store.api.app import make_app
from replica_store.vault.vault import Vault
from tests.fakes.scripted_host import BuiltObject, HostEnd, HostHistory
from tests.t5_system.machine import HostUnderTest
from tests.t5_system.raw_client import RawClient
from tests.t5_system.store import Enrolled, StoreUnderTest
from tests.waiting import wait_until

CUT_S_MAX = 10.0
DAY_NS = 86_400 * 1_000_000_000
HOST_SAYS = {
    *("HELLO", "OBJECT_BEGIN", "OBJECT_BYTES", "HEARTBEAT", "GOODBYE"),
    *("COMPARE", "MATCH", "HANDED_OVER", "PROMOTED", "FETCH"),
}
OPEN_PATHS = {("POST", ENROL_PATH), ("GET", HEALTH_PATH), ("HEAD", HEALTH_PATH)}
TRIED_NAMES = {"machine": "web1", "name": "web1", "id": "1", "point": "noon", "disk": "root"}
"""What stands for the parameters of a path that exists."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
PATHS = (
    *(ENROL_PATH, HEALTH_PATH, "/", "/api", "/api/v1", "/api/v1/", "/api/v2/enroll", "/docs", "/openapi.json"),
    *(f"/api/v1/{noun}" for noun in ("machines", "points", "groups", "policies", "failovers", "plans", "tokens")),
    *(f"/api/v1/{noun}" for noun in ("export", "events", "jobs", "audit", "verify", "rebuild", "prune", "settings")),
    *("/api/v1/machines/web1", "/api/v1/machines/web1/points", "/api/v1/machines/web1/revoke", "/api/v1/points/1"),
    *("/api/v1/../enroll", "//api/v1/machines", "/api/v1/enroll/../machines", "/api/v1/%2e%2e/keys/ca.key"),
    *("/keys/ca.key", "/../../keys/master.key", "/static/../vault.json", "/api/v1/enroll%00", "/api/v1/health;x"),
)


@pytest.fixture
def store(scratch: Path) -> Iterator[StoreUnderTest]:
    """A vault that is served."""
    store = StoreUnderTest(scratch)
    store.ask("init", "--name", "site-b")
    store.serve()
    try:
        yield store
    finally:
        store.close()


def raw(machine: Enrolled) -> RawClient:
    return RawClient(machine.context(), machine.store.data, machine.server_name)


def with_history(machine: Enrolled, writes: int = 6) -> Enrolled:
    machine.history.disk(0)
    for _ in range(writes):
        machine.history.write()
    return machine


def stored(store: StoreUnderTest, machine: Enrolled) -> list[Path]:
    return sorted((store.path / "objects" / "machines" / machine.history.machine_id).rglob("log/*.obj"))


def welcomed(machine: Enrolled) -> tuple[RawClient, Welcome]:
    client = raw(machine)
    welcome = client.greet(machine.history)
    assert isinstance(welcome, Welcome), welcome
    return client, welcome


# ---- what a host's certificate opens -------------------------------------------------------------------------------


def test_a_host_may_append_and_nothing_else() -> None:
    """No word of the protocol lets a host delete, shorten or change the time of anything: COMPARE, MATCH
    and FETCH ask, HANDED_OVER and PROMOTED answer."""
    said = {speaks.type.name for following in TABLE.values() for speaks in following if speaks.role == "host"}
    assert said == HOST_SAYS


def test_every_frame_type_with_a_host_certificate(store: StoreUnderTest) -> None:
    machine = with_history(store.enrol("web1"))
    message = encode_message(machine.history.hello())  # of another type it says too little, or nothing that is allowed
    for code in (0, *FrameType, max(FrameType) + 1, 127, 128, 255):
        for payload in (b"", message):
            client, _ = welcomed(machine)
            client.header(code, len(payload))
            client.connection.sendall(payload)
            if (code, payload) == (FrameType.HEARTBEAT, message):
                client.frame(FrameType.GOODBYE, encode_message(Goodbye(reason="done")))
            assert client.last_word() is None, f"type {code}: closed without a word"
            client.close()
    assert stored(store, machine) == []


def existing_paths(store: StoreUnderTest) -> dict[str, set[str]]:
    """Every path that the API has, from the API itself: one that is added later cannot be forgotten here."""
    with Vault.open(str(store.path)) as vault:
        routes = make_app(vault, SystemClock(), 0, trio.CapacityLimiter(1)).routes
    found: dict[str, set[str]] = {}
    for route in routes:
        assert isinstance(route, Route), f"{route!r}: of another kind than this test looks at"
        path = re.sub(r"\{(\w+)[^}]*\}", lambda parameter: TRIED_NAMES[parameter[1]], route.path)
        found.setdefault(path, set()).update(route.methods or set())
    return found


def test_every_path_and_method_with_a_host_certificate(store: StoreUnderTest) -> None:
    machine = store.enrol("web1")
    host, port = parse_address(store.manage, 443)
    context = pinned_context(fetch_certificate(host, port))
    context.load_cert_chain(str(machine.files / "machine"))
    before = store.ask("machine", "list")
    opened = set()
    existing = existing_paths(store)
    assert {(method, path) for path, methods in existing.items() for method in methods} >= OPEN_PATHS
    for path in dict.fromkeys((*existing, *PATHS)):
        for method in dict.fromkeys((*METHODS, *existing.get(path, ()))):
            connection = http.client.HTTPSConnection(host, port, context=context, timeout=20)
            connection.request(method, path, b"{}")
            response = connection.getresponse()
            body = response.read()
            connection.close()
            if response.status in (200, 400):
                opened.add((method, path))
            else:
                assert response.status in (404, 405), f"{method} {path}: {response.status} {body!r}"
                assert method == "HEAD" or msgspec.json.decode(body, type=ApiFailure).exit_code == 3
            assert b"PRIVATE" not in body and b"BEGIN" not in body
    assert opened == OPEN_PATHS, "only the allow-list, whatever certificate is shown"
    assert store.ask("machine", "list") == before


# ---- replay and splice ---------------------------------------------------------------------------------------------


def test_captured_frames_said_again_add_nothing(store: StoreUnderTest) -> None:
    machine = with_history(store.enrol("web1"))
    client, welcome = welcomed(machine)
    captured = machine.history.build(1, 4, welcome.session_salt)
    client.ship(captured)
    assert isinstance(client.hear(), Acknowledge)
    client.ship(captured)  # once more in the same session
    refused = client.last_word()
    assert isinstance(refused, Acknowledge) or (isinstance(refused, Refused) and refused.code == "corrupt"), refused
    client.close()
    before = stored(store, machine)
    assert len(before) == 1
    for sequence in (None, 0, 1):
        client, _ = welcomed(machine)
        if sequence is not None:  # the very bytes, with the numbers they had
            client.sequence = sequence
        client.ship(captured)
        refused = client.last_word()
        assert refused is None or (isinstance(refused, Refused) and refused.code == "corrupt"), refused
        client.close()
    assert stored(store, machine) == before
    assert store.ask("verify")["damages"] == []


def test_objects_of_other_machines_sessions_and_epochs_are_refused(store: StoreUnderTest) -> None:
    web, db = with_history(store.enrol("web1", 1)), with_history(store.enrol("db1", 2))
    theirs, welcome = welcomed(web)
    captured = web.history.build(1, 4, welcome.session_salt)
    theirs.close()

    attacks: dict[str, tuple[Callable[[bytes], BuiltObject], str]] = {
        "of another machine": (lambda salt: captured, "corrupt"),
        "sealed in another session": (lambda salt: db.history.build(1, 4, bytes(32)), "corrupt"),
        "of an older epoch": (lambda salt: db.history.build(1, 4, salt, epoch=0), "fenced"),
        "of an epoch to come": (lambda salt: db.history.build(1, 4, salt, epoch=2), "state"),
        "that continues another history": (lambda salt: db.history.build(1, 4, salt, b"x" * 32), "corrupt"),
        "under another's name": (lambda salt: spliced(db.history, web.history, salt), "corrupt"),
    }
    for what, (build, code) in attacks.items():
        client, welcome = welcomed(db)
        client.ship(build(welcome.session_salt))
        refused = client.last_word()
        assert isinstance(refused, Refused) and refused.code == code, f"{what}: {refused}"
        client.close()
    assert stored(store, db) == stored(store, web) == []


def spliced(ours: HostHistory, theirs: HostHistory, salt: bytes) -> BuiltObject:
    """Records of one machine sealed with its keys under the header of another: the seal binds them together."""
    return theirs.build(1, 4, salt, machine_id=ours.machine_id)


# ---- certificates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made_days_ago", "word"), [(MACHINE_DAYS + 1, "expired"), (-30, "not yet valid")], ids=["expired", "to come"]
)
async def test_a_certificate_out_of_its_time_is_refused(store: StoreUnderTest, made_days_ago: int, word: str) -> None:
    machine = with_history(store.enrol("web1"))
    key, request = make_key_and_request("web1", machine.history.machine_id)
    made_ns = SystemClock().time_ns() - made_days_ago * DAY_NS
    with Vault.open(str(store.path), writable=True) as vault:
        pem, identity = sign_request(vault.keys.authority(), request, "web1", machine.history.machine_id, made_ns)
        with vault.catalog.transaction():  # as if it had been good once
            vault.catalog.put_machine(replace(vault.machine("web1"), serial=identity.serial))
    (machine.files / "machine").write_bytes(key + pem)
    with pytest.raises((AuthenticationError, LinkError)):
        stream = await machine.connect()
        try:
            await HostEnd(stream).greet(machine.history.hello())
        finally:
            await stream.aclose()
    wait_until(lambda: "level=warning" in store.log(), what="the store's word on it")
    assert word in store.log(), store.log()
    assert stored(store, machine) == []


@pytest.mark.parametrize("how", ["revoked", "enrolled again"])
def test_a_certificate_that_is_revoked_while_connected_is_cut(store: StoreUnderTest, how: str) -> None:
    machine = with_history(store.enrol("web1"))
    client, welcome = welcomed(machine)
    client.ship(machine.history.build(1, 2, welcome.session_salt))
    assert isinstance(client.hear(), Acknowledge)
    if how == "revoked":
        planned = store.run("machine", "revoke", "web1")
        assert planned.returncode == 2 and "repeat with --yes" in planned.stderr, planned.stderr
        assert store.run("machine", "revoke", "web1", "--yes").returncode == 0
    else:
        store.enrol("web1")
    begun = time.monotonic()
    refused = client.last_word()
    assert time.monotonic() - begun <= CUT_S_MAX
    assert isinstance(refused, Refused) and refused.code == "authentication", refused
    client.close()
    client = raw(machine)
    refused = client.greet(machine.history)
    assert isinstance(refused, Refused) and refused.code == "authentication", refused
    client.close()
    assert len(stored(store, machine)) == 1


class Listening:
    """The store's own certificate on a port that speaks one version of TLS: what it heard, or why it heard nothing."""

    def __init__(self, store: StoreUnderTest, version: ssl.TLSVersion) -> None:
        keys = store.path / "keys"
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(str(keys / "server.crt"), str(keys / "server.key"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self._context.minimum_version = self._context.maximum_version = version
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._run)
        self.port = int(self._socket.getsockname()[1])
        self.heard: list[bytes] = []
        self.refusals: list[str] = []

    def __enter__(self) -> Listening:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes who accepts
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while True:
            try:
                plain, _ = self._socket.accept()
            except OSError:
                return
            plain.settimeout(20)
            try:
                with self._context.wrap_socket(plain, server_side=True) as connection:
                    self.heard.append(connection.recv(65536))
            except OSError as error:
                self.refusals.append(str(error))


def ways_to_the_store(machine: Enrolled, certificate: bytes) -> dict[str, ssl.SSLContext]:
    """The contexts with which a host ever dials: for data; with a token, after and before it has seen who answers."""
    return {"data": machine.context(), "pinned": pinned_context(certificate), "look": unverified_context()}


async def test_a_host_speaks_to_no_store_below_tls_1_3(store: StoreUnderTest) -> None:
    """The store's own key and name, nothing wrong with it but the version: the host ends it before it says a word."""
    machine = store.enrol("web1")
    certificate = fetch_certificate(*parse_address(store.manage, 443))
    versions = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
    for (way, context), version in product(ways_to_the_store(machine, certificate).items(), versions):
        with Listening(store, version) as old:
            is_refused = False
            try:
                stream = await connect("127.0.0.1", old.port, context, machine.server_name)
                with contextlib.suppress(LinkError):
                    await stream.aclose()
            except (AuthenticationError, LinkError):
                is_refused = True
        is_old = version == ssl.TLSVersion.TLSv1_2
        assert is_refused == is_old, f"{way}: {version.name}"
        assert len(old.refusals if is_old else old.heard) == 1, f"{way}: {version.name}: {old.refusals} {old.heard}"
        if is_old:
            assert "protocol" in old.refusals[0].lower(), old.refusals


def test_a_host_enrols_at_no_store_below_tls_1_3(store: StoreUnderTest, scratch: Path) -> None:
    host = HostUnderTest(scratch)
    host.init()
    with Listening(store, ssl.TLSVersion.TLSv1_2) as old:
        done = host.run("enroll", "--store", f"127.0.0.1:{old.port}", "--token", store.token("web1"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert old.heard == [] and "protocol" in old.refusals[0].lower(), (old.heard, old.refusals)
    assert list((host.path / "keys").iterdir()) == []


# ---- a store that lies -----------------------------------------------------------------------------------------------


def answer_without_end(listening: socket.socket, context: ssl.SSLContext) -> None:
    """Two connections: the look at the certificate, and the request."""
    for _ in range(2):
        plain, _ = listening.accept()
        with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as connection:
            connection.settimeout(20)
            if connection.recv(65536):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n")
                while True:
                    connection.sendall(bytes(1 << 16))


def test_a_store_that_answers_without_end_is_not_listened_to(scratch: Path) -> None:
    host = HostUnderTest(scratch)
    host.init()
    now_ns = SystemClock().time_ns()
    server = make_server(make_authority("b", now_ns), "b", now_ns)
    for name, content in (("key", server.key), ("crt", server.certificate)):
        (scratch / name).write_bytes(content)
    token = encode_token(Token(machine="web1", secret=bytes(32), fingerprint=fingerprint(server.certificate)))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        context = manage_context(str(scratch / "crt"), str(scratch / "key"))
        lying = threading.Thread(target=answer_without_end, args=(listening, context))
        lying.start()
        done = host.run("enroll", "--store", f"127.0.0.1:{listening.getsockname()[1]}", "--token", token)
        lying.join()
    assert done.returncode == 5 and "longer than" in done.stderr, done.stderr
    assert list((host.path / "keys").iterdir()) == []


# ---- what a host says of itself -------------------------------------------------------------------------------------


def test_what_a_host_says_of_itself_makes_no_line_of_the_log(store: StoreUnderTest) -> None:
    machine = with_history(store.enrol("web1"))
    forged = 'x\ntimestamp=2026-01-01 level=critical event="all is lost"\x1b[2J'
    client = raw(machine)
    refused = client.greet(machine.history, machine_id=forged, machine_name=forged)
    assert isinstance(refused, Refused)
    assert "\n" not in refused.text
    client.close()
    for numbers in ({"appended_lsn": 1 << 63}, {"durable_lsn": (1 << 64) - 1}, {"durable_time_ns": -1}):
        client, _ = welcomed(machine)
        client.say(Heartbeat(**numbers))
        assert client.last_word() is None, "a number that no catalog holds is no message"
        client.close()
    client, _ = welcomed(machine)
    client.frame(FrameType.GOODBYE, encode_message(Goodbye(reason=forged)))
    with contextlib.suppress(ConnectionError):
        assert client.last_word() is None
    client.close()
    assert store.stop() == 0
    lines = store.log().splitlines()
    assert any("said goodbye" in line for line in lines)
    assert all(line.startswith("timestamp=") for line in lines), store.log()
    assert not any(line.startswith("timestamp=2026-01-01") or "\x1b" in line for line in lines)
