"""The store as a process: enrolment, who is let in, SIGKILL during ingest, verify, rebuild, a full disk."""

from __future__ import annotations

import os
import random
import signal
import socket
import sqlite3
import ssl
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from asrfs.errors import AuthenticationError, TemporaryError
from asrfs.format.log_object import NO_DIGEST
from asrfs.protocol.messages import Acknowledge, Heartbeat, Refused, Welcome
from asrfs.transport.enrolment import (
    ENROL_PATH,
    ApiFailure,
    EnrolRequest,
    decode_token,
    encode_base64url,
    encode_token,
)
from asrfs.transport.stream import LinkError, parse_address
from asrfs.transport.tls import make_key_and_request
from replica_store.vault.schema import REBUILDABLE
from replica_store.vault.vault import Vault
from tests.fakes.scripted_host import HostEnd, HostHistory
from tests.t5_system.machine import HostUnderTest
from tests.t5_system.store import Enrolled, StoreUnderTest


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


async def ship(machine: Enrolled, records_each: int = 4) -> int:
    """Ship what the store has not got; the LSN acknowledged last. An error of the link ends it."""
    history = machine.history
    acknowledged = 0
    stream = None
    try:
        host = await machine.end()
        stream = host.stream
        welcome = await host.greet(history.hello())
        assert isinstance(welcome, Welcome), welcome
        acknowledged = welcome.acknowledged_lsn
        digest = bytes.fromhex(welcome.last_digest) or NO_DIGEST
        for first in range(welcome.acknowledged_lsn + 1, history.last_lsn + 1, records_each):
            built = history.build(first, min(first + records_each - 1, history.last_lsn), host.salt, digest)
            digest = built.digest
            await host.ship(built)
            event = await host.hear_except(Heartbeat)
            if event is None:
                raise LinkError("the store closed the connection")
            assert event == Acknowledge(lsn=built.begin.last_lsn, digest=digest.hex()), event
            acknowledged = built.begin.last_lsn
    except TemporaryError:
        pass
    finally:
        if stream is not None:
            await stream.aclose()
    return acknowledged


def fill(history: HostHistory, writes: int) -> None:
    if not history.records:
        history.disk(0)
    for _ in range(writes):
        history.write(random.Random(history.last_lsn).choice((1, 3, 16)))


def tables(path: Path) -> dict[str, object]:
    with Vault.open(str(path)) as vault:
        return {name: vault.catalog.table(name) for name in REBUILDABLE}


async def test_a_machine_enrols_ships_and_is_seen(store: StoreUnderTest) -> None:
    machine = store.enrol("web1")
    fill(machine.history, 20)
    point = machine.history.marker("noon")
    assert await ship(machine) == machine.history.last_lsn
    (shown,) = store.ask("machine", "list")
    assert (shown["machine"], shown["state"], shown["acknowledged_lsn"]) == ("web1", "protected", point)
    assert shown["disks"][0]["name"] == "disk0"
    assert shown["achieved_rpo_seconds"] >= 0
    assert [(each["name"], each["lsn"]) for each in store.ask("point", "list", "web1")] == [("noon", point)]
    assert store.ask("verify", "web1")["damages"] == []
    assert store.ask("machine", "show", "web1")["points"] == 1
    assert "web1" in store.run("machine", "list").stdout
    assert store.stop() == 0, store.log()
    assert store.log().count("level=error") == 0


async def test_i3_sigkill_during_ingest_loses_nothing_that_was_acknowledged(
    store: StoreUnderTest, rng: random.Random
) -> None:
    machine = store.enrol("web1")
    fill(machine.history, 600)
    acknowledged = 0
    for number in range(60):
        if number >= 6 and acknowledged:
            break
        with trio.move_on_after(20):
            async with trio.open_nursery() as nursery:

                async def kill_soon() -> None:
                    await trio.sleep(rng.uniform(0.05, 0.25))  # sleep: the instant of a power cut is nobody's event
                    store.stop(signal.SIGKILL)

                nursery.start_soon(kill_soon)
                acknowledged = max(acknowledged, await ship(machine, 3))
        with Vault.open(str(store.path)) as vault:
            assert vault.received_lsn(machine.history.machine_id) >= acknowledged, "I3"
        store.serve()
    assert acknowledged > 0
    assert await ship(machine, 50) == machine.history.last_lsn
    scrubbed = store.ask("verify")
    assert scrubbed["damages"] == []
    assert scrubbed["uncatalogued"] == []
    assert store.stop() == 0
    before = tables(store.path)
    rebuilt = store.ask("rebuild")
    assert (rebuilt["damages"], rebuilt["left_out"]) == ([], 0)
    assert tables(store.path) == before


async def test_rebuild_makes_an_equal_catalog_and_the_history_goes_on(store: StoreUnderTest) -> None:
    machine, other = store.enrol("web1", 1), store.enrol("db1", 2)
    for each in (machine, other):
        fill(each.history, 30)
        each.history.marker("one")
        each.history.disk(1, gap=True)
        each.history.marker("inside")
        each.history.disk(1)
        assert await ship(each) == each.history.last_lsn
    store.enrol("web1", 1)  # again: another certificate, the same keys
    assert store.run("rebuild").returncode == 4, "not while it serves"
    assert store.stop() == 0
    before = tables(store.path)
    for damage in ("none", "gone", "scribbled"):
        catalog = store.path / "catalog.sqlite3"
        if damage == "gone":
            for path in store.path.glob("catalog.sqlite3*"):
                path.unlink()
            missing = store.run("machine", "list")
            assert missing.returncode == 5
            assert "rebuild" in missing.stderr
        if damage == "scribbled":
            catalog.write_bytes(random.Random(1).randbytes(50_000))
            corrupt = store.run("machine", "list")
            assert corrupt.returncode == 5
            assert str(catalog) in corrupt.stderr and "rebuild" in corrupt.stderr
        assert store.ask("rebuild")["objects"] > 10
        assert tables(store.path) == before
    store.serve()
    fill(other.history, 10)
    assert await ship(other) == other.history.last_lsn
    assert store.ask("verify")["damages"] == []
    assert [each["name"] for each in store.ask("point", "list", "db1")] == ["one"]


async def test_verify_names_file_offset_and_lsn_of_a_flipped_bit(store: StoreUnderTest, rng: random.Random) -> None:
    machine = store.enrol("web1")
    fill(machine.history, 60)
    point = machine.history.marker("late")
    await ship(machine, 7)
    with Vault.open(str(store.path)) as vault:
        rows = vault.objects_of(machine.history.machine_id, machine.history.last_lsn)
    row = rows[3]
    path = store.path / "objects" / row.name
    whole = path.read_bytes()
    for _ in range(4):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        done = store.run("--json", "verify", "web1")
        assert done.returncode == 5, f"a bit at {at}"
        (damage,) = msgspec.json.decode(done.stdout)["damages"]
        assert damage["file"] == str(path)
        assert damage["offset"] <= at
        assert row.first_lsn <= damage["first_lsn"] <= damage["last_lsn"] <= row.last_lsn
        assert damage["points"] == ["late"]
        assert str(path) in done.stderr and f"at byte {damage['offset']}" in done.stderr and "LSN" in done.stderr
    path.unlink()
    assert "missing" in store.run("verify").stderr
    path.write_bytes(whole[:-5])
    assert store.run("verify").returncode == 5
    path.write_bytes(whole)
    assert store.ask("verify")["damages"] == []
    assert point == machine.history.last_lsn


# ---- who is let in -------------------------------------------------------------------------------------------------


def test_tokens_are_for_one_machine_once_and_for_a_while(store: StoreUnderTest, scratch: Path) -> None:
    """By the host's command where it decides, by the API where a host that lies would."""
    host = HostUnderTest(make(scratch, "web1"))
    host.asrfs("init", "web1")

    def enrol(enrolling: HostUnderTest, token: str) -> tuple[int, str]:
        done = enrolling.run("enroll", "--store", store.manage, "--token", token)
        return done.returncode, done.stderr

    def say(machine: str, secret: bytes) -> tuple[int, str]:
        _, request = make_key_and_request(machine, "9" * 32)
        wanted = EnrolRequest(
            secret=encode_base64url(secret), machine=machine, machine_id="9" * 32, csr=request.decode()
        )
        status, body = store.post(ENROL_PATH, msgspec.json.encode(wanted))
        return status, body.decode()

    printed = store.run("token", "web1").stdout
    assert printed.startswith("asrfs1.") and printed.count("\n") == 1
    token = decode_token(printed)
    code, text = enrol(host, encode_token(msgspec.structs.replace(token, fingerprint=bytes(32))))
    assert (code, "not the one the token was made for" in text) == (6, True), text
    assert say("web1", bytes(32))[0] == 401, "not one of this store"
    assert say("db1", token.secret)[0] == 401, "stolen from another machine"
    status, text = say("web1", decode_token(store.token("web1", "--expires", "1ms")).secret)
    assert (status, "has expired" in text) == (401, True)
    assert enrol(host, printed)[0] == 0, "nothing of that used it up"
    code, text = enrol(host, printed)
    assert (code, "has been used" in text) == (6, True), text
    assert enrol(host, store.token("web1")) == (0, ""), "again, with a new token"
    status, text = say("web1", decode_token(store.token("web1")).secret)
    assert (status, "another machine named web1" in text) == (409, True), text
    assert [each["machine"] for each in store.ask("machine", "list")] == ["web1"]


def make(scratch: Path, name: str) -> Path:
    (scratch / f"host-{name}").mkdir()
    return scratch / f"host-{name}"


def test_requests_that_make_no_sense_are_refused_in_one_line(store: StoreUnderTest) -> None:
    secret = encode_base64url(decode_token(store.token("web1")).secret)
    _, request = make_key_and_request("web1", "1" * 32)
    good = EnrolRequest(secret=secret, machine="web1", machine_id="1" * 32, csr=request.decode())
    bad = [
        (b"", 400),
        (b"[" * 5000, 400),
        (b"x" * (1 << 17), 400),
        (b"x" * 1_000_000, 400),  # more than sockets hold: whoever says all of it first reads the answer all the same
        (msgspec.json.encode(msgspec.structs.replace(good, secret="!")), 400),
        (msgspec.json.encode(msgspec.structs.replace(good, secret="AAAA")), 401),
        (msgspec.json.encode(msgspec.structs.replace(good, machine="../x")), 400),
        (msgspec.json.encode(msgspec.structs.replace(good, machine_id="x")), 400),
        (msgspec.json.encode(msgspec.structs.replace(good, csr="x")), 400),
    ]
    for body, status in bad:
        answered, text = store.post(ENROL_PATH, body)
        assert answered == status, text
        assert "\n" not in msgspec.json.decode(text, type=ApiFailure).error
    assert store.post("/api/v1/nothing", b"")[0] == 404
    assert store.post(ENROL_PATH, msgspec.json.encode(good))[0] == 200, "a bad request does not use a token up"


async def test_a_certificate_of_another_authority_is_refused_by_both_sides(
    store: StoreUnderTest, scratch: Path
) -> None:
    machine = store.enrol("web1")
    other_scratch = scratch / "other"
    other_scratch.mkdir()
    other = StoreUnderTest(other_scratch)
    other.ask("init")
    other.serve()
    try:
        foreign = other.enrol("web1")
    finally:
        other.close()
    theirs = foreign.context()
    theirs.load_verify_locations(str(machine.files / "ca"))  # it would trust this store, and is not trusted by it
    stream = await machine.connect(theirs)
    with pytest.raises(AuthenticationError):
        await HostEnd(stream).greet(machine.history.hello())
    await stream.aclose()
    with pytest.raises(AuthenticationError):
        await machine.connect(foreign.context())
    impostor = Enrolled(store, machine.history, machine.files, "somebody.store.asrfs")
    with pytest.raises(AuthenticationError):
        await impostor.connect()
    fill(machine.history, 3)
    assert await ship(machine) == machine.history.last_lsn, "others are served as before"


async def test_a_certificate_of_another_machine_is_refused_before_any_payload(store: StoreUnderTest) -> None:
    web, db = store.enrol("web1", 1), store.enrol("db1", 2)
    fill(web.history, 3)
    host = await db.end()
    refused = await host.greet(web.history.hello())
    assert isinstance(refused, Refused)
    assert refused.code == "authentication"
    await host.stream.aclose()
    assert {each["acknowledged_lsn"] for each in store.ask("machine", "list")} == {0}
    again = store.enrol("web1", 1)
    host = await web.end()
    refused = await host.greet(web.history.hello())
    assert isinstance(refused, Refused)
    assert refused.code == "authentication", "superseded by the newer one"
    await host.stream.aclose()
    again.history.records = web.history.records
    assert await ship(again) == web.history.last_lsn


@pytest.mark.parametrize("port", ["data", "manage"])
def test_tls_below_1_3_and_clients_without_certificate_are_refused(store: StoreUnderTest, port: str) -> None:
    host, number = parse_address(getattr(store, port), 0)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, number), timeout=10) as connection, pytest.raises((ssl.SSLError, OSError)):
        old.wrap_socket(connection)
    if port == "data":
        bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
        with (
            socket.create_connection((host, number), timeout=10) as connection,
            bare.wrap_socket(connection) as secured,
            pytest.raises((ssl.SSLError, OSError)),
        ):
            assert secured.recv(1) == b"something", "closed without a word"
    with socket.create_connection((host, number), timeout=10) as connection:
        connection.sendall(b"\x00\xff" * 2000)
        connection.settimeout(10)
        try:
            while connection.recv(4096):
                pass
        except ConnectionError:
            pass
    assert store.process is not None
    assert store.process.poll() is None


# ---- the vault -----------------------------------------------------------------------------------------------------


async def test_a_full_vault_acknowledges_nothing_and_goes_on_when_space_returns(scratch: Path) -> None:
    store = StoreUnderTest(scratch)
    store.path.mkdir()
    await trio.run_process(["mount", "-t", "tmpfs", "-o", "size=6M", "asrfs-test", str(store.path)])
    ballast = store.path / "objects" / "ballast"
    try:
        store.ask("init")
        store.serve()
        machine = store.enrol("web1")
        fill(machine.history, 20)
        assert await ship(machine) == machine.history.last_lsn
        before = machine.history.last_lsn
        fill_up(ballast, spare_bytes=300 << 10)
        machine.history.write(240, offset=0)
        for _ in range(2):
            host = await machine.end()
            welcome = await host.greet(machine.history.hello())
            assert isinstance(welcome, Welcome)
            assert welcome.acknowledged_lsn == before
            digest = bytes.fromhex(welcome.last_digest)
            await host.ship(machine.history.build(before + 1, before + 1, host.salt, digest))
            refused = await host.hear_except(Heartbeat)
            assert isinstance(refused, Refused), refused
            assert refused.code == "space"
            await host.stream.aclose()
        assert store.ask("verify")["damages"] == [], "what is there stays readable"
        ballast.unlink()
        assert await ship(machine) == machine.history.last_lsn
        assert store.ask("verify")["damages"] == []
        assert store.stop() == 0
    finally:
        store.close()
        with trio.CancelScope(shield=True):
            await trio.run_process(["umount", str(store.path)])


def fill_up(ballast: Path, spare_bytes: int) -> None:
    """Leave so much space on the filesystem."""
    status = os.statvfs(ballast.parent)
    ballast.write_bytes(bytes(status.f_bavail * status.f_frsize - spare_bytes))


def test_one_serves_and_the_others_are_told(store: StoreUnderTest) -> None:
    second = store.run("serve", "--host", "127.0.0.1", "--data-port", "0", "--manage-port", "0")
    assert second.returncode == 4
    assert "being served" in second.stderr
    port = parse_address(store.data, 0)[1]
    assert store.stop(signal.SIGKILL) == -signal.SIGKILL
    store.serve()
    assert parse_address(store.data, 0)[1] == port
    assert store.stop(signal.SIGINT) == 0


def test_a_token_is_not_stored(store: StoreUnderTest) -> None:
    secret = decode_token(store.token("web1")).secret
    assert store.stop() == 0
    for path in store.path.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes(), path
    with sqlite3.connect(store.path / "catalog.sqlite3") as connection:
        assert len(connection.execute("SELECT * FROM tokens").fetchall()) == 1
    connection.close()
