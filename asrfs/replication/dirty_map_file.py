"""The agent's dirty map, and the file that says the same (I4).

    marks set ─▶ saved together with how far records were given up ─▶ only then is anything freed, or a gap shipped

`turn` is held by whoever changes the map, from reading what it goes by to having saved it: giving up sets marks and
filling takes them back, and neither may see half of the other. `given_up` is what the file says, so who frees or ships
by it needs no turn.
"""

from __future__ import annotations

import trio

from asrfs.errors import FormatError, IntegrityError
from asrfs.format.dirty_map import decode_dirty_map, encode_dirty_map
from asrfs.model.dirty_map import DirtyMap, GivenUp
from asrfs.storage.interface import Storage, read_whole, write_atomically


class DirtyMapFile:
    """`name` in `storage`. Made with what the file says, or with `content` in its place; raises IntegrityError when it
    cannot be read."""

    def __init__(self, storage: Storage, name: str, content: tuple[DirtyMap, GivenUp] | None = None) -> None:
        self._storage = storage
        self._name = name
        self.turn = trio.Lock()
        self.map, self._given_up = load_dirty_map(storage, name) if content is None else content

    @property
    def given_up(self) -> GivenUp:
        """What a restart finds."""
        return self._given_up

    def save(self, given_up: GivenUp | None = None) -> None:
        """Make the map durable, and with it that this was given up. Blocks. Raises OSError; then the file is as it was.

        The caller has the turn.
        """
        given_up = self._given_up if given_up is None else given_up
        write_atomically(self._storage, self._name, encode_dirty_map(self.map, given_up))
        self._given_up = given_up


def load_dirty_map(storage: Storage, name: str) -> tuple[DirtyMap, GivenUp]:
    """What the file says; nothing is dirty and nothing given up where there is none. Raises IntegrityError."""
    if not storage.exists(name):
        return DirtyMap(), GivenUp()
    try:
        return decode_dirty_map(read_whole(storage, name), name)
    except FormatError as error:
        raise IntegrityError(f"{error}: what the store lacks cannot be known any more") from None
