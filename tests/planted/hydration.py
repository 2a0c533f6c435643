"""Bugs of disks over bases: what is in doubt, what a crash leaves, and who may wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from asrfs.daemon.base_readers import BaseReaders
from asrfs.disk.interface import waiting
from asrfs.disk.overlay import BasedImage, KeptImage
from asrfs.model.hydration import HydrationTurn
from asrfs.replication import hydration_file, hydrator
from asrfs.replication.hydration_file import HydrationFile
from asrfs.replication.hydrator import Hydrator, Job
from tests.planted import Plant

_MODEL = "tests/t3_model/test_hydration_model.py"
_POWER = f"{_MODEL}::test_i9_power_lost_between_any_two_operations"
_ALONE = f"{_MODEL}::test_i9_hydrated_disk_is_the_model"
_HOLES = f"{_MODEL}::test_i9_no_hole_is_made_while_a_disk_server_reads_the_base"
_UNIT = "tests/t1_unit/test_overlay.py"
_NOT_EXACT = "I9: (disk|image)"


def doubt_is_not_told(patch: pytest.MonkeyPatch) -> None:
    """A disk server reads what a turn is bringing from the image."""
    patch.setattr(BasedImage, "doubt", lambda self, extents: None)


def doubt_forgotten_at_a_start(patch: pytest.MonkeyPatch) -> None:
    """A disk server that starts takes what a turn has left for what it was to bring."""
    patch.setattr(HydrationTurn, "doubtful", lambda self, disk_id, lsn: ())


def doubt_outlives_what_is_applied(patch: pytest.MonkeyPatch) -> None:
    """A turn that was over before records were applied is in doubt at every start."""

    def doubtful(self: HydrationTurn, disk_id: str, _lsn: int) -> Sequence[tuple[int, int]]:
        return self.extents if self.disk_id == disk_id else ()

    patch.setattr(HydrationTurn, "doubtful", doubtful)


def turn_not_taken_back(patch: pytest.MonkeyPatch) -> None:
    """An agent that starts leaves in the image what a crash has left there of a turn."""
    patch.setattr(HydrationFile, "take_back", lambda self, opened: self.over())


def turn_written_down_in_memory_alone(patch: pytest.MonkeyPatch) -> None:
    """Nothing on the disk says what a turn is about to bring."""
    sound = HydrationFile.begin

    def begin(self: HydrationFile, *arguments: Any) -> HydrationTurn:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(hydration_file, "write_atomically", lambda *_: None)
            return sound(self, *arguments)

    patch.setattr(HydrationFile, "begin", begin)


def turn_over_before_it_is_durable(patch: pytest.MonkeyPatch) -> None:
    """A turn is over when it is written."""

    def write(self: Hydrator, slot: int, pieces: Sequence[tuple[int, memoryview]]) -> None:
        image = self.images.raw(slot)
        assert image is not None
        for at, piece in pieces:
            image.write_at([piece], at)
        self.images.hydration.over()

    patch.setattr(Hydrator, "_write", write)


def discard_over_a_base_makes_a_hole(patch: pytest.MonkeyPatch) -> None:
    """What was discarded is the base again."""
    patch.setattr(KeptImage, "punch", lambda self, offset, length: self.image.punch(offset, length))


def hydrates_what_is_there(patch: pytest.MonkeyPatch) -> None:
    """A turn does not look again whether the applier was there first."""
    sound = hydrator.holes_of

    def absent(self: Job) -> Iterator[tuple[int, int]]:
        assert self.content is not None
        for offset, end in self.content:
            if end > self.at:
                yield from sound(self.map, max(offset, self.at), end)

    patch.setattr(Job, "absent", absent)
    patch.setattr(hydrator, "holes_of", lambda image, offset, end: iter([(offset, end)]))


def holes_before_the_disk_server_knows(patch: pytest.MonkeyPatch) -> None:
    """Zeros become holes while a disk server still takes the disk to have a base."""
    sound = Hydrator._end

    async def end(self: Hydrator, job: Job) -> None:
        self.images.may_punch(job.disk.slot)
        await sound(self, job)

    patch.setattr(Hydrator, "_end", end)


def base_read_in_the_loop(patch: pytest.MonkeyPatch) -> None:
    """Whoever reads the disk waits for the base."""
    sound = BasedImage._take_fetched

    def take(self: BasedImage, absent: Sequence[tuple[int, memoryview]]) -> None:
        self.fetch([(at, at + len(buffer)) for at, buffer in absent])
        sound(self, absent)

    patch.setattr(BasedImage, "_take_fetched", take)


def answers_after_the_end(patch: pytest.MonkeyPatch) -> None:
    """What was fetched when the journal is closed already is done all the same."""

    patch.setattr(BaseReaders, "_do", lambda self, request: waiting(request))


def _plant(test: str, apply: Callable[[pytest.MonkeyPatch], None], shows: str) -> Plant:
    return Plant(apply.__name__.replace("_", "-"), (apply.__doc__ or "").strip(), test, 1, apply, shows=shows)


PLANTS = (
    _plant(_POWER, doubt_is_not_told, _NOT_EXACT),
    _plant(_POWER, doubt_forgotten_at_a_start, _NOT_EXACT),
    _plant(_POWER, doubt_outlives_what_is_applied, _NOT_EXACT),
    _plant(_POWER, turn_not_taken_back, _NOT_EXACT),
    _plant(_POWER, turn_written_down_in_memory_alone, _NOT_EXACT),
    _plant(_POWER, turn_over_before_it_is_durable, _NOT_EXACT),
    _plant(_ALONE, discard_over_a_base_makes_a_hole, _NOT_EXACT),
    _plant(_ALONE, hydrates_what_is_there, _NOT_EXACT),
    _plant(_HOLES, holes_before_the_disk_server_knows, _NOT_EXACT),
    _plant(f"{_UNIT}::test_reading_the_image_never_touches_the_base", base_read_in_the_loop, "DID NOT RAISE"),
    _plant(f"{_UNIT}::test_what_is_not_done_at_the_end_stays_unanswered", answers_after_the_end, "done == "),
)
