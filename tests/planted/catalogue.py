"""All of them."""

from __future__ import annotations

from tests.planted import Plant, crash, fuzz, kernel, simulation

PLANTS: tuple[Plant, ...] = (*crash.PLANTS, *fuzz.PLANTS, *simulation.PLANTS, *kernel.PLANTS)
