"""What one store says of a machine to the next: where it is, and which policy holds. Two vaults and real enrolments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from asrfs.errors import AuthenticationError, BadInputError, RefusedError
from asrfs.model.arrival import Arrival, decode_arrival
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.enrolment import EnrolRequest, decode_token, encode_base64url
from asrfs.transport.tls import make_key_and_request
from replica_store.vault.arrivals import arrival_of, check_away, departure_of
from replica_store.vault.configuration import configuration_of
from replica_store.vault.enrolment import enrol, make_token
from replica_store.vault.group_changes import create_group
from replica_store.vault.policy_changes import assign, set_policy
from replica_store.vault.rebuild import rebuild
from replica_store.vault.vault import Vault

MACHINE, ID = "web1", f"{1:032x}"
GOLD = {"crash_interval": "30s", "retention": "7d"}


def vault_at(path: Path) -> Iterator[Vault]:
    with Vault.create(str(path), path.name, SystemClock()) as vault:
        yield vault


@pytest.fixture
def there(scratch: Path) -> Iterator[Vault]:
    """Whose machine was failed over."""
    yield from vault_at(scratch / "there")


@pytest.fixture
def home(scratch: Path) -> Iterator[Vault]:
    yield from vault_at(scratch / "home")


def come(vault: Vault, arrival: Arrival | None, machine: str = MACHINE, number: int = 1) -> None:
    """Be enrolled."""
    token = make_token(vault, machine, SystemClock())
    _, csr = make_key_and_request(machine, f"{number:032x}")
    secret = encode_base64url(decode_token(token).secret)
    wanted = EnrolRequest(
        secret=secret, machine=machine, machine_id=f"{number:032x}", csr=csr.decode(), arrival=arrival
    )
    enrol(vault, wanted, SystemClock(), 9443)


def go(one: Vault, other: Vault) -> Arrival:
    """As `replica-store reprotect` has it; what was said."""
    said = departure_of(one, one.machine(MACHINE))
    come(other, decode_arrival(msgspec.json.encode(said), "here"))
    return said


def holds(vault: Vault) -> tuple[str, dict[str, str]]:
    """The policy that its host is told."""
    told = configuration_of(vault.catalog, ID)
    return told.policy, told.keys


def begin(vault: Vault, keys: dict[str, str] | None = None) -> None:
    come(vault, None)
    if keys is not None:
        set_policy(vault, "gold", keys)
        assign(vault, "gold", "machine", ID)


def test_the_policy_holds_in_the_other_direction_and_again_when_it_is_back(there: Vault, home: Vault) -> None:
    begin(there, GOLD)
    for keys in (GOLD, {"crash_interval": "60s"}):
        said = go(there, home)
        assert said.away and said.owner == there.id
        check_away(home, home.machine(MACHINE))
        assert holds(home) == ("gold", keys)
        told = configuration_of(home.catalog, ID).generation
        set_policy(there, "gold", {"crash_interval": "60s", "retention": "default"})
        said = go(home, there)
        assert not said.away and (said.owner, said.policy, said.keys) == (there.id, "gold", keys)
        assert holds(there) == ("gold", {"crash_interval": "60s"}), "a person's word there"
        with pytest.raises(RefusedError, match="runs at home"):
            check_away(there, there.machine(MACHINE))
        assert configuration_of(home.catalog, ID).generation == told


def test_a_machine_that_never_went_anywhere_is_at_home(there: Vault) -> None:
    begin(there)
    assert arrival_of(there, ID) is None
    with pytest.raises(RefusedError, match="failover planned"):
        check_away(there, there.machine(MACHINE))


def test_it_is_all_there_after_the_catalog_was_lost(there: Vault, home: Vault) -> None:
    begin(there, GOLD)
    go(there, home)
    kept = arrival_of(home, ID)
    rebuild(home.root)
    with Vault.open(home.root) as again:
        assert arrival_of(again, ID) == kept and kept is not None
        check_away(again, again.machine(MACHINE))
        assert holds(again) == ("gold", GOLD)


def test_the_default_is_the_default_where_it_says_the_same(there: Vault, home: Vault) -> None:
    begin(there)
    go(there, home)
    assert holds(home) == ("default", {})
    go(home, there)
    set_policy(there, "default", {"crash_interval": "17s"})
    go(there, home)
    assert holds(home) == ("default-of-web1", {"crash_interval": "17s"})
    go(home, there)
    assert holds(there) == ("default", {"crash_interval": "17s"})
    set_policy(there, "default", {"crash_interval": "default"})
    go(there, home)
    assert holds(home) == ("default", {}), "what was made for it no longer holds"


def test_what_a_person_decided_is_kept(there: Vault, home: Vault) -> None:
    begin(there, GOLD)
    set_policy(home, "silver", {"crash_interval": "99s"})
    come(home, None)
    assign(home, "silver", "machine", ID)
    go(there, home)
    assert holds(home)[0] == "silver"
    assign(home, None, "machine", ID)
    group = create_group(home, "shop", [MACHINE])
    assign(home, "silver", "group", group.id)
    go(there, home)
    assert holds(home)[0] == "silver"


def test_a_policy_of_the_same_name_is_not_changed(there: Vault, home: Vault) -> None:
    begin(there, GOLD)
    set_policy(home, "gold", {"crash_interval": "99s"})
    for _ in range(2):
        go(there, home)
        assert holds(home) == ("gold-of-web1", GOLD)
    come(home, None, "db1", 2)
    assign(home, "gold-of-web1", "machine", f"{2:032x}")
    set_policy(there, "gold", {"crash_interval": "61s"})
    go(there, home)
    assert holds(home) == ("gold-of-web1-2", GOLD | {"crash_interval": "61s"}), "another machine has the first"
    assert configuration_of(home.catalog, f"{2:032x}").keys == GOLD


def test_whose_history_is_here_is_not_told_by_a_stranger(
    there: Vault, home: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of somebody who may enrol a machine is no leave to say how long its points are kept."""
    begin(there, GOLD)
    come(home, None)
    monkeypatch.setattr(Vault, "received_lsn", lambda self, machine_id: 7)
    go(there, home)
    assert holds(home) == ("default", {})


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": "../../etc"},
        {"store_id": "x"},
        {"owner": ""},
        {"keys": {f"key{number}": "1" for number in range(100)}},
        {"keys": {"retention": "1" * 5000}},
        {"keys": {"retention\n": "1"}},
    ],
)
def test_what_no_store_says_is_refused_and_the_token_is_good_still(
    there: Vault, home: Vault, changes: dict[str, object]
) -> None:
    begin(there, GOLD)
    bad = msgspec.structs.replace(departure_of(there, there.machine(MACHINE)), **changes)
    with pytest.raises(BadInputError):
        decode_arrival(msgspec.json.encode(bad), "here")
    token = make_token(home, MACHINE, SystemClock())
    _, csr = make_key_and_request(MACHINE, ID)
    wanted = EnrolRequest(
        secret=encode_base64url(decode_token(token).secret), machine=MACHINE, machine_id=ID, csr=csr.decode()
    )
    with pytest.raises(BadInputError):
        enrol(home, msgspec.structs.replace(wanted, arrival=bad), SystemClock(), 9443)
    assert home.machines() == [] and arrival_of(home, ID) is None
    enrol(home, wanted, SystemClock(), 9443)
    with pytest.raises(AuthenticationError):
        enrol(home, wanted, SystemClock(), 9443)


def test_what_cannot_be_followed_of_a_policy_is_left_out(there: Vault, home: Vault) -> None:
    begin(there, GOLD)
    said = departure_of(there, there.machine(MACHINE))
    come(home, msgspec.structs.replace(said, keys=GOLD | {"of_a_later_version": "7", "rpo_warning": "never"}))
    assert holds(home) == ("gold", GOLD)
