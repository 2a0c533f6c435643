"""Bugs of tails: what a superseded host wrote is lost, or the history learns of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from asrfs.model.rejoining import FencedTail
from asrfs.protocol.messages import KeptTail
from asrfs.replication import tail_offer
from asrfs.replication.rejoiner import Rejoiner
from replica_store.ingest import tails as ingest_tails
from replica_store.ingest.ingester import Ingester
from replica_store.ingest.tails import TailIngester
from replica_store.vault import tail_keeping, tails, vault
from replica_store.vault.tails import Tail, machine_of, put_tail, tail_of
from replica_store.vault.vault import Vault
from tests.planted import Plant

_HOST = "tests/t4_sim/test_tails.py::"
_STORE = "tests/t4_sim/test_tails_store.py::"
_MODEL = "tests/t3_model/test_tails.py::"


def tail_kept_before_it_is_whole(patch: pytest.MonkeyPatch) -> None:
    """A host is told so behind the first log object."""

    def finish(self: TailIngester) -> KeptTail | None:
        position = self.position
        return KeptTail(lsn=position.lsn, time_ns=position.time_ns) if self._has_records() else None

    patch.setattr(TailIngester, "finish_if_whole", finish)


def whole_tail_only_in_the_catalog(patch: pytest.MonkeyPatch) -> None:
    """No sealed word says that it is whole."""

    def make_whole(vault: Vault, tail: Tail) -> None:
        with vault.catalog.transaction():
            put_tail(vault.catalog, replace(tail, is_whole=True))

    patch.setattr(ingest_tails, "make_whole", make_whole)


def tail_not_adopted(patch: pytest.MonkeyPatch) -> None:
    """Objects that a crash left without a row are passed over."""
    patch.setattr(
        ingest_tails, "adopt_tail", lambda vault, machine_id, epoch: tail_of(vault.catalog, machine_id, epoch)
    )


def tail_not_rebuilt(patch: pytest.MonkeyPatch) -> None:
    """A rebuild looks at histories alone."""
    patch.setattr(tail_keeping, "tail_names", lambda objects, machine_id, epoch=None: [])


def tail_in_the_room_of_the_history(patch: pytest.MonkeyPatch) -> None:
    """Its objects are put among those of the log."""
    patch.setattr(TailIngester, "_check", Ingester._check)


def tail_read_as_the_history(patch: pytest.MonkeyPatch) -> None:
    """Rows are looked up without the tail."""
    patch.setattr(vault.Vault, "_rows", lambda self, machine_id: _History(self, machine_of(machine_id)))


class _History:
    def __init__(self, vault: Vault, machine_id: str) -> None:
        self._catalog, self._id = vault.catalog, machine_id

    def __getattr__(self, name: str) -> Callable[..., object]:
        return lambda _, *arguments: getattr(self._catalog, name)(self._id, *arguments)


def tail_settled_in_memory(patch: pytest.MonkeyPatch) -> None:
    """A host does not write down what became of its tail."""

    async def settled(self: Rejoiner, tail: FencedTail) -> None:
        assert self.fence is not None
        self.fence = msgspec.structs.replace(self.fence, tail=tail)

    patch.setattr(Rejoiner, "tail_settled", settled)


def given_up_tail_offered(patch: pytest.MonkeyPatch) -> None:
    """A host offers what is in no journal any more."""
    patch.setattr(tail_offer, "_given_up", lambda source, rejoiner: None)


def strange_tail_taken_for_its_own(patch: pytest.MonkeyPatch) -> None:
    """A host does not compare the record where it goes on."""
    patch.setattr(tail_offer, "check_same_record", lambda lsn, host_time_ns, store_time_ns: None)


def tail_in_a_gap_listed(patch: pytest.MonkeyPatch) -> None:
    """Whatever is whole is a point."""
    patch.setattr(tails, "gap_at", lambda gaps, lsn: None)


def _plant(apply: Callable[[pytest.MonkeyPatch], None], test: str, shows: str) -> Plant:
    name = apply.__name__.replace("_", "-")
    return Plant(name, (apply.__doc__ or "").strip(), test, 1, apply, shows)


_DIES = f"{_MODEL}test_i3_i7_the_store_dies_after_every_operation_while_a_tail_comes"
_BOTH = f"{_MODEL}test_i6_i7_the_other_side_goes_on_and_neither_shows_in_the_other"

PLANTS: tuple[Plant, ...] = (
    _plant(
        tail_kept_before_it_is_whole, f"{_STORE}test_i7_a_tail_is_kept_and_the_host_is_told", "AssertionError|assert"
    ),
    _plant(whole_tail_only_in_the_catalog, _DIES, "AssertionError"),
    _plant(tail_not_adopted, _DIES, "AssertionError"),
    _plant(tail_not_rebuilt, _BOTH, "NotFoundError|AssertionError"),
    _plant(tail_in_the_room_of_the_history, _BOTH, "AssertionError|a tail is all of one epoch"),
    _plant(tail_read_as_the_history, _BOTH, "Error"),
    _plant(
        tail_settled_in_memory,
        f"{_HOST}test_i7_a_host_that_dies_when_its_tail_is_settled_stays_fenced",
        "AssertionError|assert",
    ),
    _plant(
        given_up_tail_offered,
        f"{_HOST}test_i7_what_was_given_up_is_said_to_be_at_the_host_alone",
        "AssertionError|assert",
    ),
    _plant(
        strange_tail_taken_for_its_own,
        f"{_HOST}test_i7_a_clone_of_which_the_store_has_another_tail_says_so",
        "AssertionError|assert",
    ),
    _plant(tail_in_a_gap_listed, f"{_MODEL}test_i5_a_tail_in_a_gap_is_kept_and_no_point", "AssertionError|assert"),
)
