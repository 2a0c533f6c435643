"""The one place where a test may wait for something it is not told of: a state of another process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds_max: float = 20.0, what: str = "") -> T:
    """Ask `condition` every 20 ms until its answer is true, and return that answer.

    Raises AssertionError after `seconds_max`, naming `what` was awaited and the last answer.
    """
    deadline = time.monotonic() + seconds_max
    while not (answer := condition()):
        assert time.monotonic() < deadline, (
            f"waited {seconds_max} s in vain for {what or condition!r}, last answer {answer!r}"
        )
        time.sleep(0.02)  # sleep: the other process does not tell us
    return answer
