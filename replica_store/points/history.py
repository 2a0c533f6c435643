"""What reading the past needs of a vault. `vault.Vault` has it; tests have it in memory. All calls may block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from asrfs.format.log_object import FrameTable, ObjectHeader
from asrfs.format.object_index import Index
from asrfs.model.machine import DiskRecord
from replica_store.vault.leaf_files import LeavesName
from replica_store.vault.map_files import MapName


class Machine(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def epoch(self) -> int: ...


class LogObject(Protocol):
    """A log object of the listed history. LSNs and times are inclusive. Of a stretch only the last LSN exists."""

    @property
    def name(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def first_lsn(self) -> int: ...
    @property
    def last_lsn(self) -> int: ...
    @property
    def first_time_ns(self) -> int: ...
    @property
    def last_time_ns(self) -> int: ...
    @property
    def digest(self) -> bytes: ...
    @property
    def is_stretch(self) -> bool: ...


class Point(Protocol):
    """A listed recovery point (I5)."""

    @property
    def id(self) -> str: ...
    @property
    def lsn(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def time_ns(self) -> int: ...
    @property
    def consistency(self) -> str: ...
    @property
    def group(self) -> str | None: ...
    @property
    def name(self) -> str | None: ...
    @property
    def protected(self) -> bool: ...


class ObjectReader(Protocol):
    """Opens log objects; used by several threads at once."""

    def object_index(self, row: Any) -> tuple[ObjectHeader, Index]: ...

    def object_head(self, row: Any) -> tuple[ObjectHeader, Index, FrameTable]: ...

    def read_frame(self, row: Any, header: ObjectHeader, table: FrameTable, i: int) -> bytes: ...


class MapPlace(Protocol):
    """Where map checkpoints lie. Calls raise OSError. Who writes or removes has the lock."""

    @property
    def lock(self) -> Callable[[], AbstractContextManager[object]]:
        """Raises RefusedError when somebody has it."""

    def names(self, machine_id: str) -> list[MapName]: ...

    def size(self, machine_id: str, name: MapName) -> int: ...

    def read_range(self, machine_id: str, name: MapName, offset: int, length: int) -> bytes:
        """Fewer bytes only where the file ends."""

    def free_bytes(self) -> int: ...

    def put(self, machine_id: str, name: MapName, pieces: Sequence[bytes]) -> None: ...

    def remove(self, machine_id: str, name: MapName) -> None: ...

    def sweep(self, machine_id: str) -> None: ...


class LeavesPlace(Protocol):
    """Where kept leaves lie. Calls raise OSError."""

    def names(self, machine_id: str) -> list[LeavesName]: ...

    def read(self, machine_id: str, name: LeavesName, bytes_max: int) -> bytes:
        """The whole file, or as much of it."""

    def free_bytes(self) -> int: ...

    def put(self, machine_id: str, name: LeavesName, content: bytes) -> None: ...

    def remove(self, machine_id: str, name: LeavesName) -> None: ...

    def sweep(self, machine_id: str) -> None: ...


class History(ObjectReader, Protocol):
    """The received histories of machines."""

    @property
    def maps(self) -> MapPlace: ...

    @property
    def leaves(self) -> LeavesPlace: ...

    def map_key(self, machine_id: str, salt: bytes) -> bytes:
        """What seals a map checkpoint of this machine with this salt."""

    def leaves_key(self, machine_id: str, salt: bytes) -> bytes:
        """What seals kept leaves of this machine with this salt."""

    def machine(self, name: str) -> Machine:
        """Raises NotFoundError."""

    def machines(self) -> Sequence[Machine]: ...

    def objects_of(self, machine_id: str, up_to_lsn: int, after_lsn: int = 0) -> Sequence[LogObject]:
        """In LSN order, all that hold a record behind `after_lsn` and at or below `up_to_lsn`."""

    def object_with(self, machine_id: str, lsn: int) -> LogObject | None:
        """The one that holds record `lsn`, or stands for it."""

    def disks_at(self, machine_id: str, lsn: int) -> Sequence[DiskRecord]:
        """The newest DISK record at or below the LSN of each slot."""

    def points(self, machine_id: str) -> Sequence[Point]: ...

    def tail(self, machine_id: str, label: str) -> tuple[Machine, Point] | None:
        """The point of that name or id at the end of a tail, beside the history, and the machine as which its past is
        read."""

    def tail_points(self, machine_id: str) -> Sequence[Point]: ...

    def received_lsn(self, machine_id: str) -> int: ...

    def gap_at(self, machine_id: str, lsn: int) -> object | None:
        """A gap, as text for people, when at this LSN content from before the history is missing."""
