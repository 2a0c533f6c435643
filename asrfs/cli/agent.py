"""How verbs reach the agent of a machine that is being served."""

from __future__ import annotations

from typing import Any

from asrfs.daemon import control
from asrfs.daemon.state import StateDirectory
from asrfs.errors import RefusedError

FOREVER_S = 10 * 365 * 86400.0
_ANSWER_MARGIN_S = 10.0


def call_agent(state: StateDirectory, verb: str, *, seconds_max: float = 30.0, **fields: Any) -> dict[str, Any]:
    """Ask the agent; it may take `seconds_max` to answer. RefusedError if the machine is not being served."""
    if state.lock_holder("supervisor") is None and state.lock_holder("agent") is None:
        raise RefusedError(f"machine {state.load_machine().name} is not being served: start `asrfs serve --mount DIR`")
    return control.call(state.socket_path("agent"), verb, seconds_max=seconds_max + _ANSWER_MARGIN_S, **fields)


def tell_agent_to_reload(state: StateDirectory) -> None:
    """Let a running agent read settings and enrolment again; one that is not running will at its start."""
    if state.lock_holder("agent") is not None:
        control.call(state.socket_path("agent"), "reload")
