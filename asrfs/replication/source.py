"""What a machine ships from: its journal and positions, and what holds for sending. Outlives connections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import trio

from asrfs.journal.reader import JournalReader
from asrfs.model.configuration import HostConfiguration
from asrfs.model.dirty_map import GivenUp
from asrfs.model.rejoining import RejoinOrder
from asrfs.protocol.messages import Handover, Promote
from asrfs.replication.object_builder import ObjectBuilder
from asrfs.replication.outlet import Outlet
from asrfs.replication.positions_file import PositionsFile
from asrfs.replication.progress import Progress
from asrfs.replication.rejoiner import Rejoiner
from asrfs.replication.seeding import Seeds
from asrfs.storage.interface import Storage

T = TypeVar("T")


class ShippingSettings(NamedTuple):
    """Bytes of records in an object, seconds they may wait, zstd or not, bytes per second (0: no limit)."""

    object_size: int = 4 << 20
    object_age: float = 0.25
    compression: bool = True
    bandwidth_limit: int = 0


def _follow_nothing(_configuration: HostConfiguration) -> None:
    """Of a source whose owner takes no word of the store."""


HandoverWanted = Callable[[Handover], None]
"""Told what the store wants; returns at once."""


PromotionWanted = Callable[[Promote], None]


@dataclass(slots=True)
class Source:
    """What sessions ship from; outlives them. `journal_turn` is held while segments are freed or gone back to.

    `configured` is told what the store wants of this host, unchecked, and returns at once. `given_up`: by
    the dirty map that is saved. `group_port` and `group_address` are said to the store when a session begins: where
    other members of a group reach this machine. `rejoiner`: by whom this side goes on in a new epoch, if it may.
    `handover`: who is told of planned failovers, `promotion`: of points to be copied back; None where nobody knows what
    that is.
    """

    machine_id: bytes
    machine_name: str
    journal: Storage
    reader: JournalReader
    builder: ObjectBuilder
    positions: PositionsFile
    progress: Progress
    settings: ShippingSettings
    threads: trio.CapacityLimiter
    journal_turn: trio.Lock
    hurry_lsn: int = 0
    configured: Callable[[HostConfiguration], None] = _follow_nothing
    given_up: Callable[[], GivenUp] = GivenUp
    group_port: int = 0
    group_address: str = ""
    outlet: Outlet = field(default_factory=Outlet)
    seeds: Seeds = field(default_factory=Seeds)
    rejoiner: Rejoiner | None = None
    handover: HandoverWanted | None = None
    promotion: PromotionWanted | None = None

    @property
    def order(self) -> RejoinOrder | None:
        """What the next session is to begin a new epoch for, if it is."""
        return self.rejoiner.order if self.rejoiner is not None else None

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self.threads)
