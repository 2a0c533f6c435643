"""PURE: what a client is told of an export before it chooses it."""

from __future__ import annotations

from dataclasses import dataclass

from replica_store.nbd.wire import Flag


@dataclass(frozen=True, slots=True)
class Offer:
    """An export's name, size and what it takes. Any byte range of it may be read, and written unless `read_only`."""

    name: str
    size_bytes: int
    read_only: bool
    description: str = ""

    def flags(self, *, structured: bool) -> Flag:
        """Several connections see each other's writes, and a flush on one holds for all: they share one descriptor."""
        flags = Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.CAN_MULTI_CONN
        if structured:
            flags |= Flag.SEND_DF
        if self.read_only:
            return flags | Flag.READ_ONLY
        return flags | Flag.SEND_FUA | Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES
