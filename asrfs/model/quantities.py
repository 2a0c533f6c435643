"""Sizes, durations and times as people write them, and back.

Sizes take powers of 1024 (`512M`, `10G`, `4096`), durations `90s`, `5m`, `4h`, `2d`, times RFC 3339. Inside, sizes are
bytes, durations are seconds (float) and times are nanoseconds since 1970 UTC (int).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from asrfs.errors import BadInputError

SECTOR_BYTES = 512
DISK_BYTES_MAX = (1 << 64) - 1
"""FUSE offsets are 64 bits wide; a file's size is signed on Linux, so `check_disk_size` stops below 8 EiB too."""
FILE_BYTES_MAX = (1 << 63) - 1
NS_PER_SECOND = 1_000_000_000

_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50, "E": 1 << 60}
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def parse_size(text: str) -> int:
    """Bytes of a size such as `512M`. Raises BadInputError."""
    match = re.fullmatch(r"(\d{1,20})\s*([KMGTPE]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise BadInputError(f"{text!r} is not a size: write bytes or a number with K, M, G, T, P or E, such as 10G")
    return int(match[1]) * _SIZE_UNITS[match[2].upper()]


def check_disk_size(size_bytes: int, what: str) -> int:
    """Return `size_bytes` if a disk can have it, else raise BadInputError that names `what`."""
    if size_bytes <= 0:
        raise BadInputError(f"{what} would be {size_bytes} bytes: a disk has at least {SECTOR_BYTES}")
    if size_bytes > FILE_BYTES_MAX:
        raise BadInputError(f"{what} would be {size_bytes} bytes: a file on Linux ends at {FILE_BYTES_MAX}")
    if size_bytes % SECTOR_BYTES:
        raise BadInputError(f"{what} would be {size_bytes} bytes: a disk is a multiple of {SECTOR_BYTES}")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """A size for people: `10.0 GiB`."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} EiB"


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `90s`, `5m`, `250ms`. Raises BadInputError."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?)\s*(ms|[smhd]?)", text.strip(), re.IGNORECASE)
    if match is None:
        raise BadInputError(f"{text!r} is not a duration: write a number with ms, s, m, h or d, such as 90s")
    return float(match[1]) * _DURATION_UNITS[match[2].lower()]


def format_duration(seconds: float) -> str:
    """A duration as `parse_duration` takes it, in the largest unit that divides it: `4h`, `90s`."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds > length and seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.12g}s"


def parse_time(text: str) -> int:
    """Nanoseconds since 1970 UTC of an RFC 3339 time; up to nine digits of a second. Raises BadInputError."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)[Tt _](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)", text.strip())
    if match is None:
        raise BadInputError(f"{text!r} is not a time: write RFC 3339, such as 2026-11-21T10:03:07Z or ...07.250+01:00")
    zone = "+00:00" if match[4] in "Zz" else match[4]
    try:
        moment = datetime.fromisoformat(f"{match[1]}T{match[2]}{zone}")
        since = moment - _EPOCH
    except (ValueError, OverflowError) as error:
        raise BadInputError(f"{text!r} is not a time: {error}") from None
    fraction_ns = int((match[3] or "0").ljust(9, "0"))
    return (since.days * 86400 + since.seconds) * NS_PER_SECOND + fraction_ns


def format_time(time_ns: int) -> str:
    """RFC 3339 in UTC with all nine digits, so that what is printed can be given back as a selector."""
    seconds, fraction_ns = divmod(time_ns, NS_PER_SECOND)
    moment = _EPOCH + timedelta(seconds=seconds)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{fraction_ns:09d}Z"
