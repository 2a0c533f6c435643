"""What `asrfs set` can change: names, defaults, and how each value is written.

Overrides are kept as the text a person wrote, so a better default of a later version reaches everyone who did
not choose; reading them makes a `Settings`. A key that is not here is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from asrfs.errors import BadInputError
from asrfs.model.quantities import parse_duration, parse_size

QUOTA_BYTES_MIN = 256 << 20
"""Four segments: less could not hold what is being written, applied and shipped."""
OBJECT_BYTES_MIN = 64 << 10
OBJECT_BYTES_MAX = 32 << 20


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Values that hold for one machine. Sizes in bytes, durations in seconds.

    The journal's quota is `journal_quota_bytes` when that is set, else `journal_quota_percent` of the bytes
    of all disks (see `quota_bytes`). `bandwidth_limit` is bytes per second, 0 for none.
    """

    journal_quota_bytes: int | None = None
    journal_quota_percent: float = 50.0
    object_size: int = 4 << 20
    object_age: float = 0.25
    bandwidth_limit: int = 0
    compression: bool = True
    group_deadline: float = 1.0
    freeze_deadline: float = 10.0

    def quota_bytes(self, provisioned_bytes: int) -> int:
        """Journal quota of a machine whose disks have `provisioned_bytes` together."""
        if self.journal_quota_bytes is not None:
            return self.journal_quota_bytes
        return max(QUOTA_BYTES_MIN, int(provisioned_bytes * self.journal_quota_percent / 100))


DEFAULT_TEXTS = {
    "journal_quota": "50%",
    "object_size": "4M",
    "object_age": "250ms",
    "bandwidth_limit": "none",
    "compression": "zstd",
    "group_deadline": "1s",
    "freeze_deadline": "10s",
}
"""Every key with its default, as it would be written."""


def parse_overrides(overrides: Mapping[str, str]) -> Settings:
    """Settings with these overrides of the defaults. Raises BadInputError that names key and value."""
    values: dict[str, Any] = {}
    for key, text in overrides.items():
        if key not in _PARSERS:
            raise BadInputError(f"{key[:40]!r} is not a setting: choose from {', '.join(sorted(_PARSERS))}")
        try:
            values |= _PARSERS[key](text)
        except BadInputError as error:
            raise BadInputError(f"{key}={text[:40]}: {error}") from None
    return Settings(**values)


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


def _bandwidth(text: str) -> dict[str, Any]:
    limit = 0 if text.lower() in ("none", "off") else parse_size(text.removesuffix("/s"))
    if 0 < limit < 1024:
        raise BadInputError("the limit is bytes per second, at least 1K, or none")
    return {"bandwidth_limit": limit}


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


_PARSERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "journal_quota": _quota,
    "object_size": _object_size,
    "object_age": _duration("object_age", 0.01, 60),
    "bandwidth_limit": _bandwidth,
    "compression": _compression,
    "group_deadline": _duration("group_deadline", 0.05, 60),
    "freeze_deadline": _duration("freeze_deadline", 0.1, 300),
}
