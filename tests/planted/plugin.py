"""A pytest plugin that plants the bug which the environment names before any test runs: for tests that must go red."""

from __future__ import annotations

import os

import pytest

from tests.planted.catalogue import PLANTS

PLANTED = "ASRFS_PLANTED"


def pytest_configure(config: pytest.Config) -> None:
    (plant,) = (plant for plant in PLANTS if plant.name == os.environ[PLANTED])
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    plant.apply(patch)
