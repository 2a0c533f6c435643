"""What every test can have: a scratch directory that is left clean, and randomness that can be replayed."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import hypothesis
import pytest

from tests import sweep

TESTS = Path(__file__).parent
SEED = pytest.StashKey[int]()

hypothesis.settings.register_profile("asrfs", deadline=None, print_blob=True)
hypothesis.settings.load_profile("asrfs")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="play the random tests of an earlier run again")


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its own option
def pytest_configure(config: pytest.Config) -> None:
    # Where these are set, pytest shows the whole difference of two values: for the bytes of a disk that takes hours.
    for name in ("CI", "BUILD_NUMBER"):
        os.environ.pop(name, None)
    seed = config.getoption("--seed")
    if seed is None:
        seed = config.option.seed = random.SystemRandom().randrange(1 << 32)  # so that pytest-xdist's workers have it
    config.stash[SEED] = seed
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.stash[SEED]} (replay with --seed {config.stash[SEED]})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's layer is the directory it lies in; `-m t1` selects one."""
    for item in items:
        layer = re.match(r"t\d(?=_)", str(item.path.relative_to(TESTS))) if TESTS in item.path.parents else None
        if layer:
            item.add_marker(layer[0])


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Randomness of this test alone, from the run's seed and the test's name, whatever ran before."""
    return random.Random(f"{request.config.stash[SEED]} {request.node.nodeid}")


@pytest.fixture(scope="session", autouse=True)
def run_directory() -> Iterator[Path]:
    """The directory this run works in. Sweeps at start after runs that died, at the end after itself."""
    sweep.sweep_dead_runs()
    base = sweep.run_directory(os.getpid())
    base.mkdir(mode=0o700)
    yield base
    sweep.sweep(base)


@pytest.fixture(scope="session")
def make_scratch(run_directory: Path) -> Iterator[Callable[[str], Path]]:
    """Makes scratch directories for fixtures of wider scope; each must be clean at the session's end."""
    numbers = count(1)
    made: list[Path] = []

    def make(name: str) -> Path:
        path = run_directory / f"{next(numbers):03d}-{re.sub(r'[^A-Za-z0-9]+', '-', name)[:24]}"
        path.mkdir(mode=0o700)
        made.append(path)
        return path

    yield make
    left = [str(found) for path in made if path.exists() and (found := sweep.sweep(path))]
    assert not left, f"tests left behind, removed now: {left}"


@pytest.fixture
def scratch(request: pytest.FixtureRequest, make_scratch: Callable[[str], Path]) -> Iterator[Path]:
    """A directory of this test alone. What still runs or is mounted there at the end fails the test."""
    path = make_scratch(request.node.name)
    yield path
    found = sweep.sweep(path)
    assert not found, f"the test left behind, removed now: {found}"
