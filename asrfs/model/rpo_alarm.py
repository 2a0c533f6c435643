"""The alarm of an RPO that is not kept: when it is raised and what people are told, the same on both sides."""

from __future__ import annotations

from typing import Literal

from asrfs.model.policy import Policy
from asrfs.model.quantities import format_duration


def rpo_text(achieved_rpo_s: float | None, policy: Policy) -> tuple[Literal["warning", "critical"], str] | None:
    """How bad an achieved RPO is and what to say of it; None if it is kept or not known."""
    if achieved_rpo_s is None or achieved_rpo_s < policy.rpo_warning_s:
        return None
    said = f"{achieved_rpo_s:.0f} s of work are not at the store"
    if achieved_rpo_s >= policy.rpo_critical_s:
        return "critical", f"{said}, which is critical from {format_duration(policy.rpo_critical_s)} on"
    return "warning", f"{said}, which is too much from {format_duration(policy.rpo_warning_s)} on"
