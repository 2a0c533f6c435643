"""Bugs of going on in a new epoch: something not written down, not compared, not refused, not above what was there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from asrfs.journal.epochs import EpochJournal
from asrfs.journal.hold import WriteHold
from asrfs.model.dirty_map import Reason
from asrfs.model.rejoining import By, Fence, RejoinOrder
from asrfs.replication import rejoiner
from asrfs.replication.filler import Filler
from asrfs.replication.rejoiner import Rejoiner
from replica_store.ingest import session
from replica_store.vault import adoption, epochs
from tests.planted import Plant

_HOST = "tests/t4_sim/test_rejoin.py::"
_STORE = "tests/t4_sim/test_rejoin_store.py::"


def order_kept_in_memory(patch: pytest.MonkeyPatch) -> None:
    """Who wants to rejoin does not write that down."""

    async def ask(self: Rejoiner, by: By, why: str) -> None:
        self.order = RejoinOrder(id="a" * 32, by=by, why=why, time_ns=0)

    patch.setattr(Rejoiner, "ask", ask)


def order_ended_too_early(patch: pytest.MonkeyPatch) -> None:
    """The order is gone before the epoch has begun."""
    sound = Rejoiner.prepare

    async def prepare(self: Rejoiner) -> None:
        await sound(self)
        self._remove(rejoiner.REJOIN_FILE)

    patch.setattr(Rejoiner, "prepare", prepare)


def new_epoch_not_above_the_store(patch: pytest.MonkeyPatch) -> None:
    """LSNs go on behind this host's own."""
    sound = EpochJournal.begin_epoch
    patch.setattr(EpochJournal, "begin_epoch", lambda self, epoch, after_lsn: sound(self, epoch, 0))


def new_epoch_not_synced(patch: pytest.MonkeyPatch) -> None:
    """The header of its first segment is left to whoever syncs next."""

    def sync_locked(self: EpochJournal) -> None:
        self.durable_lsn = self.appended_lsn

    patch.setattr(EpochJournal, "_sync_locked", sync_locked)


def fence_kept_in_memory(patch: pytest.MonkeyPatch) -> None:
    """Who was superseded does not write that down."""

    async def superseded(self: Rejoiner, why: str) -> bool:
        self.fence = Fence(epoch=1, why=why, time_ns=0)
        self._raise_alarm()
        return False

    patch.setattr(Rejoiner, "superseded", superseded)


def fence_without_discards(patch: pytest.MonkeyPatch) -> None:
    """A fenced machine refuses plain writes only."""
    sound = WriteHold._bar
    patch.setattr(WriteHold, "_bar", lambda self, kind: sound(self, kind) if kind == 1 else None)


def gap_closed_without_comparing(patch: pytest.MonkeyPatch) -> None:
    """Nothing is marked, so nothing is missing."""
    sound = Filler.close

    async def close(self: Filler, slots: list[int], note: str) -> bool:
        for slot in slots:
            self.dirty.map.settle(slot, Reason.REJOINED)
        return await sound(self, slots, note)

    patch.setattr(Filler, "close", close)


def compared_with_another_history(patch: pytest.MonkeyPatch) -> None:
    """What was found before an epoch began is believed of it, too."""
    sound = Filler.find_out

    async def find_out(self: Filler, disks: Any) -> None:
        async def found_first(disks: Any) -> Any:
            found = await compare(disks)
            epoch.append(self.progress.epoch)
            self.progress.epoch = epoch[0]
            return found

        compare, self.compare, epoch = self.compare, found_first, [self.progress.epoch]
        await sound(self, disks)
        self.compare, self.progress.epoch = compare, epoch[-1]

    patch.setattr(Filler, "find_out", find_out)


def compared_before_it_was_applied(patch: pytest.MonkeyPatch) -> None:
    """Images are read although records that were given up are not in them."""
    sound = Filler.find_out

    async def find_out(self: Filler, disks: Any) -> None:
        applied, self.progress.applied = self.progress.applied, self.progress.durable
        await sound(self, disks)
        self.progress.applied = applied

    patch.setattr(Filler, "find_out", find_out)


def strange_disks_kept(patch: pytest.MonkeyPatch) -> None:
    """A disk that only the other side had stays in the history as it was."""
    sound = rejoiner.rejoining
    patch.setattr(rejoiner, "rejoining", lambda machine, _at_store: sound(machine, ()))


def diverged_rejoins_by_itself(patch: pytest.MonkeyPatch) -> None:
    """A host that may be one of two does not wait for a person."""
    from asrfs.replication import shipper
    from asrfs.replication.reconciliation import DivergedError, StoreLostError

    patch.setattr(shipper, "StoreLostError", (StoreLostError, DivergedError))


def epoch_only_in_the_catalog(patch: pytest.MonkeyPatch) -> None:
    """No object of the vault knows that an epoch was raised."""
    patch.setattr(epochs, "put_description", lambda vault, row: None)


def late_hello_raises_again(patch: pytest.MonkeyPatch) -> None:
    """Each HELLO that wants to rejoin gets an epoch of its own."""
    patch.setattr(session, "granted_before", lambda hello, epoch, granted: None)


def catalog_set_back_keeps_its_epoch(patch: pytest.MonkeyPatch) -> None:
    """Objects are taken in again, and not the epoch they are of."""
    sound = adoption.replace
    patch.setattr(adoption, "replace", lambda row, **fields: sound(row))


def _plant(apply: Callable[[pytest.MonkeyPatch], None], test: str, shows: str) -> Plant:
    name = apply.__name__.replace("_", "-")
    return Plant(name, (apply.__doc__ or "").strip(), test, 1, apply, shows)


_KILLED = f"{_HOST}test_i2_and_i9_a_host_killed_or_without_power_at_any_step_of_rejoining"

PLANTS: tuple[Plant, ...] = (
    _plant(order_kept_in_memory, _KILLED, "AssertionError"),
    _plant(order_ended_too_early, _KILLED, "AssertionError"),
    _plant(new_epoch_not_above_the_store, f"{_HOST}test_i5_and_i9_a_host_goes_on_in_a_new_epoch", "AssertionError"),
    _plant(new_epoch_not_synced, _KILLED, "IntegrityError|AssertionError"),
    _plant(
        fence_kept_in_memory, f"{_HOST}test_i6_who_is_superseded_writes_that_down_and_asks_no_more", "AssertionError"
    ),
    _plant(
        fence_without_discards,
        "tests/t1_unit/test_write_hold.py::test_i6_a_fenced_machine_takes_no_changes_and_holds_nothing",
        "DID NOT RAISE",
    ),
    _plant(
        gap_closed_without_comparing,
        f"{_HOST}test_i5_the_gap_stays_open_until_disks_were_compared_in_the_epoch_that_goes_on",
        "I5|Error",
    ),
    _plant(
        compared_with_another_history,
        f"{_HOST}test_i5_the_gap_stays_open_until_disks_were_compared_in_the_epoch_that_goes_on",
        "I5: it was compared with another history",
    ),
    _plant(
        compared_before_it_was_applied,
        f"{_HOST}test_i5_the_gap_stays_open_until_disks_were_compared_in_the_epoch_that_goes_on",
        "is not in the images yet",
    ),
    _plant(
        strange_disks_kept, f"{_HOST}test_i5_a_disk_that_only_the_store_knows_is_none_of_this_host", "AssertionError"
    ),
    _plant(diverged_rejoins_by_itself, f"{_HOST}test_i7_a_diverged_host_waits_for_a_person", "AssertionError"),
    _plant(
        epoch_only_in_the_catalog,
        f"{_STORE}test_i6_a_rebuild_knows_the_epoch_although_nothing_of_it_has_come",
        "AssertionError",
    ),
    _plant(
        late_hello_raises_again,
        f"{_STORE}test_a_hello_that_comes_late_does_not_supersede_the_host_that_said_it",
        "AssertionError",
    ),
    _plant(
        catalog_set_back_keeps_its_epoch,
        f"{_STORE}test_i6_a_catalog_that_is_set_back_learns_the_epoch_from_its_objects",
        "AssertionError",
    ),
)
