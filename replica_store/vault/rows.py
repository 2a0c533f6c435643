"""Rows of the catalog as values. Times are nanoseconds since 1970 UTC, LSNs inclusive."""

from __future__ import annotations

import re
from dataclasses import dataclass

from asrfs.model.machine import DiskRecord
from asrfs.model.marker import Consistency, MarkerRecord

_LOG_NAME = re.compile(
    r"machines/(?P<machine>[0-9a-f]{32})/(?P<room>log|tail)/"
    r"(?P<epoch>[0-9a-f]{8})-(?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16})-(?P<nonce>[0-9a-f]{8})\.obj"
)


@dataclass(frozen=True, slots=True)
class MachineRow:
    """A machine that has enrolled. `serial`: of the one certificate that is good now; `generation` counts enrolments.

    `sealed_keys` can be opened with the vault's master key only.
    """

    id: str
    name: str
    epoch: int
    serial: str
    revoked: bool
    enrolled_ns: int
    generation: int
    sealed_keys: bytes


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """A log object of the history. `is_stretch`: of its LSNs only the last exists, the others have no state. `is_tail`:
    it lies beside the history, see `tails.py`."""

    machine_id: str
    epoch: int
    first_lsn: int
    last_lsn: int
    first_time_ns: int
    last_time_ns: int
    digest: bytes
    length: int
    nonce: str
    is_stretch: bool = False
    is_tail: bool = False

    @property
    def name(self) -> str:
        """Its name among the vault's objects."""
        name = log_object_name(self.machine_id, self.epoch, self.first_lsn, self.last_lsn, self.nonce)
        return name.replace("/log/", "/tail/") if self.is_tail else name


@dataclass(frozen=True, slots=True)
class PointRow:
    """A recovery point: where it lies, and what its marker says. `protected`: kept whatever retention says."""

    machine_id: str
    lsn: int
    epoch: int
    time_ns: int
    marker: MarkerRecord
    protected: bool = False

    @property
    def id(self) -> str:
        return self.marker.id

    @property
    def consistency(self) -> Consistency:
        return self.marker.consistency

    @property
    def group(self) -> str | None:
        return self.marker.group

    @property
    def name(self) -> str | None:
        return self.marker.name


@dataclass(frozen=True, slots=True)
class DiskRow:
    """What holds for the slot `record.slot` from `lsn` on."""

    machine_id: str
    lsn: int
    record: DiskRecord


@dataclass(frozen=True, slots=True)
class LinkRow:
    """What a machine's host last said of itself, and when (`heard_ns`, the store's clock)."""

    machine_id: str
    heard_ns: int
    connected: bool
    appended_lsn: int
    durable_lsn: int
    durable_time_ns: int


@dataclass(frozen=True, slots=True)
class Entry:
    """All that the catalog gets from one log object."""

    row: ObjectRow
    disks: tuple[DiskRow, ...] = ()
    points: tuple[PointRow, ...] = ()
    completions: tuple[PointRow, ...] = ()
    """Not points, but last words on earlier ones."""
    confirmations: tuple[PointRow, ...] = ()
    """Not points, but what makes points of shares: see `cuts.py`."""


def log_object_name(machine_id: str, epoch: int, first_lsn: int, last_lsn: int, nonce: str) -> str:
    return f"{log_prefix(machine_id)}{epoch:08x}-{first_lsn:016x}-{last_lsn:016x}-{nonce}.obj"


@dataclass(frozen=True, slots=True)
class LogName:
    """What the name of a log object says. `is_tail`: it is of a tail."""

    machine_id: str
    epoch: int
    first_lsn: int
    last_lsn: int
    nonce: str
    is_tail: bool = False


def parse_log_name(name: str) -> LogName | None:
    """None for any other name."""
    match = _LOG_NAME.fullmatch(name)
    if match is None:
        return None
    epoch, first_lsn, last_lsn = (int(match[part], 16) for part in ("epoch", "first", "last"))
    return LogName(match["machine"], epoch, first_lsn, last_lsn, match["nonce"], match["room"] == "tail")


def log_prefix(machine_id: str) -> str:
    """What the names of a machine's log objects begin with."""
    return f"machines/{machine_id}/log/"


def tail_prefix(machine_id: str) -> str:
    """What the names of the objects of its tails begin with."""
    return f"machines/{machine_id}/tail/"


def description_prefix(machine_id: str) -> str:
    """What the names of a machine's sealed descriptions begin with."""
    return f"machines/{machine_id}/machine-"
