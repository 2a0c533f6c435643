"""Bugs on purpose. Each must turn its level red: what stays green is a hole in the tests.

A plant changes the product in memory, through a `pytest.MonkeyPatch`, and is taken back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Plant:
    """`level` must find it within `cases` of its units. `text`: what was broken, for the report.

    A level stops at what it finds, so `cases` costs nothing; it is at least 30 times as many as it takes in half of all
    runs, so that by chance none in 10⁹ runs stays green.

    `shows`: a regular expression that the violation's text matches, so that an accident of the patch itself is not
    taken for a catch. `only`: the cases whose label begins with one of these are enough to find it. Where no level can
    see it, `level` is a test instead, "tests/…/test_….py::test_…", which must go red and print what `shows` matches.
    """

    name: str
    text: str
    level: str
    cases: int
    apply: Callable[[pytest.MonkeyPatch], None]
    shows: str = ""
    only: tuple[str, ...] = ()

    @property
    def is_for_a_test(self) -> bool:
        return "::" in self.level
