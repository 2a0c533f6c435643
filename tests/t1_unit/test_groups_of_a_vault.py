"""Groups at the store: who may belong to one, who coordinates, what members are told, and which shares are points."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from asrfs.errors import BadInputError, FormatError, NotFoundError, RefusedError
from asrfs.model.machine import DiskRecord
from asrfs.model.marker import MarkerRecord, Share, check_marker, decode_marker, encode_marker
from asrfs.storage.system_clock import SystemClock
from asrfs.transport.enrolment import EnrolRequest, decode_token, encode_base64url
from replica_store.vault.configuration import configuration_of, policy_of
from replica_store.vault.enrolment import enrol, make_token
from replica_store.vault.group_changes import (
    GROUP_BOOKS,
    add_member,
    choose_coordinators,
    create_group,
    delete_group,
    remove_member,
)
from replica_store.vault.groups import Group, choose_coordinator, put_place, read_groups
from replica_store.vault.policies import read_book
from replica_store.vault.policy_changes import assign, set_policy
from replica_store.vault.rebuild import rebuild
from replica_store.vault.rows import DiskRow, Entry, LinkRow, MachineRow, ObjectRow, PointRow
from replica_store.vault.vault import Vault

A, B, C = "a" * 32, "b" * 32, "c" * 32
IDS = {"web": A, "db": B, "app": C}
POINT = "f" * 32


@pytest.fixture
def vault(scratch: Path) -> Iterator[Vault]:
    vault = Vault.create(str(scratch / "vault"), "site-b", SystemClock())
    with vault.catalog.transaction():
        for name, machine_id in IDS.items():
            vault.catalog.put_machine(MachineRow(machine_id, name, 1, "5e", False, 5, 1, b"sealed"))
    yield vault
    vault.close()


def generation_of(vault: Vault) -> int:
    return vault.catalog.configuration_generation()


# ---- changing ---------------------------------------------------------------------------------------------------


def test_a_group_is_told_to_each_of_its_members_and_nobody_else(vault: Vault) -> None:
    put_place(vault.catalog, B, "10.0.0.2", 20004)
    group = create_group(vault, "shop", ["web", "db"])
    orders = {machine: configuration_of(vault.catalog, machine).groups for machine in (A, B, C)}
    assert orders[C] == ()
    assert orders[A] == orders[B]
    (order,) = orders[A]
    assert (order.name, order.coordinator, order.generation, order.partial) == ("shop", A, group.generation, False)
    assert [(m.machine_id, m.name, m.address, m.port, m.serial) for m in order.members] == [
        (A, "web", "", 0, "5e"),
        (B, "db", "10.0.0.2", 20004, "5e"),
    ]


def test_every_change_is_a_new_generation_for_group_and_hosts(vault: Vault) -> None:
    seen = [(0, generation_of(vault))]
    for change in (
        lambda: create_group(vault, "shop", ["web"]),
        lambda: add_member(vault, "shop", "db"),
        lambda: add_member(vault, "shop", "app"),
        lambda: remove_member(vault, "shop", "web"),
        lambda: choose_coordinators(vault, {C})[0],
    ):
        group = change()
        assert group == read_groups(vault.catalog).group("shop")
        assert group.generation > seen[-1][0]
        assert generation_of(vault) > seen[-1][1]
        seen.append((group.generation, generation_of(vault)))
    assert group.members == (B, C)
    assert choose_coordinators(vault, {C}) == choose_coordinators(vault, set()) == []
    delete_group(vault, "shop")
    again = create_group(vault, "shop", ["web"])
    assert again.generation > group.generation, "an order of before is never taken for one of now"


@pytest.mark.parametrize(
    ("name", "members", "error", "text"),
    [
        ("shop", [], BadInputError, "would have no member"),
        ("shop", ["web", "web"], BadInputError, "named twice"),
        ("../x", ["web"], BadInputError, "cannot be the name"),
        ("shop", ["other"], NotFoundError, "knows no machine 'other'"),
        ("web", ["db"], RefusedError, "there is a machine web"),
        ("taken", ["db"], RefusedError, "there is a group taken already"),
        ("shop", ["web", "gone"], RefusedError, "is revoked"),
    ],
)
def test_groups_that_cannot_be(vault: Vault, name: str, members: list[str], error: type[Exception], text: str) -> None:
    with vault.catalog.transaction():
        vault.catalog.put_machine(MachineRow("d" * 32, "gone", 1, "5e", True, 5, 1, b"sealed"))
    create_group(vault, "taken", ["app"])
    before = read_groups(vault.catalog)
    with pytest.raises(error, match=text):
        create_group(vault, name, members)
    assert read_groups(vault.catalog) == before


def test_no_machine_has_the_name_of_a_group(vault: Vault) -> None:
    """Else a policy that is assigned to the one would be the other's."""
    token = make_token(vault, "later", SystemClock())
    create_group(vault, "later", ["web"])
    with pytest.raises(RefusedError, match="there is a group later: a machine needs another name"):
        make_token(vault, "later", SystemClock())
    request = EnrolRequest(
        secret=encode_base64url(decode_token(token).secret), machine="later", machine_id="d" * 32, csr=""
    )
    with pytest.raises(RefusedError, match="there is a group later"):
        enrol(vault, request, SystemClock(), 1)
    assert [row.name for row in vault.machines()] == ["app", "db", "web"]


def test_members_that_cannot_come_or_go(vault: Vault) -> None:
    create_group(vault, "shop", ["web"])
    with pytest.raises(RefusedError, match="is a member of group shop already"):
        add_member(vault, "shop", "web")
    with pytest.raises(NotFoundError, match="is not a member"):
        remove_member(vault, "shop", "db")
    with pytest.raises(RefusedError, match="is the last member"):
        remove_member(vault, "shop", "web")
    for change in (lambda: add_member(vault, "no", "db"), lambda: delete_group(vault, "no")):
        with pytest.raises(NotFoundError, match="there is no group 'no'"):
            change()


def test_a_machine_may_belong_to_several_groups_and_has_the_policy_of_the_first(vault: Vault) -> None:
    shop, team = create_group(vault, "shop", ["web", "db"]), create_group(vault, "team", ["web", "app"])
    assert [order.name for order in configuration_of(vault.catalog, A).groups] == ["shop", "team"]
    set_policy(vault, "often", {"crash_interval": "5s", "filesystem_interval": "1h", "partial_points": "yes"})
    assign(vault, "often", "group", team.id)
    held = policy_of(vault.catalog, read_book(vault.catalog), A)
    assert (held.policy, held.by) == ("often", "group team")
    orders = {order.id: order for order in configuration_of(vault.catalog, A).groups}
    assert orders[team.id].intervals_s() == {"crash": 5.0, "filesystem": 3600.0, "application": 14400.0}
    assert orders[shop.id].intervals_s() == {"crash": 300.0, "application": 14400.0}
    assert [orders[each].partial for each in (team.id, shop.id)] == [True, False]
    with pytest.raises(RefusedError, match="has a policy"):
        delete_group(vault, "team")


def test_who_is_revoked_is_in_no_order(vault: Vault) -> None:
    create_group(vault, "shop", ["web", "db"])
    with vault.catalog.transaction():
        row = vault.machine("db")
        vault.catalog.put_machine(replace(row, revoked=True))
    (order,) = configuration_of(vault.catalog, A).groups
    assert [member.name for member in order.members] == ["web"]
    assert configuration_of(vault.catalog, B).groups == ()


def test_the_coordinator_is_a_connected_member_and_stays_while_it_is_one() -> None:
    group = Group(id=POINT, name="g", members=(A, B, C), coordinator=B, generation=1)
    assert choose_coordinator(group, {A, B, C}) == B
    assert choose_coordinator(group, {C, A}) == A
    assert choose_coordinator(group, {"e" * 32}) == B, "nobody is there: nothing is gained"


def test_a_new_group_is_coordinated_by_who_is_connected(vault: Vault) -> None:
    vault.catalog.put_links([LinkRow(C, 1, True, 0, 0, 0)])
    assert create_group(vault, "shop", ["web", "app"]).coordinator == C


def test_groups_are_there_again_after_a_rebuild(vault: Vault) -> None:
    for number in range(5):
        create_group(vault, f"g{number}", ["web", "db"])
    delete_group(vault, "g0")
    groups, generation = read_groups(vault.catalog), generation_of(vault)
    assert len(list(vault.objects.list("groups/"))) <= 3, "older books go"
    vault.close()
    rebuild(vault.root)
    again = Vault.open(vault.root)
    assert read_groups(again.catalog).groups == groups.groups
    assert generation_of(again) > generation
    assert GROUP_BOOKS.newest(again.objects, again.sealer)[1] == []
    again.close()


# ---- listing ----------------------------------------------------------------------------------------------------


def share(machine_id: str, *, group_point: str = POINT, members: tuple[str, ...] = (A, B)) -> MarkerRecord:
    return MarkerRecord(id=group_point, group="shop", group_point=group_point, members=members)


def confirming(*shares: tuple[str, int], members: tuple[str, ...] = (A, B), point: str = POINT) -> MarkerRecord:
    record = MarkerRecord(
        id=point,
        group="shop",
        group_point=point,
        members=members,
        ready=len(shares),
        confirms=tuple(Share(machine=machine, lsn=lsn, hold_ms=2.5) for machine, lsn in shares),
    )
    assert decode_marker(encode_marker(record)) == record
    return record


class Histories:
    """Records come to the catalog, one object each."""

    def __init__(self, vault: Vault) -> None:
        self.vault = vault
        self.lsns = dict.fromkeys(IDS.values(), 0)

    def add(self, machine_id: str, marker: MarkerRecord | None = None, *, gap: bool | None = None) -> int:
        self.lsns[machine_id] += 1
        lsn = self.lsns[machine_id]
        row = ObjectRow(machine_id, 1, lsn, lsn, lsn, lsn, bytes([lsn]) * 32, 500, "0badcafe")
        point = () if marker is None else (PointRow(machine_id, lsn, 1, lsn, marker, False),)
        disks = ()
        if gap is not None:
            disk = DiskRecord(slot=0, id="9" * 32, name="d", size_bytes=512, gap=gap)
            disks = (DiskRow(machine_id, lsn, disk),)
        is_confirming = marker is not None and bool(marker.confirms)
        entry = Entry(row, disks, () if is_confirming else point, (), point if is_confirming else ())
        with self.vault.catalog.transaction():
            self.vault.catalog.append([entry])
        return lsn

    def listed(self) -> dict[str, list[int]]:
        names = {machine_id: name for name, machine_id in IDS.items()}
        found = {names[each]: [point.lsn for point in self.vault.points(each)] for each in IDS.values()}
        return {name: lsns for name, lsns in found.items() if lsns}


def test_i5_shares_are_listed_for_all_at_once_whatever_comes_last(vault: Vault, rng: random.Random) -> None:
    histories = Histories(vault)
    for number in range(12):
        point = f"{number:032x}"
        lsns = {machine: histories.lsns[machine] + 1 for machine in (A, B)}
        said = confirming(*lsns.items(), point=point)
        before = histories.listed()
        # The confirming record lies behind its machine's own share; otherwise they come in any order.
        steps = rng.choice(([A, A, B], [A, B, A], [B, A, A]))
        for at, machine in enumerate(steps):
            is_share = machine not in steps[:at]
            histories.add(machine, share(machine, group_point=point) if is_share else said)
            after = histories.listed()
            if at < 2:
                assert after == before
        assert {name: len(lsns) for name, lsns in after.items()} == {"web": number + 1, "db": number + 1}
        marker = vault.points(B)[-1].marker
        assert (marker.ready, marker.members, marker.hold_ms) == (2, (A, B), 2.5)


def test_i5_shares_that_nobody_confirmed_are_points_nowhere(vault: Vault) -> None:
    histories = Histories(vault)
    for machine in (A, B):
        histories.add(machine, share(machine))
    assert histories.listed() == {}
    ordinary = histories.add(A, MarkerRecord(id="e" * 32))
    assert histories.listed() == {"web": [ordinary]}


def test_i5_a_share_inside_a_gap_keeps_the_point_from_all(vault: Vault) -> None:
    histories = Histories(vault)
    histories.add(B, gap=True)
    at = {machine: histories.add(machine, share(machine)) for machine in (A, B)}
    histories.add(A, confirming(*at.items()))
    assert histories.listed() == {}
    histories.add(B, gap=False)
    assert histories.listed() == {}, "what lies in a gap is never made whole by its end"


def test_i5_who_is_no_member_confirms_nothing(vault: Vault) -> None:
    histories = Histories(vault)
    at = {machine: histories.add(machine, share(machine)) for machine in (A, B)}
    histories.add(C, confirming(*at.items()))
    assert histories.listed() == {}
    histories.add(B, confirming((A, at[A] + 5), (B, at[B])))
    assert histories.listed() == {}, "another record of that machine is no share"
    histories.add(A, confirming(*at.items()))
    assert histories.listed() == {"web": [1], "db": [1]}


def test_partial_points_are_listed_for_those_they_were_cut_on(vault: Vault) -> None:
    histories = Histories(vault)
    members = (A, B, C)
    at = {machine: histories.add(machine, share(machine, members=members)) for machine in members}
    histories.add(A, confirming((A, at[A]), (C, at[C]), members=members))
    assert histories.listed() == {"web": [1], "app": [1]}
    marker = vault.points(C)[0].marker
    assert (marker.ready, len(marker.members)) == (2, 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"confirms": (Share(machine=C, lsn=1), Share(machine=A, lsn=1))},
        {"confirms": (Share(machine=A, lsn=1), Share(machine=A, lsn=2))},
        {"confirms": (Share(machine=A, lsn=0), Share(machine=B, lsn=1))},
        {"confirms": (Share(machine=A, lsn=1), Share(machine=B, lsn=1, hold_ms=float("nan")))},
        {"ready": 1},
        {"group_point": None},
    ],
)
def test_confirming_records_that_cannot_be(fields: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        check_marker(msgspec.structs.replace(confirming((A, 1), (B, 1)), **fields))
