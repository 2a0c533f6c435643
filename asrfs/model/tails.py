"""How a tail is called: what a superseded host wrote and its store never had, kept beside the history. Pure.

Where a person chooses a point, `tail-of-epoch-N` means the disks of that host as it wrote them last.
"""

from __future__ import annotations

import re

_NAME = re.compile(r"tail-of-epoch-(0|[1-9][0-9]{0,9})")


def tail_name(epoch: int) -> str:
    """The name of the point behind all that was written in a superseded epoch."""
    return f"tail-of-epoch-{epoch}"


def tail_epoch(name: str) -> int | None:
    """The epoch of which this is the tail's name; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None
