"""The vault's locks: one process writes history; nobody revokes while the catalog is made anew, because what is
committed to a catalog that is about to be replaced would be lost. The kernel frees a lock however its holder ends."""

from __future__ import annotations

import fcntl
import os

from asrfs.errors import RefusedError


class VaultLock:
    """Held from construction to `close`. The file's content is the holder's process id, for people.

    Raises RefusedError at once if another holds it; `meanwhile` and `advice` are its words about that.
    """

    def __init__(self, path: str, meanwhile: str = "being served", advice: str = "stop it first") -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._fd, 20).decode(errors="replace").strip()
            os.close(self._fd)
            raise RefusedError(
                f"{os.path.dirname(path)} is {meanwhile}{f' by process {holder}' if holder else ''}: {advice}"
            ) from None
        os.pwrite(self._fd, f"{os.getpid():<20}\n".encode(), 0)  # in place: needs no space on a full disk

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> VaultLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
