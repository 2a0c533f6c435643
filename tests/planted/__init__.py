"""Bugs on purpose. Each must turn its level red: what stays green is a hole in the tests.

A plant changes the product in memory, through a `pytest.MonkeyPatch`, and is taken back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Plant:
    """`level` must find it within `cases` of its units. `text`: what was broken, for the report."""

    name: str
    text: str
    level: str
    cases: int
    apply: Callable[[pytest.MonkeyPatch], None]
