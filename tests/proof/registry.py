"""Every level there is, in the order in which they start: the longest first, so that processes end together."""

from __future__ import annotations

from tests.proof.level import Level
from tests.proof.levels import (
    crash,
    errors,
    fuzz,
    kernel_flaps,
    kernel_freezes,
    kernel_groups,
    kernel_kills,
    kernel_power,
    kernel_prefixes,
    kernel_syscalls,
    model,
    planted,
    simulation,
)

_BASE: tuple[Level, ...] = (
    simulation.LEVEL,
    model.LEVEL,
    fuzz.LEVEL,
    kernel_syscalls.LEVEL,
    kernel_groups.LEVEL,
    kernel_power.LEVEL,
    kernel_kills.LEVEL,
    kernel_flaps.LEVEL,
    kernel_freezes.LEVEL,
    crash.LEVEL,
    errors.LEVEL,
    kernel_prefixes.LEVEL,
)
LEVELS: tuple[Level, ...] = (planted.level(_BASE), *_BASE)
BY_NAME = {level.name: level for level in LEVELS}
