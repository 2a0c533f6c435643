"""What a vault asks of the place where its objects lie: create-only put, ranged get, list, delete.

Nothing more, so that object stores can do it: no compare-and-swap, no rename, no order in listings. An object never
changes once it is there. Names are parts of `[a-z0-9-]` joined by `/`; the last part ends with `.obj`.

Whatever implements this passes the suite in `tests/t2_contract/test_objects.py`. Calls block and may come from several
threads at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from asrfs.errors import NotFoundError, RefusedError

Bytes = bytes | bytearray | memoryview

SUFFIX = ".obj"
_NAME = re.compile(r"(?:[a-z0-9-]{1,100}/){0,8}[a-z0-9-]{1,100}\.obj")


class ObjectMissingError(NotFoundError):
    """No object has this name."""


class ObjectExistsError(RefusedError):
    """The name is taken; the object there was left as it is."""


class Objects(Protocol):
    """Besides what each call says: NoSpaceError when full, TemporaryError for other trouble of the place below."""

    def put(self, name: str, pieces: Sequence[Bytes]) -> None:
        """Make the object from all pieces. When this returns it is durable under its name; if it raises, no object
        was made, except that a TemporaryError may leave it unknown. Raises ObjectExistsError."""

    def read(self, name: str) -> bytes:
        """All of it. Raises ObjectMissingError."""

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer only where the object ends. Raises ObjectMissingError."""

    def list(self, prefix: str) -> list[str]:
        """Names that begin with `prefix`, in any order."""

    def delete(self, name: str) -> None:
        """Durable when it returns. Nothing happens if there is no such object."""

    def size(self, name: str) -> int:
        """Bytes of the object. Raises ObjectMissingError."""

    def settle(self, prefix: str) -> None:
        """What is visible under this prefix is durable when this returns, also after a process that died in `put`."""

    def where(self, name: str) -> str:
        """Path or URL, for people."""


def is_object_name(name: str) -> bool:
    """Whether a put would have taken this name. Anything else that lies among the objects is somebody else's."""
    return _NAME.fullmatch(name) is not None


def check_object_name(name: str) -> str:
    """A wrong name is our own bug: they are made of ids and numbers only."""
    assert is_object_name(name), f"{name!r} is not the name of an object"
    return name
