"""How verbs reach the agent of a machine that is being served."""

from __future__ import annotations

import time
from typing import Any

from asrfs.daemon import control
from asrfs.daemon.processes import tell
from asrfs.daemon.state import StateDirectory
from asrfs.errors import RefusedError

FOREVER_S = 10 * 365 * 86400.0
_ANSWER_MARGIN_S = 10.0
_RESTART_S_MAX = 15.0
_RETRY_S = 0.1


def call_agent(state: StateDirectory, verb: str, *, seconds_max: float = 30.0, **fields: Any) -> dict[str, Any]:
    """Ask the agent; it may take `seconds_max` to answer. RefusedError if the machine is not being served.

    An agent that dies is started again by the supervisor, so its death is a pause: it is asked again.
    """
    deadline = time.monotonic() + _RESTART_S_MAX
    while True:
        is_served = state.lock_holder("supervisor") is not None
        if not is_served and state.lock_holder("agent") is None:
            machine = state.load_machine().name
            raise RefusedError(f"machine {machine} is not being served: start `asrfs serve --mount DIR`")
        try:
            return control.call(state.socket_path("agent"), verb, seconds_max=seconds_max + _ANSWER_MARGIN_S, **fields)
        except control.UnreachableError:
            if not is_served or time.monotonic() >= deadline:
                raise
        time.sleep(_RETRY_S)


def tell_agent_to_reload(state: StateDirectory) -> None:
    """Let a running agent read settings and enrolment again; one that is not running will at its start."""
    tell(state, "agent", "reload")
