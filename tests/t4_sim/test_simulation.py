"""The simulation is what it claims: a history is a function of its seed, its faults strike, and it sees planted bugs.

The histories themselves are a level of `tools/prove`; here are a few of them.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from asrfs.errors import AsrfsError
from tests.planted import Plant
from tests.planted.simulation import PLANTS
from tests.proof.level import Context, Notes
from tests.proof.levels.simulation import LEVEL, history
from tests.proof.run import run_level
from tests.proof.sim.world import prepare

HISTORIES = 80
"""Of 30 one run in a hundred has too few faults by chance; of 80, none of 3,000 drawn from 1,600 histories."""
_PLAY = (
    "import sys; from pathlib import Path; from tests.proof.level import Context, Notes; "
    "from tests.proof.levels.simulation import history; from tests.proof.sim.world import prepare; "
    "root = Path(sys.argv[1]); prepare(root); context = Context(int(sys.argv[2]), root); "
    "[print(history(context, label, Notes(), is_recording=True).digest()) for label in sys.argv[3:]]"
)


@pytest.fixture
def rng_seed(rng: random.Random) -> int:
    """A seed for whole levels, from the run's own."""
    return rng.getrandbits(32)


def test_the_same_seed_is_the_same_history_to_the_byte(scratch: Path, rng_seed: int) -> None:
    """Every operation, step and time in its order, and every byte of every storage and table at the end."""
    prepare(scratch)
    context = Context(rng_seed, scratch)
    for number in range(4):
        first = history(context, f"history {number}", Notes(), is_recording=True)
        second = history(context, f"history {number}", Notes(), is_recording=True)
        assert first.events == second.events
        assert first.digest() == second.digest()
        assert len(first.events) > 100


def test_another_process_plays_the_same_history(scratch: Path, rng_seed: int) -> None:
    """Whatever ran before, and whatever order its sets have."""
    prepare(scratch)
    labels = [f"history {number}" for number in range(4)]
    digests = []
    for hash_seed, order in (("1", labels), ("2", labels[::-1])):
        done = subprocess.run(
            [sys.executable, "-c", _PLAY, str(scratch), str(rng_seed), *order],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        digests.append(dict(zip(order, done.stdout.split(), strict=True)))
    assert digests[0] == digests[1]
    assert len(set(digests[0].values())) == len(labels)


def test_one_case_is_played_again_alone(scratch: Path, rng_seed: int) -> None:
    found = run_level(LEVEL, Context(rng_seed, scratch), wanted=None, seconds_max=None, only="history 3")
    assert not found.violations
    assert found.notes.cases == 1


def test_histories_hold_and_their_faults_strike(scratch: Path, rng_seed: int) -> None:
    outcome = run_level(LEVEL, Context(rng_seed, scratch), wanted=HISTORIES, seconds_max=None)
    assert not outcome.violations, outcome.violations[0]
    struck = Counter(outcome.notes.faults)
    assert len(struck) > len(LEVEL.faults) * 3 // 4
    assert set(struck) <= set(LEVEL.faults)


@pytest.mark.parametrize("name", ["trims before acknowledged", "accepts an old epoch", "ships what is not durable"])
def test_a_planted_bug_turns_it_red(name: str, scratch: Path, rng_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plant: Plant = next(plant for plant in PLANTS if name in plant.name)
    plant.apply(monkeypatch)
    prepare(scratch)
    context = Context(rng_seed, scratch)
    with pytest.raises((AssertionError, AsrfsError)):
        for number in range(plant.cases):
            history(context, f"history {number}", Notes())
