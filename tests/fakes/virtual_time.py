"""Time that passes at once, for tests that use `autojump_clock`."""

from __future__ import annotations

import trio


async def pass_time(seconds: float) -> None:
    """Let virtual time go by: every task runs as far as it would in so many seconds."""
    await trio.sleep(seconds)  # sleep: virtual, nothing waits
