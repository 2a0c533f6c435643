"""Whether a filesystem can say what of a file was written, block by block: for images whose holes mean something.

Files that are spread thin keep that: ext4, xfs, btrfs and tmpfs do. A filesystem that allocates more than a block at a
time, that keeps zeros as holes, or that does not know its holes at all, would make other bytes of them.
"""

from __future__ import annotations

import errno
import os

from asrfs.errors import RefusedError
from asrfs.storage.directory import OpenFile, open_path

_BLOCK_BYTES = 4096
_FILE_BYTES = 1 << 20
_AT = 512 << 10
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def check_holes(directory: str) -> None:
    """Raise RefusedError unless holes of files in `directory` are exact to 4 KiB. Where there is no room to try, it is
    taken to be as before. Raises OSError."""
    path = os.path.join(directory, f".holes-{os.getpid()}")
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
    try:
        file = open_path(path, write=True)
    finally:
        os.unlink(path)
    try:
        is_exact = _is_exact(file)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        return
    finally:
        file.close()
    if not is_exact:
        raise RefusedError(
            f"the filesystem of {directory} does not say which 4 KiB of a file were written: put the state directory "
            "of a recovered machine on ext4, xfs, btrfs or tmpfs"
        )


def _is_exact(file: OpenFile) -> bool:
    """What was written is data, also zeros and also once it is on the disk; what was not or was punched is a hole."""
    file.truncate(_FILE_BYTES)
    written = [(_AT, _BLOCK_BYTES)]
    file.write_at([bytes(2 * _BLOCK_BYTES)], _AT)
    before = list(file.data_extents())
    file.datasync()
    file.punch(_AT + _BLOCK_BYTES, _BLOCK_BYTES)
    return before == [(_AT, 2 * _BLOCK_BYTES)] and list(file.data_extents()) == written
