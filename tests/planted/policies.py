"""Bugs of policies and schedules: told too late or to the wrong one, forgotten, believed unchecked, made up for."""

from __future__ import annotations

import pytest
import trio

from asrfs.consistency.schedule import Kind, Schedule
from asrfs.consistency.scheduled_points import ScheduledPoints
from asrfs.replication import configuration_keeper as keeper_room
from asrfs.replication.configuration_keeper import ConfigurationKeeper
from replica_store.ingest.session import StoreSession
from replica_store.vault import policy_changes
from tests.planted import Plant

_SCHEDULE = "tests/t1_unit/test_schedule.py::"
_SIM = "tests/t4_sim/test_configuration.py::"


def makes_up_for_what_was_missed(patch: pytest.MonkeyPatch) -> None:
    """Each place of the grid that has passed is due, one after the other."""

    def take_due(self: Schedule[Kind], now: float) -> list[Kind]:
        taken = [kind for kind, due in self._due.items() if due <= now]
        for kind in taken:
            self._due[kind] += self._intervals[kind]
        return taken

    patch.setattr(Schedule, "take_due", take_due)


def new_interval_waits_for_the_old_one(patch: pytest.MonkeyPatch) -> None:
    """A change holds only from the next point on."""
    sound = Schedule.change

    def change(self: Schedule[Kind], intervals_s: dict[Kind, float], now: float) -> None:
        due = dict(self._due)
        sound(self, intervals_s, now)
        self._due.update({kind: at for kind, at in due.items() if kind in self._due})

    patch.setattr(Schedule, "change", change)


def a_failed_point_ends_the_schedule(patch: pytest.MonkeyPatch) -> None:
    async def try_one(self: ScheduledPoints, kind: object) -> None:
        await self._make(kind)  # type: ignore[arg-type]

    patch.setattr(ScheduledPoints, "_try_one", try_one)


def follows_unchecked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(keeper_room, "check_configuration", lambda configuration: configuration)


def follows_and_keeps_nothing(patch: pytest.MonkeyPatch) -> None:
    """A restart while the store is away finds defaults."""

    async def save(self: ConfigurationKeeper) -> None:
        self._saved = self._current

    patch.setattr(ConfigurationKeeper, "_save", save)


def told_once(patch: pytest.MonkeyPatch) -> None:
    """A host hears of a change when it connects again."""
    sound = StoreSession._configure

    async def configure(self: StoreSession) -> None:
        configurations = self._store.configurations

        class Deaf:
            """Knows of no change."""

            generation = 0
            of = configurations.of

            async def newer_than(self, _generation: int) -> None:
                await trio.sleep_forever()

        patch.setattr(self._store, "configurations", Deaf())
        await sound(self)

    patch.setattr(StoreSession, "_configure", configure)


def no_object_of_the_policies(patch: pytest.MonkeyPatch) -> None:
    """Only the catalog knows them."""
    sound = policy_changes._change

    def change(vault: policy_changes.Vault, *arguments: object) -> object:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(vault.objects, "put", lambda name, pieces: None)
            return sound(vault, *arguments)  # type: ignore[arg-type]

    patch.setattr(policy_changes, "_change", change)


PLANTS: tuple[Plant, ...] = tuple(
    Plant(apply.__name__.replace("_", "-"), text, level, 1, apply, shows)
    for apply, text, level, shows in (
        (
            makes_up_for_what_was_missed,
            "points that were missed are made up for",
            f"{_SCHEDULE}test_what_was_missed_is_not_made_up_for",
            "one, however many were missed|AssertionError",
        ),
        (
            new_interval_waits_for_the_old_one,
            "a new interval waits for the end of the old one",
            f"{_SCHEDULE}test_a_new_interval_holds_at_once",
            "AssertionError|assert",
        ),
        (
            a_failed_point_ends_the_schedule,
            "a point that fails ends the schedule",
            "tests/t4_sim/test_scheduler.py::test_a_failed_point_is_told_tried_again_at_the_next_time_and_ends_nothing",
            "TemporaryError",
        ),
        (
            follows_unchecked,
            "what the store tells is followed unchecked",
            f"{_SIM}test_what_makes_no_sense_is_passed_over",
            "AssertionError|assert",
        ),
        (
            follows_and_keeps_nothing,
            "what the store told is forgotten at a restart",
            f"{_SIM}test_what_was_told_holds_after_a_restart_and_a_power_loss",
            "the store is not there, and its word goes on",
        ),
        (
            told_once,
            "a change is told at the next connection only",
            f"{_SIM}test_a_host_is_told_after_its_welcome_and_within_a_second_of_each_change",
            "TooSlowError",
        ),
        (
            no_object_of_the_policies,
            "policies are in the catalog alone",
            "tests/t2_contract/test_policy_commands.py::test_a_rebuilt_catalog_has_every_policy_and_assignment",
            "older ones do not pile up|after.policies",
        ),
    )
)
