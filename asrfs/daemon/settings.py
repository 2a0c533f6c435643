"""What holds on one host: its own settings and the policy it was told, either overridden by `asrfs set`.

Overrides are kept as the text a person wrote, so a better default of a later version reaches everyone who did
not choose; reading them makes a `Settings`. A key that is not here is refused. A policy is the store's word: what of
it cannot be read is left at its default and named, never refused, because nobody here can mend it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from asrfs.errors import BadInputError
from asrfs.model import policy as policies
from asrfs.model.configuration import HostConfiguration
from asrfs.model.policy import STORE_KEYS, Policy, follow_policy, followed_texts, texts_in_force, unknown_key
from asrfs.model.quantities import parse_duration, parse_size

QUOTA_BYTES_MIN = 256 << 20
"""Four segments: less could not hold what is being written, applied and shipped."""
SHARE_BYTES_MIN = 1 << 30
"""A share of small disks is no less than that: they are written again and again, and points are worth a gibibyte."""
QUOTA_BYTES_LEAST = 128 << 20
"""Two segments: where there is no room for that, writes fail for want of space in any case."""
QUOTA_SHARE_OF_ROOM = 0.8
OBJECT_BYTES_MIN = 64 << 10
OBJECT_BYTES_MAX = 32 << 20
RATE_MIN = 1 << 20


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Values that hold for one machine. Sizes in bytes, durations in seconds.

    The journal's quota is `journal_quota_bytes` when that is set, else `journal_quota_percent` of the bytes
    of all disks (see `quota_bytes`). `unfollowed`: a line for each thing the store told that cannot be followed.
    `scan_rate`: bytes a second that comparing may read of images, None to have that depend on whether they are used.
    `hydration_limit`: that are copied from the bases of a recovered machine. Of both, 0 for no limit.
    """

    journal_quota_bytes: int | None = None
    journal_quota_percent: float = 50.0
    object_size: int = 4 << 20
    object_age: float = 0.25
    compression: bool = True
    group_deadline: float = 1.0
    group_port: int = 20004
    group_address: str = ""
    freeze_deadline: float = 10.0
    scan_rate: int | None = None
    hydration: bool = True
    hydration_limit: int = 0
    policy: Policy = Policy()
    unfollowed: tuple[str, ...] = ()

    def quota_bytes(self, provisioned_bytes: int, room_bytes: int) -> int:
        """Journal quota of a machine whose disks have `provisioned_bytes` together.

        `room_bytes`: what the journal holds and what is free beside it. A share of that is never exceeded, whatever
        was chosen.
        """
        quota = self.journal_quota_bytes
        if quota is None:
            quota = max(SHARE_BYTES_MIN, int(provisioned_bytes * self.journal_quota_percent / 100))
        return max(QUOTA_BYTES_LEAST, min(quota, int(room_bytes * QUOTA_SHARE_OF_ROOM)))


_OWN_TEXTS = {
    "journal_quota": "50%",
    "object_size": "4M",
    "object_age": "250ms",
    "compression": "zstd",
    "group_deadline": "1s",
    "group_port": "20004",
    "group_address": "auto",
    "freeze_deadline": "10s",
    "scan_rate": "auto",
    "hydration": "on",
    "hydration_limit": "none",
}
DEFAULT_TEXTS = _OWN_TEXTS | {key: text for key, text in policies.DEFAULT_TEXTS.items() if key not in STORE_KEYS}
"""Every key that can be set here, with its default, as it would be written."""

_TOLD_NOTHING = HostConfiguration()


def parse_overrides(overrides: Mapping[str, str], told: HostConfiguration = _TOLD_NOTHING) -> Settings:
    """Settings with these overrides of defaults and of the policy that was told.

    Raises BadInputError that names every key and value that is wrong by itself. What contradicts something else in the
    policy is named in `unfollowed`: it may be the store that has changed.
    """
    values: dict[str, Any] = {}
    errors = []
    for key, text in overrides.items():
        try:
            values |= _parse(key, text)
        except BadInputError as error:
            errors.append(str(error))
    if errors:
        raise BadInputError("; ".join(errors))
    policy, unfollowed = follow_policy(told.keys | _of_policy(overrides))
    return Settings(**values, policy=policy, unfollowed=tuple(unfollowed))


def check_overrides(
    overrides: Mapping[str, str], taken_back: Iterable[str], told: HostConfiguration, wrong: Iterable[str] = ()
) -> Settings:
    """As `parse_overrides`, for what a person asks for: raises BadInputError for what contradicts the policy, too, and
    for what is `wrong` already."""
    errors = list(wrong)
    for key in taken_back:
        try:
            _check_settable(key)
        except BadInputError as error:
            errors.append(str(error))
    try:
        settings = parse_overrides(overrides, told)
    except BadInputError as error:
        raise BadInputError("; ".join([*errors, str(error)])) from None
    unfollowed_before = follow_policy(told.keys)[1]
    errors += [text for text in settings.unfollowed if text not in unfollowed_before]
    if errors:
        raise BadInputError("; ".join(errors))
    return settings


def shown(overrides: Mapping[str, str], told: HostConfiguration) -> dict[str, dict[str, Any]]:
    """Each key with what is in force, and from where: `default`, `policy NAME` or `set here`, as commands print it.

    `policy`: what the policy says, also where it is overridden.
    """
    by_policy = followed_texts(told.keys)
    values = _OWN_TEXTS | texts_in_force(followed_texts(told.keys | _of_policy(overrides))) | dict(overrides)
    defaults = _OWN_TEXTS | policies.DEFAULT_TEXTS
    return {
        key: {
            "value": values[key],
            "default": default,
            "set": key in overrides,
            "policy": by_policy.get(key),
            "from": "set here" if key in overrides else f"policy {told.policy}" if key in by_policy else "default",
        }
        for key, default in defaults.items()
    }


def _check_settable(key: str) -> None:
    """Raise BadInputError unless this can be set here."""
    if key in STORE_KEYS:
        raise BadInputError(f"{key} is decided at the store: use `replica-store policy set` there")
    if key not in DEFAULT_TEXTS:
        raise BadInputError(unknown_key(key, DEFAULT_TEXTS))


def _of_policy(overrides: Mapping[str, str]) -> dict[str, str]:
    return {key: text for key, text in overrides.items() if key in policies.DEFAULT_TEXTS}


def _parse(key: str, text: str) -> dict[str, Any]:
    """Fields of `Settings` by one override; none by one of the policy, which is only checked."""
    _check_settable(key)
    if key in policies.DEFAULT_TEXTS:
        policies.parse_key(key, text)
        return {}
    try:
        return _PARSERS[key](text)
    except BadInputError as error:
        raise BadInputError(f"{key}={text[:40]}: {error}") from None


def _quota(text: str) -> dict[str, Any]:
    if text.endswith("%"):
        try:
            percent = float(text[:-1])
        except ValueError:
            percent = -1.0
        if not 0.1 <= percent <= 1000:
            raise BadInputError("a percentage is from 0.1% to 1000%")
        return {"journal_quota_bytes": None, "journal_quota_percent": percent}
    size = parse_size(text)
    if size < QUOTA_BYTES_MIN:
        raise BadInputError(f"the journal needs at least {QUOTA_BYTES_MIN >> 20}M")
    return {"journal_quota_bytes": size}


def _object_size(text: str) -> dict[str, Any]:
    size = parse_size(text)
    if not OBJECT_BYTES_MIN <= size <= OBJECT_BYTES_MAX:
        raise BadInputError(f"a log object has {OBJECT_BYTES_MIN >> 10}K to {OBJECT_BYTES_MAX >> 20}M")
    return {"object_size": size}


def _rate(key: str) -> Callable[[str], dict[str, Any]]:
    def parse(text: str) -> dict[str, Any]:
        if text.lower() in ("none", "unlimited"):
            return {key: 0}
        rate = parse_size(text)
        if rate < RATE_MIN:
            raise BadInputError(f"at least {RATE_MIN >> 20}M a second, or none for no limit")
        return {key: rate}

    return parse


def _scan_rate(text: str) -> dict[str, Any]:
    if text.lower() == "auto":
        return {"scan_rate": None}
    return _rate("scan_rate")(text)


def _hydration(text: str) -> dict[str, Any]:
    if text.lower() not in ("on", "off"):
        raise BadInputError("hydration is on or off")
    return {"hydration": text.lower() == "on"}


def _compression(text: str) -> dict[str, Any]:
    if text.lower() not in ("zstd", "on", "none", "off"):
        raise BadInputError("compression is zstd or none")
    return {"compression": text.lower() in ("zstd", "on")}


def _duration(key: str, seconds_min: float, seconds_max: float) -> Callable[[str], dict[str, Any]]:
    def parse(text: str) -> dict[str, Any]:
        seconds = parse_duration(text)
        if not seconds_min <= seconds <= seconds_max:
            raise BadInputError(f"from {seconds_min:g}s to {seconds_max:g}s")
        return {key: seconds}

    return parse


def _group_port(text: str) -> dict[str, Any]:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise BadInputError("a port is a number from 1 to 65535")
    return {"group_port": int(text)}


def _group_address(text: str) -> dict[str, Any]:
    if text.lower() in ("", "auto"):
        return {"group_address": ""}
    if not re.fullmatch(r"[A-Za-z0-9.:_-]{1,255}", text):
        raise BadInputError("the name or address at which other members of a group reach this machine, or auto")
    return {"group_address": text}


_PARSERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "journal_quota": _quota,
    "object_size": _object_size,
    "object_age": _duration("object_age", 0.01, 60),
    "compression": _compression,
    "group_deadline": _duration("group_deadline", 0.05, 60),
    "group_port": _group_port,
    "group_address": _group_address,
    "freeze_deadline": _duration("freeze_deadline", 0.1, 300),
    "scan_rate": _scan_rate,
    "hydration": _hydration,
    "hydration_limit": _rate("hydration_limit"),
}
