"""What a host keeps about going on in a new epoch, and about having been superseded. Pure.

Both are files of the state directory: an order to rejoin holds until it is carried out or refused, and a fence until
this host rejoins, whoever dies meanwhile.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec

from asrfs.errors import FormatError
from asrfs.model.machine import DiskConfig, DiskRecord, MachineConfig

REJOIN_FILE = "rejoin.json"
FENCE_FILE = "fenced.json"

T = TypeVar("T")
By = Literal["host", "person"]
"""The host orders it itself where nobody can be overwritten by that, because the store lacks what it had. Where two
hosts may be alive, somebody must decide."""
Line = Annotated[str, msgspec.Meta(max_length=1000)]


class RejoinOrder(msgspec.Struct, frozen=True, kw_only=True):
    """`rejoin.json`: who wants it, why, and since when (host's clock). `id`: 32 hexadecimal digits, drawn. `above`:
    what the new epoch must be higher than, beside the host's own and the store's."""

    format: Literal[1] = 1
    id: str
    by: By
    why: Line
    time_ns: int
    above: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0


class Handed(msgspec.Struct, frozen=True, kw_only=True):
    """What the store was told: it has all that guests wrote up to `lsn`, and of so many chunks none differs there."""

    lsn: int
    chunks_compared: int


class FencedTail(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the records that the store did not have when this host was superseded (I7): it keeps them, there
    were none, or they cannot be offered. `text`: the same for people."""

    outcome: Literal["kept", "none", "lost"]
    text: Line


class Fence(msgspec.Struct, frozen=True, kw_only=True):
    """`fenced.json`: another side of the machine goes on, or is about to. `epoch`: this host's, which is over then.

    `handover`: id of the planned failover that this host makes way for. As long as that is not committed the store may
    take the fence back; as long as `handed` is None, and so the store was not told that it may go on, the host may.
    `tail`: None while it is to be offered.
    """

    format: Literal[1] = 1
    epoch: int
    why: Line
    time_ns: int
    handover: Annotated[str, msgspec.Meta(max_length=32)] = ""
    handed: Handed | None = None
    tail: FencedTail | None = None


def decode_order(content: bytes, where: str) -> RejoinOrder:
    """Raises FormatError, naming `where`."""
    return _decode(content, RejoinOrder, where)


def decode_fence(content: bytes, where: str) -> Fence:
    """Raises FormatError, naming `where`."""
    return _decode(content, Fence, where)


def _decode(content: bytes, kind: type[T], where: str) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"{where} cannot be read: {error}") from None


def rejoining(machine: MachineConfig, at_store: tuple[DiskRecord, ...]) -> MachineConfig:
    """The machine whose history goes on behind one of which it knows no more than its disks `at_store`.

    Of each of its disks content is missing there. A disk that only the other history has is none of its own: it is
    removed, and its slot never used.
    """
    change = msgspec.structs.replace
    known = {disk.slot for disk in machine.disks}
    disks = tuple(disk if disk.removed else change(disk, gap=True) for disk in machine.disks)
    strange = tuple(
        DiskConfig(
            slot=record.slot,
            id=record.id,
            name=record.name,
            size_bytes=record.size_bytes,
            removed=True,
            released=True,
        )
        for record in at_store
        if record.slot not in known
    )
    return change(machine, disks=(*disks, *strange))
