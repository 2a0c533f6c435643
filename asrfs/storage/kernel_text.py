"""Reading what the kernel says in /proc and /sys.

Paths and names in there are bytes of no certain encoding, chosen by whoever may mount or name anything on this host,
and the kernel writes most of them as they are. So nothing but a newline ends a line, whatever else the libraries of a
language may take for one, and what is no text is kept as `os.fsdecode` keeps it: such a path can be opened.
"""

from __future__ import annotations

import os
from pathlib import Path


def kernel_text(path: str | Path) -> str:
    """All of it, without the newline at its end. Raises OSError."""
    with open(path, "rb") as file:
        return os.fsdecode(file.read().removesuffix(b"\n"))


def kernel_lines(path: str | Path) -> list[str]:
    """Its lines. Raises OSError."""
    text = kernel_text(path)
    return text.split("\n") if text else []
