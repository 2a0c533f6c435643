"""What is known of the link to the store, for status and for people. Holds no socket and decides nothing."""

from __future__ import annotations

from typing import Literal

LinkState = Literal["not enrolled", "paused", "connecting", "connected", "disconnected", "refused"]


class Link:
    """`reason` says in one line why it is not connected; `store` where it leads."""

    def __init__(self) -> None:
        self.state: LinkState = "not enrolled"
        self.reason = ""
        self.store = ""
        self.connects = 0
        """Sessions the store has welcomed since this process began."""

    def set(self, state: LinkState, reason: str = "") -> None:
        self.state = state
        self.reason = reason
        if state == "connected":
            self.connects += 1
