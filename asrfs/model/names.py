"""Names are labels and never paths; directories are named by ids.

One pattern for every name a person gives (machine, disk, point, group, policy), checked where it enters and again
where it arrives over the wire.
"""

from __future__ import annotations

import re
from uuid import UUID

from asrfs.errors import BadInputError
from asrfs.model.tails import tail_epoch

NAME_BYTES_MAX = 63
SELECTOR_WORDS = ("latest", "latest-processed", "latest-application")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(name: str, what: str) -> str:
    """Return `name` if it is an allowed name, else raise BadInputError that says what a `what` may be called."""
    if not is_name(name):
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise BadInputError(
            f"{shown!r} cannot be the name of a {what}: "
            f"use 1 to {NAME_BYTES_MAX} letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
    return name


def check_point_name(name: str) -> str:
    """Return `name` if a point may be called so: not like a selector, a tail or an id. Raises BadInputError."""
    check_name(name, "point")
    if name in SELECTOR_WORDS or is_id(name) or tail_epoch(name) is not None:
        raise BadInputError(f"{name!r} cannot be the name of a point: it means something else where points are chosen")
    return name


def is_name(text: str) -> bool:
    """Whether `check_name` allows it."""
    return _NAME.fullmatch(text) is not None


def is_id(text: str) -> bool:
    """Whether `text` is an id as we write them: 32 lower-case hexadecimal digits."""
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def check_path(path: str) -> str:
    """Return a path that can be written down and told to others; it may be any bytes. Raises BadInputError."""
    if any("\udc80" <= character <= "\udcff" for character in path):
        raise BadInputError(f"{path!r} is not UTF-8: choose a path that is")
    return path


def id_bytes(text: str) -> bytes:
    """The 16 bytes of an id. Raises BadInputError if it is not one."""
    if not is_id(text):
        raise BadInputError(f"{text[:80]!r} is not an id: 32 hexadecimal digits are expected")
    return UUID(hex=text).bytes
