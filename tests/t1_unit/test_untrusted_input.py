"""What the other side, a file or a peer may say and must not get away with: each case was found by the level `fuzz`."""

from __future__ import annotations

import math
import ssl
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import trio

from asrfs.cli.inspect import detail
from asrfs.daemon import control
from asrfs.daemon.control_trio import AsyncControlClient, serve_control
from asrfs.daemon.disk_server_client import host_positions
from asrfs.daemon.enroll import REPLY_BYTES_MAX, decode_reply, raise_failure
from asrfs.daemon.enrolment import STORE_FILE, load_enrolment
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError, BadInputError, FormatError, IntegrityError, foreign_line
from asrfs.format.log_object import INDEX_RAW_BYTES_MAX, RECORDS_MAX
from asrfs.format.record import Kind
from asrfs.journal.recovery import recover
from asrfs.model.machine import DiskRecord
from asrfs.model.positions import Cursor, Positions
from asrfs.protocol.frames import FrameType, ProtocolError
from asrfs.protocol.messages import Acknowledge, Heartbeat, decode_message, encode_message
from asrfs.replication.reconciliation import refusal
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.system_clock import SystemClock
from asrfs.terminal.output import console, pairs
from asrfs.transport.stream import parse_address
from asrfs.transport.tls import make_authority, make_key_and_request, sign_request
from replica_store.vault.catalog import Catalog
from replica_store.vault.directory_objects import DirectoryObjects
from replica_store.vault.row_checks import checked_disk, checked_machine, checked_object
from replica_store.vault.rows import MachineRow, ObjectRow
from replica_store.vault.vault import Vault, describe
from tests.fakes.crash_storage import CrashStorage

ID = "0123456789abcdef" * 2
NOW_NS = 1_700_000_000_000_000_000


# ---- from the other side -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [-1, 1 << 63, (1 << 64) - 1])
def test_numbers_that_no_catalog_holds_are_no_message(number: int) -> None:
    """One of them in a HEARTBEAT stopped the whole store: SQLite holds 63 bits."""
    for message, frame_type in (
        (Heartbeat(appended_lsn=number), FrameType.HEARTBEAT),
        (Heartbeat(durable_time_ns=number), FrameType.HEARTBEAT),
        (Acknowledge(lsn=number, digest=""), FrameType.ACKNOWLEDGE),
    ):
        with pytest.raises(ProtocolError):
            decode_message(frame_type, encode_message(message))


def test_the_other_sides_words_are_one_bounded_printable_line() -> None:
    said = "no\n\x1b[2J" + "x" * (4 << 20)
    with pytest.raises(AsrfsError) as raised:
        raise_failure("here", 500, failure(said))
    for text in (str(refusal("busy", said)), str(raised.value)):
        assert len(text) < 600 and text.isprintable(), "it would fill status, logs and the terminal"
    assert foreign_line("a  b\tc") == "a b c"


def failure(text: str) -> bytes:
    return msgspec.json.encode({"error": text, "exit_code": 4})


def test_brackets_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    """Reasons, paths and addresses hold them: a tag that closes nothing ended `status`."""
    console().print(pairs({"reason": "the store refused: [/bold] :warning: [fe80::1]:9443"}))
    assert "[/bold] :warning: [fe80::1]:9443" in capsys.readouterr().out


def test_a_reply_to_enrolling_that_would_enrol_with_nothing_is_refused() -> None:
    authority = make_authority("site-b", NOW_NS)
    _, request = make_key_and_request("web1", ID)
    certificate, _ = sign_request(authority, request, "web1", ID, NOW_NS)
    good = {
        "certificate": certificate.decode(),
        "ca": authority.certificate.decode(),
        "store_id": ID,
        "server_name": f"{ID}.store.asrfs",
        "data_port": 9443,
        "payload_key": "",
        "index_key": "",
    }
    assert decode_reply(msgspec.json.encode(good), "here").data_port == 9443
    assert len(msgspec.json.encode(good)) < REPLY_BYTES_MAX // 4
    for changes in (
        {"data_port": 0},
        {"data_port": 65536},
        {"data_port": -1},
        {"store_id": "../x"},
        {"server_name": "somebody"},
        {"certificate": "x"},
        {"ca": ""},
    ):
        with pytest.raises(IntegrityError):
            decode_reply(msgspec.json.encode({**good, **changes}), "here")


@pytest.mark.parametrize(
    ("known", "unknown"), [("06082a8648ce3d040302", "06082a8648ce3d04037f"), ("020100300f", "020108300f")]
)
def test_a_request_for_a_certificate_of_an_unknown_algorithm_or_version_is_refused(known: str, unknown: str) -> None:
    """The library raises an error of its own kind for either."""
    _, request = make_key_and_request("web1", ID)
    der = ssl.PEM_cert_to_DER_cert(request.decode().replace("CERTIFICATE REQUEST", "CERTIFICATE"))
    assert der.count(bytes.fromhex(known)) == 1
    changed = ssl.DER_cert_to_PEM_cert(der.replace(bytes.fromhex(known), bytes.fromhex(unknown)))
    pem = changed.replace("CERTIFICATE", "CERTIFICATE REQUEST").encode()
    with pytest.raises(BadInputError):
        sign_request(make_authority("b", NOW_NS), pem, "web1", ID, NOW_NS)


def test_what_one_object_may_cost_is_bounded() -> None:
    assert RECORDS_MAX * 44 <= INDEX_RAW_BYTES_MAX <= 16 << 20


# ---- texts and files -----------------------------------------------------------------------------------------------


def test_a_port_of_any_length() -> None:
    with pytest.raises(BadInputError):
        parse_address("a:" + "9" * 5000, 443)


@pytest.mark.parametrize("port", [0, -1, 65536, 1 << 100])
def test_a_port_nobody_can_dial_in_store_json(scratch: Path, port: int) -> None:
    state = StateDirectory.create(str(scratch / "state"), "web1")
    fields = {"store_id": ID, "server_name": "x", "host": "h", "payload_key": "", "index_key": "", "manage_port": 443}
    Path(state.keys, STORE_FILE).write_bytes(msgspec.json.encode({**fields, "data_port": port}))
    with pytest.raises(IntegrityError):
        load_enrolment(state)


@pytest.mark.parametrize("changes", [{"segment": 1 << 38}, {"offset": 1 << 27}, {"lsn": -1}, {"time_ns": 1 << 80}])
def test_positions_that_cannot_be(scratch: Path, changes: dict[str, int]) -> None:
    state = StateDirectory.create(str(scratch / "state"), "web1")
    applied = {"lsn": 1, "segment": 1, "offset": 8192, "time_ns": 1, **changes}
    Path(state.root, "positions.json").write_text(msgspec.json.encode({"applied": applied}).decode())
    with pytest.raises(IntegrityError):
        state.load_positions()


def test_a_segment_number_that_leaves_none_for_the_next() -> None:
    storage = CrashStorage()
    storage.create("f" * 16 + ".segment").close()
    with pytest.raises(IntegrityError):
        recover(storage, Positions(applied=Cursor()), bytes(16), segment_bytes=1 << 16)


def test_notes_that_are_no_map_are_unreadable_to_inspect() -> None:
    for payload in (b"\x01", b"\xa1\xff", b"\x91" * 5000, b""):
        assert detail(Kind.MARKER, payload) == "unreadable"


@pytest.mark.parametrize("changes", [{"id": "../x"}, {"name": "a/b"}, {"name": ""}])
def test_a_vault_that_cannot_be(scratch: Path, changes: dict[str, str]) -> None:
    (scratch / "vault.json").write_bytes(msgspec.json.encode({"id": ID, "name": "site-b", **changes}))
    with pytest.raises(IntegrityError):
        describe(str(scratch))


def test_directories_are_private_at_every_level(scratch: Path) -> None:
    storage = DirectoryStorage(str(scratch / "root"))
    storage.make_directory("a/b/c")
    assert {path.stat().st_mode & 0o777 for path in (scratch / "root").rglob("*")} == {0o700}


def test_files_of_others_among_the_objects_are_passed_over(scratch: Path) -> None:
    objects = DirectoryObjects(DirectoryStorage(str(scratch)), str(scratch))
    objects.put(f"machines/{ID}/machine-0.obj", [b"x"])
    (scratch / "machines" / ID / "Copy of machine.obj").write_bytes(b"y")
    assert objects.list("machines/") == [f"machines/{ID}/machine-0.obj"]


# ---- rows of the catalog -------------------------------------------------------------------------------------------

OBJECT = ObjectRow(ID, 1, 1, 5, 10, 50, bytes(32), 500, "0badcafe")
MACHINE = MachineRow(ID, "web1", 1, "1", False, 0, 1, b"")


@pytest.mark.parametrize(
    "changes",
    [
        *({"machine_id": "../x"}, {"nonce": "../../x"}, {"nonce": "0badcafe\n"}, {"first_lsn": 0}, {"last_lsn": 0}),
        *({"machine_id": None}, {"nonce": None}, {"first_lsn": "x"}, {"last_lsn": 5.5}, {"digest": None}),
        *({"epoch": -1}, {"length": 0}, {"length": 1 << 40}, {"digest": b""}, {"first_time_ns": 60}),
        *({"is_stretch": 2}, {"is_stretch": None}),
    ],
)
def test_rows_of_objects_that_cannot_be(changes: dict[str, object]) -> None:
    assert checked_object(OBJECT) == OBJECT
    with pytest.raises(IntegrityError):
        checked_object(replace(OBJECT, **changes))  # type: ignore[arg-type]


def test_rows_of_machines_and_disks_that_cannot_be() -> None:
    assert checked_machine(MACHINE) == MACHINE
    for machine in ({"id": "x" * 32}, {"name": ".."}, {"epoch": 1 << 32}, {"generation": -1}):
        with pytest.raises(IntegrityError):
            checked_machine(replace(MACHINE, **machine))  # type: ignore[arg-type]
    good = DiskRecord(slot=0, id=ID, name="root", size_bytes=512)
    assert checked_disk(good) == good
    for disk in ({"size_bytes": -1}, {"size_bytes": 100}, {"slot": 65535}, {"slot": -1}, {"name": "a/b"}, {"id": ""}):
        with pytest.raises(IntegrityError):
            checked_disk(msgspec.structs.replace(good, **disk))


def test_a_row_that_cannot_be_is_damage_that_names_the_remedy(scratch: Path) -> None:
    with Vault.create(str(scratch / "vault"), "site-b", SystemClock()) as vault:
        with vault.catalog.transaction():
            vault.catalog.put_machine(MACHINE)
            vault.catalog.change("UPDATE machines SET name = '../x'")
        with pytest.raises(IntegrityError, match="rebuild"):
            vault.machines()


def test_a_catalog_of_junk_is_damage_whatever_sqlite_says_of_it(scratch: Path) -> None:
    """It names the junk, in bytes that are no text."""
    path = scratch / "catalog.sqlite3"
    Catalog.create(str(path)).close()
    whole = path.read_bytes()
    at = whole.index(b"CREATE TABLE machines")
    path.write_bytes(whole[:at] + b"CREATE TABLE \xff\xa0((((" + whole[at + 20 :])
    with pytest.raises(IntegrityError, match="rebuild"):
        catalog = Catalog(str(path), writable=True)
        catalog.machines()


# ---- control sockets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [math.inf, math.nan, None, "x", [1]])
def test_positions_of_a_disk_server_that_cannot_be(number: object) -> None:
    fields = dict.fromkeys(("durable", "segment", "offset", "time_ns", "appended", "epoch"), 1)
    with pytest.raises(FormatError):
        host_positions({**fields, "failed": None, "durable": number})


async def test_a_verb_that_is_no_text_ends_no_server(scratch: Path, nursery: trio.Nursery) -> None:
    """Made a text, one that nests deeply raised where only the connection's errors are caught."""
    path = str(scratch / "agent.sock")
    await nursery.start(lambda task_status: serve_control(path, {}, task_status=task_status))
    deep: list[object] = []
    for _ in range(900):
        deep = [deep]
    for verb in (deep, None, 5, {"a": 1}):
        async with await AsyncControlClient.open(path) as client:
            with pytest.raises(BadInputError):
                await client.call(verb)  # type: ignore[arg-type]
    assert control.verb_of({"verb": deep}) == ""
    nursery.cancel_scope.cancel()
