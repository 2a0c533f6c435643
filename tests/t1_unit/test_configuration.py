"""What a store tells a host: what is kept is what was told, and what cannot be is refused, whoever said it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrfs.errors import FormatError
from asrfs.model.configuration import (
    GROUPS_MAX,
    KEYS_MAX,
    MEMBERS_MAX,
    TEXT_CHARACTERS_MAX,
    GroupOrder,
    HostConfiguration,
    Member,
    check_configuration,
    decode_configuration,
    encode_configuration,
)


def member(number: int, **changes: Any) -> Member:
    values = {"machine_id": f"{number:032x}", "name": f"web{number}", "address": "10.0.0.7", "port": 20004}
    return Member(**(values | changes))


def group(number: int = 1, **changes: Any) -> GroupOrder:
    values: dict[str, Any] = {"id": f"{number:032x}", "name": f"group{number}", "coordinator": f"{1:032x}"}
    return GroupOrder(**({"members": (member(1), member(2)), "interval_s": 60.0} | values | changes))


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
ids = st.integers(0, 1 << 128).map(lambda number: f"{number:032x}"[-32:])
members = st.lists(
    st.builds(Member, machine_id=ids, name=names, port=st.integers(0, 65535)),
    min_size=1,
    max_size=5,
    unique_by=lambda each: each.machine_id,
).map(tuple)
groups = members.flatmap(
    lambda each: st.builds(
        GroupOrder,
        id=ids,
        name=names,
        members=st.just(each),
        coordinator=st.sampled_from([one.machine_id for one in each]),
        interval_s=st.floats(0, 86400),
        filesystem_interval_s=st.floats(0, 86400),
        application_interval_s=st.floats(0, 86400),
    )
)
configurations = st.builds(
    HostConfiguration,
    generation=st.integers(0, 1 << 40),
    policy=names,
    keys=st.dictionaries(names, st.text(st.characters(codec="utf-8"), max_size=50), max_size=8),
    groups=st.lists(groups, max_size=3, unique_by=lambda each: each.id).map(tuple),
)


@given(configurations)
def test_what_is_kept_is_what_was_told(configuration: HostConfiguration) -> None:
    assert check_configuration(configuration) == configuration
    assert decode_configuration(encode_configuration(configuration)) == configuration


def test_a_host_that_never_heard_a_store_has_the_default_policy() -> None:
    assert check_configuration(HostConfiguration()).policy == "default"


HOSTILE: dict[str, HostConfiguration] = {
    "a generation below nothing": HostConfiguration(generation=-1),
    "a generation beyond any": HostConfiguration(generation=1 << 62),
    "a policy that is a path": HostConfiguration(policy="../gold"),
    "a policy without a name": HostConfiguration(policy=""),
    "too many keys": HostConfiguration(keys={f"key{n}": "" for n in range(KEYS_MAX + 1)}),
    "a key of nothing": HostConfiguration(keys={"": "1"}),
    "a key with a line break": HostConfiguration(keys={"a\nb": "1"}),
    "a text without end": HostConfiguration(keys={"retention": "x" * (TEXT_CHARACTERS_MAX + 1)}),
    "too many groups": HostConfiguration(groups=tuple(group(n) for n in range(1, GROUPS_MAX + 2))),
    "one group twice": HostConfiguration(groups=(group(), group())),
    "a group of none": HostConfiguration(groups=(group(members=()),)),
    "too many members": HostConfiguration(
        groups=(group(members=tuple(member(n) for n in range(1, MEMBERS_MAX + 2))),),
    ),
    "a member twice": HostConfiguration(groups=(group(members=(member(1), member(1))),)),
    "a coordinator from elsewhere": HostConfiguration(groups=(group(coordinator="f" * 32),)),
    "a group without an id": HostConfiguration(groups=(group(id="shop"),)),
    "a group whose name is a path": HostConfiguration(groups=(group(name="a/b"),)),
    "an interval before now": HostConfiguration(groups=(group(interval_s=-1.0),)),
    "points of applications before now": HostConfiguration(groups=(group(application_interval_s=-1.0),)),
    "points of filesystems without end": HostConfiguration(groups=(group(filesystem_interval_s=float("inf")),)),
    "an interval that is no number": HostConfiguration(groups=(group(interval_s=float("nan")),)),
    "an interval without end": HostConfiguration(groups=(group(interval_s=float("inf")),)),
    "a port beyond any": HostConfiguration(groups=(group(members=(member(1, port=65536),)),)),
    "a member without an id": HostConfiguration(groups=(group(members=(member(1), member(2, machine_id="x"))),)),
    "a member with no name": HostConfiguration(groups=(group(members=(member(1, name=""),)),)),
    "an address with a line break": HostConfiguration(groups=(group(members=(member(1, address="a\nb"),)),)),
    "an address without end": HostConfiguration(groups=(group(members=(member(1, address="a" * 256),)),)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_store_of_ours_says_is_refused(what: str) -> None:
    with pytest.raises(FormatError):
        check_configuration(HOSTILE[what])
    with pytest.raises(FormatError):
        decode_configuration(msgspec.json.encode(HOSTILE[what]))


@given(st.binary(max_size=200))
def test_a_file_of_junk_is_refused(content: bytes) -> None:
    try:
        configuration = decode_configuration(content)
    except FormatError:
        return
    check_configuration(configuration)
