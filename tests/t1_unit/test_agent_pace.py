"""How the agent sets its pace: what it takes for much, and when it makes spares rather than wait for freed segments."""

from __future__ import annotations

import pytest

from asrfs.replication.pace import WINDOW_S, Pace
from asrfs.replication.trimmer import RATE_WINDOW_S, RECYCLE_S, SPARES_MAX, SPARES_MIN, Trimmer
from tests.fakes.crash_storage import CrashStorage
from tests.fakes.journal_world import MACHINE_ID


def test_a_pace_is_that_of_the_last_moments() -> None:
    pace = Pace()
    assert pace.bytes_per_s(0) == 0
    for at in range(10):
        pace.note(100, at)
    assert pace.bytes_per_s(9) == 300 / WINDOW_S, "of seconds 7, 8 and 9"
    assert pace.bytes_per_s(9 + WINDOW_S) == 100 / WINDOW_S
    assert pace.bytes_per_s(99) == 0


@pytest.mark.parametrize(("per_s", "made", "kept"), [(0.0, SPARES_MIN, SPARES_MIN), (0.5, 2, 5), (2.0, 4, SPARES_MAX)])
def test_spares_are_made_for_a_moment_and_kept_for_longer(per_s: float, made: int, kept: int) -> None:
    """Under steady writing freed segments are used again; making spares would double what is written."""
    trimmer = Trimmer(CrashStorage(), MACHINE_ID)
    for half in range(41):
        trimmer._seen.append((half / 2, int(half / 2 * per_s)))
    assert trimmer.spares_wanted(20.0, RECYCLE_S) == made
    assert trimmer.spares_wanted(20.0, RATE_WINDOW_S) == kept
