"""Bugs of going back in place: a disk that is partly written and served, nothing kept, members that go alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
import trio

from asrfs.daemon import promoting as host
from asrfs.daemon.promoting import Promoter
from asrfs.journal.hold import WriteHold
from asrfs.model.promoting import Promoting
from asrfs.protocol.messages import Promote
from replica_store.ingest.promoting import Promotions
from replica_store.points import changed_since
from replica_store.points.extent_map import without_zeros
from replica_store.vault import promoting as store
from replica_store.vault.promotions import Promotion
from tests.planted import Plant

_HOST = "tests/t4_sim/test_promoting.py::"
_PAIR = "tests/t4_sim/test_promoting_pair.py::"
_STORE = "tests/t4_sim/test_promotions_at_store.py::"
_TABLE = "tests/t1_unit/test_promotions_table.py::"
_SINCE = "tests/t3_model/test_changed_since.py::"


def kept_in_memory(patch: pytest.MonkeyPatch) -> None:
    """That disks are being written is forgotten when the agent dies."""
    sound = Promoter._save

    async def save(self: Promoter, promoting: Promoting) -> None:
        if promoting.phase == "held":
            await sound(self, promoting)
        self.now = promoting

    patch.setattr(Promoter, "_save", save)


def partly_served(patch: pytest.MonkeyPatch) -> None:
    """Guests read disks that are partly written."""
    patch.setattr(Promoting, "is_partial", property(lambda self: False))


def points_between(patch: pytest.MonkeyPatch) -> None:
    """No gap is opened."""
    patch.setattr(host, "with_open_gaps", lambda machine, disks: machine)


def used_all_the_same(patch: pytest.MonkeyPatch) -> None:
    """Nobody looks whether the disks are in use."""

    async def check_unused(self: Promoter) -> None:
        return None

    patch.setattr(Promoter, "_check_unused", check_unused)


def held_for_nobody(patch: pytest.MonkeyPatch) -> None:
    """What nobody asks for any more is held for ever."""

    async def never(self: Promoter) -> None:
        await trio.sleep_forever()

    patch.setattr(Promoter, "_give_up_unasked", never)


def settings_forgotten(patch: pytest.MonkeyPatch) -> None:
    """How the machine is started does not come back."""
    sound = host.restored
    patch.setattr(
        host,
        "restored",
        lambda machine, disks, boot, *, still_open: sound(machine, disks, None, still_open=still_open),
    )


def epochs_overlooked(patch: pytest.MonkeyPatch) -> None:
    """It goes on in another epoch, where nobody knows what differs."""
    sound = Promoter._write

    async def write(self: Promoter, word: Any) -> Any:
        assert self.now is not None
        self.now = msgspec.structs.replace(self.now, epoch=self.progress.epoch)
        return await sound(self, word)

    patch.setattr(Promoter, "_write", write)


def lack_overlooked(patch: pytest.MonkeyPatch) -> None:
    """A disk of which the store lacks something is called whole."""
    sound = host.restored
    patch.setattr(
        host,
        "restored",
        lambda machine, disks, boot, *, still_open: sound(machine, disks, boot, still_open=frozenset()),
    )


def everybody_passes(patch: pytest.MonkeyPatch) -> None:
    """While one thread passes the fence, guests do."""
    sound = WriteHold._bar

    def bar(self: WriteHold, kind: int) -> None:
        if self._passes is None:
            sound(self, kind)

    patch.setattr(WriteHold, "_bar", bar)


def one_is_enough(patch: pytest.MonkeyPatch) -> None:
    """Members go when the first of them is ready."""
    sound = store._while_preparing

    def while_preparing(before: Promotion, member: Any, word: Any, now_ns: int, epoch: int) -> Promotion:
        after = sound(before, member, word, now_ns, epoch)
        return after.to("writing", now_ns, "ready") if word.outcome == "ready" else after

    patch.setattr(store, "_while_preparing", while_preparing)


def let_go_too_early(patch: pytest.MonkeyPatch) -> None:
    """Members are let go when the first of them has written."""
    sound = store._while_writing

    def while_writing(before: Promotion, member: Any, word: Any, now_ns: int) -> Promotion:
        after = sound(before, member, word, now_ns)
        return after.to("releasing", now_ns, "written") if word.outcome == "written" else after

    patch.setattr(store, "_while_writing", while_writing)


def claims_believed(patch: pytest.MonkeyPatch) -> None:
    """A host speaks of records that are not here."""
    sound = store.answered
    patch.setattr(
        "tests.t1_unit.test_promotions_table.answered",
        lambda before, machine_id, word, received, now_ns: sound(before, machine_id, word, 1 << 60, now_ns),
    )


def time_does_not_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(store, "expired", lambda before, now_ns: before)


def rows_believed(patch: pytest.MonkeyPatch) -> None:
    """A row that nobody sealed has a host write over its disks."""
    patch.setattr(store, "sealed_promotion", lambda vault, found: store.promotion(vault.catalog, found))


def anybody_fetches(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Promotions, "check_asked", lambda self, machine_id, wanted: None)


def zeros_overlooked(patch: pytest.MonkeyPatch) -> None:
    """What was zeroed since does not come back."""
    sound = changed_since.paint_runs

    def paint_runs(*arguments: Any) -> Any:
        for painted in sound(*arguments):
            yield {slot: replace(run, extents=without_zeros(run.extents)) for slot, run in painted.items()}

    patch.setattr(changed_since, "paint_runs", paint_runs)


def one_block_too_little(patch: pytest.MonkeyPatch) -> None:
    """Of each piece the last block is left out."""
    sound = changed_since.united

    def united(start: Any, end: Any, size_bytes: int) -> Any:
        found = sound(start, end, size_bytes)
        keep = found.end - found.start > changed_since.BLOCK_BYTES
        return changed_since.Changed(found.start[keep], found.end[keep] - changed_since.BLOCK_BYTES)

    patch.setattr(changed_since, "united", united)


def comes_home_to_it(patch: pytest.MonkeyPatch) -> None:
    """A machine that was failed over is taken back to the point when it comes home."""
    patch.setattr("replica_store.failover.actions.leave_promotions", lambda *_: None)


def begins_by_itself(patch: pytest.MonkeyPatch) -> None:
    """A host that could not begin to write does when it can, though it has said that it had not."""
    sound = Promoter._obey

    async def obey(self: Promoter, word: Promote) -> bool:
        if word.wanted == "write" and self.users():
            await sound(self, word)
            return False
        return await sound(self, msgspec.structs.replace(word, attempt=0))

    patch.setattr(Promoter, "_obey", obey)


def told_unnoted(patch: pytest.MonkeyPatch) -> None:
    """A host is told to write before that is written down."""
    patch.setattr("replica_store.ingest.promoting.begin_attempt", lambda *_: 1)


PLANTS = tuple(
    Plant(f"promote-{name}", text, level, 1, apply, shows)
    for name, text, level, apply, shows in (
        (
            "in-memory",
            "that disks are partly written is forgotten by a death",
            f"{_HOST}test_i2_i5_and_i9_killed_or_without_power_at_any_step",
            kept_in_memory,
            "assert",
        ),
        (
            "partly-served",
            "a disk that is partly written is served",
            f"{_HOST}test_i2_i5_and_i9_killed_or_without_power_at_any_step",
            partly_served,
            "a part of both is served|rewritten while guests may use it",
        ),
        (
            "points-between",
            "points are listed between the old and the new",
            f"{_HOST}test_i5_i7_and_i9_step_by_step",
            points_between,
            "I5: a point between",
        ),
        (
            "in-use",
            "disks that are in use are written over",
            f"{_HOST}test_nothing_is_held_where_it_cannot_be",
            used_all_the_same,
            "assert",
        ),
        (
            "held-for-nobody",
            "a host never writes again where nobody asks for it any more",
            f"{_HOST}test_i8_what_nobody_asks_for_any_more_is_taken_back_unless_something_was_written",
            held_for_nobody,
            "assert",
        ),
        (
            "settings",
            "how the machine is started does not come back",
            f"{_HOST}test_i5_i7_and_i9_step_by_step",
            settings_forgotten,
            "settings come back, too",
        ),
        (
            "epoch",
            "it goes on in another epoch",
            f"{_HOST}test_a_new_epoch_meanwhile_is_not_written_over",
            epochs_overlooked,
            "assert",
        ),
        (
            "lack",
            "a disk of which the store lacks something is called whole",
            f"{_HOST}test_what_the_store_lacks_stays_open",
            lack_overlooked,
            "assert",
        ),
        (
            "everybody-passes",
            "guests write while the disks are brought back",
            "tests/t1_unit/test_write_hold.py::test_i6_behind_the_fence_only_one_thread_writes_and_it_must_be_there",
            everybody_passes,
            "assert",
        ),
        (
            "one-is-enough",
            "a member is written before all are ready",
            f"{_TABLE}test_members_go_together_step_by_step",
            one_is_enough,
            "nobody writes before all are ready",
        ),
        (
            "let-go-too-early",
            "a member is let go before all have written",
            f"{_TABLE}test_members_go_together_step_by_step",
            let_go_too_early,
            "nobody is let go before all have written",
        ),
        (
            "claims",
            "a host's claim that cannot be is believed",
            f"{_TABLE}test_i5_a_claim_that_cannot_be_is_not_believed",
            claims_believed,
            "assert",
        ),
        (
            "no-end",
            "what is never ready is held for ever",
            f"{_STORE}test_i8_what_is_not_ready_in_time_is_taken_back",
            time_does_not_end,
            "assert",
        ),
        (
            "rows",
            "a row that nobody sealed has a host write",
            f"{_STORE}test_a_row_that_was_never_sealed_writes_to_no_host",
            rows_believed,
            "assert",
        ),
        (
            "comes-home",
            "a machine that was failed over is taken back to a point when it comes home",
            f"{_STORE}test_a_machine_that_was_failed_over_is_not_taken_back_to_a_point_when_it_comes_home",
            comes_home_to_it,
            "assert",
        ),
        (
            "by-itself",
            "a host that said that it could not begin to write begins by itself",
            f"{_HOST}test_who_could_not_begin_begins_only_when_he_is_told_again",
            begins_by_itself,
            "not by itself",
        ),
        (
            "told-unnoted",
            "what a host may have begun is cancelled",
            f"{_STORE}test_what_no_host_could_begin_can_be_taken_back",
            told_unnoted,
            "durable before it is said",
        ),
        (
            "anybody-fetches",
            "a host reads any of its past",
            f"{_PAIR}test_who_asks_for_what_no_promotion_gives_back_is_refused",
            anybody_fetches,
            "DID NOT RAISE",
        ),
        (
            "zeros",
            "what was zeroed since does not come back",
            f"{_SINCE}test_only_what_was_written_since_travels",
            zeros_overlooked,
            "assert",
        ),
        (
            "one-block",
            "the last block of what was written does not come back",
            f"{_SINCE}test_only_what_was_written_since_travels",
            one_block_too_little,
            "assert",
        ),
    )
)
