"""Every level there is, in the order in which they run: the cheap ones first."""

from __future__ import annotations

from tests.proof.level import Level
from tests.proof.levels import (
    crash,
    errors,
    fuzz,
    kernel_kills,
    kernel_power,
    kernel_prefixes,
    kernel_syscalls,
    model,
    planted,
    simulation,
)

_BASE: tuple[Level, ...] = (
    crash.LEVEL,
    errors.LEVEL,
    model.LEVEL,
    fuzz.LEVEL,
    simulation.LEVEL,
    kernel_syscalls.LEVEL,
    kernel_prefixes.LEVEL,
    kernel_kills.LEVEL,
    kernel_power.LEVEL,
)
LEVELS: tuple[Level, ...] = (*_BASE, planted.level(_BASE))
