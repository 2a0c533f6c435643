"""What a store tells each of its hosts to do: a policy, and the consistency groups it belongs to.

The store sends the whole of it each time, the host keeps the last one it was told (`configuration.json`) and follows it
also while the store is away. Texts of policies are as people wrote them; `model/policy.py` says what they mean. What
comes over the wire or from the file is checked here before anybody acts on it.
"""

from __future__ import annotations

import math
import re

import msgspec

from asrfs.errors import FormatError
from asrfs.model.marker import Consistency
from asrfs.model.names import is_id, is_name

POLICY_DEFAULT = "default"
"""The policy of a machine that was assigned no other. There is always one of this name."""
KEYS_MAX = 64
KEY_CHARACTERS_MAX = 64
TEXT_CHARACTERS_MAX = 1000
GROUPS_MAX = 64
MEMBERS_MAX = 256
ADDRESS_CHARACTERS_MAX = 255
PORT_MAX = 65535
GENERATION_END = 1 << 62
INTERVAL_S_MAX = 366 * 86400.0


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A machine of a group and where its others reach it; `address` is empty and `port` 0 while that is not known.

    `serial`: of its one certificate that is good, in hexadecimal digits.
    """

    machine_id: str
    name: str
    address: str = ""
    port: int = 0
    serial: str = ""


class GroupOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A consistency group as each of its members is told of it. `coordinator`: machine id of the member that cuts.

    Seconds between scheduled points, 0 for none: `interval_s` of those of `consistency`, which is `crash`; the others
    say of which. `partial`: whether a point that not all members are in may be kept, labelled so. `generation` rises
    with each change of who belongs to it or coordinates it.
    """

    id: str
    name: str
    coordinator: str
    members: tuple[Member, ...]
    consistency: Consistency = "crash"
    interval_s: float = 0.0
    filesystem_interval_s: float = 0.0
    application_interval_s: float = 0.0
    partial: bool = False
    generation: int = 0

    def intervals_s(self) -> dict[Consistency, float]:
        """Seconds between scheduled points, by kind, without those that are off."""
        intervals: dict[Consistency, float] = {
            self.consistency: self.interval_s,
            "filesystem": self.filesystem_interval_s,
            "application": self.application_interval_s,
        }
        return {kind: interval_s for kind, interval_s in intervals.items() if interval_s}


class HostConfiguration(msgspec.Struct, frozen=True, kw_only=True):
    """All a store wants of one host. `generation` rises with each change at the store; 0: no store has said anything.

    `keys`: what the policy called `policy` sets, as it was written; what it does not set is at its default.
    """

    generation: int = 0
    policy: str = POLICY_DEFAULT
    keys: dict[str, str] = {}
    groups: tuple[GroupOrder, ...] = ()


def check_configuration(configuration: HostConfiguration) -> HostConfiguration:
    """Return what a store may send, else raise FormatError. Whether texts of keys can be read is not looked at."""
    if not 0 <= configuration.generation < GENERATION_END:
        raise FormatError(f"a configuration cannot have the generation {configuration.generation}")
    if not is_name(configuration.policy):
        raise FormatError(f"a configuration names its policy {configuration.policy[:40]!r}")
    keys = configuration.keys
    if len(keys) > KEYS_MAX or not all(_is_key(key, text) for key, text in keys.items()):
        raise FormatError(f"policy {configuration.policy} of a configuration has {len(keys)} keys, or some too long")
    groups = configuration.groups
    if len(groups) > GROUPS_MAX or len({group.id for group in groups}) < len(groups):
        raise FormatError(f"a configuration with {len(groups)} groups, or one group twice, is not acceptable")
    for group in groups:
        _check_group(group)
    return configuration


def _is_key(key: str, text: str) -> bool:
    return 0 < len(key) <= KEY_CHARACTERS_MAX and len(text) <= TEXT_CHARACTERS_MAX and key.isprintable()


def _check_group(group: GroupOrder) -> None:
    if not is_id(group.id) or not is_name(group.name):
        raise FormatError(f"a group of a configuration has the id {group.id[:40]!r} and name {group.name[:40]!r}")
    if not 0 <= group.generation < GENERATION_END:
        raise FormatError(f"group {group.name} cannot have the generation {group.generation}")
    for interval_s in (group.interval_s, group.filesystem_interval_s, group.application_interval_s):
        if not 0 <= interval_s <= INTERVAL_S_MAX:  # False for what is not a number, too
            raise FormatError(f"group {group.name} would be cut every {interval_s} s")
    ids = {member.machine_id for member in group.members}
    if not 0 < len(group.members) <= MEMBERS_MAX or len(ids) < len(group.members):
        raise FormatError(f"group {group.name} has {len(group.members)} members, or one of them twice")
    if group.coordinator not in ids:
        raise FormatError(f"the coordinator of group {group.name} is not one of its members")
    for member in group.members:
        has_place: object = len(member.address) <= ADDRESS_CHARACTERS_MAX and member.address.isprintable()
        has_place = has_place and 0 <= member.port <= PORT_MAX and re.fullmatch(r"[0-9a-f]{0,40}", member.serial)
        if not (is_id(member.machine_id) and is_name(member.name) and has_place):
            raise FormatError(f"group {group.name} has a member {member.name[:40]!r} that cannot be")


def decode_configuration(content: bytes) -> HostConfiguration:
    """The configuration in a file. Raises FormatError."""
    try:
        return check_configuration(msgspec.json.decode(content, type=HostConfiguration))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"a configuration cannot be read: {error}") from None


def encode_configuration(configuration: HostConfiguration) -> bytes:
    assert all(
        math.isfinite(interval_s) for group in configuration.groups for interval_s in group.intervals_s().values()
    )
    return msgspec.json.format(msgspec.json.encode(configuration), indent=2) + b"\n"
