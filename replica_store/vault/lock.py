"""The vault's lock: one process writes history. The kernel frees it however that process ends."""

from __future__ import annotations

import fcntl
import os

from asrfs.errors import RefusedError


class VaultLock:
    """Held from construction to `close`. The file's content is the holder's process id, for people."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._fd, 20).decode(errors="replace").strip()
            os.close(self._fd)
            raise RefusedError(
                f"{os.path.dirname(path)} is being served{f' by process {holder}' if holder else ''}: stop it first"
            ) from None
        os.pwrite(self._fd, f"{os.getpid():<20}\n".encode(), 0)  # in place: needs no space on a full disk

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> VaultLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
