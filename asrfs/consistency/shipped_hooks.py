"""Hooks that come with asrfs: shell scripts, to be read and changed.

They are copied into the machine's own directory of hooks when one is added, because hooks run only from where root
alone can write, and so that a change somebody makes of one is kept.
"""

from __future__ import annotations

import os
from importlib import resources

from asrfs.consistency.hooks import Phase
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import write_atomically

PHASES_OF: dict[str, tuple[Phase, ...]] = {
    "postgresql": ("pre",),
    "mysql": ("hold",),
    "generic": ("pre", "post", "handover"),
}


def install(name: str, directory: str) -> str:
    """Copy a shipped hook into `directory` unless it is there; its path."""
    path = os.path.join(directory, f"{name}.sh")
    if not os.path.exists(path):
        content = resources.files(__package__).joinpath("shipped", f"{name}.sh").read_bytes()
        write_atomically(DirectoryStorage(directory), f"{name}.sh", content)
        os.chmod(path, 0o700)
    return path
