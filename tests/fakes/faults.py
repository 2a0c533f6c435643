"""What can go wrong with an operation of a storage, by its number."""

from __future__ import annotations

import errno
from dataclasses import dataclass

CHANGING = frozenset(
    ("write", "datasync", "punch", "allocate", "truncate", "create", "rename", "link", "unlink", "sync_directory")
)
"""Operations after which a crash can find something new. Reads are counted on their own."""
READING = frozenset(("open", "read"))


@dataclass
class Fault:
    """Make operations fail: the `at`-th (from 0) of `kinds`, or it and all later ones.

    A failing write first puts down `partial` of its bytes, in whole sectors, as a full disk does. Two errors are none
    to the caller: a call with EINTR was interrupted and is made again; one that `is_short` puts down `partial` of its
    bytes and then goes on with the rest. Each leaves a moment at which a crash finds only the first part.
    """

    at: int
    error: int = errno.EIO
    for_ever: bool = False
    kinds: frozenset[str] = CHANGING
    partial: float = 0.0
    is_short: bool = False
    seen: int = 0
    fired: int = 0

    @property
    def goes_on(self) -> bool:
        """Whether the call goes on by itself."""
        return self.is_short or self.error == errno.EINTR

    def strikes(self, kind: str) -> bool:
        if kind not in self.kinds:
            return False
        number, self.seen = self.seen, self.seen + 1
        strikes = number == self.at or (self.for_ever and number > self.at)
        self.fired += strikes
        return strikes
