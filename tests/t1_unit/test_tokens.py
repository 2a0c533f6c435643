"""Tokens and enrolment: one machine, once, for a while; certificates name whom the store says, not who asks."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from asrfs.errors import AsrfsError, AuthenticationError, BadInputError, NotFoundError, RefusedError
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.enrolment import (
    EnrolReply,
    EnrolRequest,
    Token,
    check_fingerprint,
    decode_token,
    encode_base64url,
    encode_token,
)
from asrfs.transport.tls import fingerprint, machine_identity, make_key_and_request
from replica_store.vault.enrolment import enrol, make_token, newest_description, revoke
from replica_store.vault.keys import MachineDescription
from replica_store.vault.objects import Objects
from replica_store.vault.vault import Vault

NS = 1_000_000_000


class HandClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_ns = SystemClock().time_ns()

    def time_ns(self) -> int:
        return self.now_ns

    def monotonic(self) -> float:
        return self.now_ns / NS


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def vault(scratch: Path, clock: HandClock) -> Iterator[Vault]:
    with Vault.create(str(scratch / "vault"), "site-b", clock) as vault:
        yield vault


def request(token: str, number: int = 1, **changes: str) -> EnrolRequest:
    parsed = decode_token(token)
    machine_id = f"{number:032x}"
    _, csr = make_key_and_request(parsed.machine, machine_id)
    wanted = EnrolRequest(
        secret=encode_base64url(parsed.secret), machine=parsed.machine, machine_id=machine_id, csr=csr.decode()
    )
    return msgspec.structs.replace(wanted, **changes)


def identity_of(reply: EnrolReply) -> tuple[str, str]:
    identity = machine_identity(ssl.PEM_cert_to_DER_cert(reply.certificate))
    return identity.machine_id, identity.name


def test_a_token_is_one_line_that_says_what_was_put_in() -> None:
    token = Token(machine="web1", secret=bytes(range(32)), fingerprint=bytes(32))
    text = encode_token(token)
    assert text.startswith("asrfs1.")
    assert text.isprintable() and " " not in text and "=" not in text
    assert decode_token(f" {text}\n") == token


@pytest.mark.parametrize(
    "text",
    [
        "",
        "asrfs1.",
        "asrfs2.AAAA",
        "asrfs1.!!!!",
        "asrfs1." + "A" * 5000,
        encode_token(Token(machine="../x", secret=bytes(32), fingerprint=bytes(32))),
        encode_token(Token(machine="web1", secret=bytes(31), fingerprint=bytes(32))),
        encode_token(Token(machine="web1", secret=bytes(32), fingerprint=b"")),
        encode_token(Token(machine="web1", secret=bytes(32), fingerprint=bytes(32)))[:-9],
        "asrfs1.é",
    ],
)
def test_what_is_no_token_is_bad_input(text: str) -> None:
    with pytest.raises(BadInputError):
        decode_token(text)


def test_the_fingerprint_is_of_the_certificate_that_both_ports_show(vault: Vault, clock: HandClock) -> None:
    token = decode_token(make_token(vault, "web1", clock))
    pem = vault.keys.read("server.crt")
    der = ssl.PEM_cert_to_DER_cert(pem.decode())
    assert token.fingerprint == fingerprint(pem) == fingerprint(der)
    check_fingerprint(der, token, "here")
    with pytest.raises(AuthenticationError, match="not the one"):
        check_fingerprint(der + b" ", token, "here")


def test_a_token_makes_a_machine(vault: Vault, clock: HandClock) -> None:
    reply = enrol(vault, request(make_token(vault, "web1", clock)), clock, 9443)
    machine = vault.machine("web1")
    assert (machine.id, machine.epoch, machine.generation, machine.revoked) == (f"{1:032x}", 1, 1, False)
    assert identity_of(reply) == (machine.id, "web1")
    assert (reply.store_id, reply.server_name, reply.data_port) == (vault.id, vault.server_name, 9443)
    keys = vault.machine_keys(machine)
    assert len({keys.index_key, keys.payload_key}) == 2
    assert len(keys.index_key) == len(keys.payload_key) == 32


def test_the_certificate_names_whom_the_token_is_for_whatever_the_request_asks(vault: Vault, clock: HandClock) -> None:
    _, csr = make_key_and_request("somebody-else", "f" * 32)
    reply = enrol(vault, request(make_token(vault, "web1", clock), csr=csr.decode()), clock, 9443)
    assert identity_of(reply) == (f"{1:032x}", "web1")


def test_a_revoked_machine_comes_back_by_a_new_token_only(vault: Vault, clock: HandClock) -> None:
    wanted = request(make_token(vault, "web1", clock))
    enrol(vault, wanted, clock, 9443)
    unused, others = make_token(vault, "web1", clock), make_token(vault, "web2", clock)
    keys = vault.machine_keys(vault.machine("web1"))
    revoked = revoke(vault, "web1", clock)
    assert vault.machine("web1") == revoked and revoked.revoked
    known = newest_description(vault, revoked.id)
    assert known is not None and known.revoked and known.generation == revoked.generation, "a rebuild must know, too"
    with pytest.raises(AuthenticationError, match="has expired"):
        enrol(vault, request(unused), clock, 9443)
    assert revoke(vault, "web1", clock).revoked, "twice is once"
    enrol(vault, request(others, 2), clock, 9443)
    enrol(vault, request(make_token(vault, "web1", clock)), clock, 9443)
    again = vault.machine("web1")
    assert not again.revoked and again.id == revoked.id and vault.machine_keys(again) == keys
    with pytest.raises(NotFoundError):
        revoke(vault, "nobody", clock)


def test_a_token_is_used_once(vault: Vault, clock: HandClock) -> None:
    wanted = request(make_token(vault, "web1", clock))
    enrol(vault, wanted, clock, 9443)
    with pytest.raises(AuthenticationError, match="has been used"):
        enrol(vault, wanted, clock, 9443)


def test_a_token_expires(vault: Vault, clock: HandClock) -> None:
    wanted = request(make_token(vault, "web1", clock, 60.0))
    clock.now_ns += 60 * NS - 1
    late = clock.now_ns + 1
    clock.now_ns = late
    with pytest.raises(AuthenticationError, match="expired"):
        enrol(vault, wanted, clock, 9443)
    clock.now_ns = late - 1
    enrol(vault, wanted, clock, 9443)


@pytest.mark.parametrize("lifetime_s", [0.0, -1.0, 1e9])
def test_a_token_is_good_for_a_sensible_time(vault: Vault, clock: HandClock, lifetime_s: float) -> None:
    with pytest.raises(BadInputError):
        make_token(vault, "web1", clock, lifetime_s)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"secret": encode_base64url(bytes(32))}, AuthenticationError),
        ({"secret": "é"}, BadInputError),
        ({"machine": "db1"}, AuthenticationError),
        ({"machine": "a/b"}, BadInputError),
        ({"machine_id": "A" * 32}, BadInputError),
        ({"csr": "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"}, BadInputError),
    ],
)
def test_what_is_refused_uses_nothing_up_and_leaves_nothing(
    vault: Vault, clock: HandClock, changes: dict[str, str], error: type[AsrfsError]
) -> None:
    token = make_token(vault, "web1", clock)
    with pytest.raises(error):
        enrol(vault, request(token, **changes), clock, 9443)
    assert vault.machines() == []
    assert vault.objects.list("") == []
    enrol(vault, request(token), clock, 9443)


def test_a_machine_that_enrols_again_keeps_its_keys_and_gets_another_certificate(
    vault: Vault, clock: HandClock
) -> None:
    first = enrol(vault, request(make_token(vault, "web1", clock)), clock, 9443)
    before = vault.machine("web1")
    second = enrol(vault, request(make_token(vault, "web1", clock)), clock, 9443)
    after = vault.machine("web1")
    assert (second.payload_key, second.index_key) == (first.payload_key, first.index_key)
    assert (after.id, after.generation) == (before.id, 2)
    assert after.serial != before.serial


def test_a_name_is_one_machines(vault: Vault, clock: HandClock) -> None:
    enrol(vault, request(make_token(vault, "web1", clock), 1), clock, 9443)
    with pytest.raises(RefusedError, match="another machine named web1"):
        enrol(vault, request(make_token(vault, "web1", clock), 2), clock, 9443)
    with pytest.raises(RefusedError, match="knows this machine as web1"):
        enrol(vault, request(make_token(vault, "db1", clock), 1), clock, 9443)
    assert [machine.name for machine in vault.machines()] == ["web1"]


def test_a_transaction_that_does_not_come_about_leaves_keys_that_the_next_one_uses(
    vault: Vault, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description is there, the machine is not: whichever description a rebuild finds later, its keys are right."""
    token = make_token(vault, "web1", clock)
    with monkeypatch.context() as patch:
        patch.setattr(vault.catalog, "put_machine", fails)
        with pytest.raises(AsrfsError, match="died"):
            enrol(vault, request(token), clock, 9443)
    assert vault.machines() == []
    assert len(vault.objects.list("")) == 1
    enrol(vault, request(token), clock, 9443)
    descriptions = read_descriptions(vault, vault.objects)
    assert {each.generation for each in descriptions} == {1, 2}
    assert len({each.sealed_keys for each in descriptions}) == 1
    assert vault.machine("web1").generation == 2


def fails(row: object) -> None:
    raise AsrfsError("died")


def read_descriptions(vault: Vault, objects: Objects) -> list[MachineDescription]:
    machine_id = f"{1:032x}"
    return [vault.sealer.open_description(machine_id, objects.read(name), name) for name in objects.list("machines/")]
