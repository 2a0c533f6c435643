"""What reading the past needs of a vault. `vault.Vault` has it; tests have it in memory. All calls may block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from asrfs.format.log_object import FrameTable, Index, ObjectHeader
from asrfs.model.machine import DiskRecord


class Machine(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def epoch(self) -> int: ...


class LogObject(Protocol):
    """A log object of the listed history. LSNs and times are inclusive."""

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

    def object_head(self, row: Any) -> tuple[ObjectHeader, Index, FrameTable]: ...

    def read_frame(self, row: Any, header: ObjectHeader, table: FrameTable, i: int) -> bytes: ...


class History(ObjectReader, Protocol):
    """The received histories of machines."""

    def machine(self, name: str) -> Machine:
        """Raises NotFoundError."""

    def machines(self) -> Sequence[Machine]: ...

    def objects_of(self, machine_id: str, up_to_lsn: int) -> Sequence[LogObject]:
        """In LSN order, all that hold a record at or below the LSN."""

    def disks_at(self, machine_id: str, lsn: int) -> Sequence[DiskRecord]:
        """The newest DISK record at or below the LSN of each slot."""

    def points(self, machine_id: str) -> Sequence[Point]: ...

    def received_lsn(self, machine_id: str) -> int: ...

    def gap_at(self, machine_id: str, lsn: int) -> object | None:
        """A gap, as text for people, when at this LSN content from before the history is missing."""
