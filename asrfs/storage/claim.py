"""Who uses an image: a mark on the file, so that two state directories never write to the same one.

A regular file carries the mark as the extended attribute `user.asrfs.claim`. Block devices and filesystems without user
attributes carry none; there only the disk server's lock on the open image protects, while it is served.
"""

from __future__ import annotations

import errno
import os

_ATTRIBUTE = "user.asrfs.claim"
_NO_ATTRIBUTES = (errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS)


def claim(path: str, owner: str) -> str | None:
    """Mark the image at `path` as used by `owner`. If another uses it: returns that mark and changes nothing."""
    try:
        os.setxattr(path, _ATTRIBUTE, owner.encode(), os.XATTR_CREATE)
    except OSError as error:
        if error.errno in _NO_ATTRIBUTES:
            return None
        if error.errno != errno.EEXIST:
            raise
        present = os.getxattr(path, _ATTRIBUTE).decode(errors="replace")
        return None if present == owner else present
    return None


def release(path: str, owner: str) -> None:
    """Take the mark of `owner` away; nothing happens if it is not there or the file is gone."""
    try:
        if os.getxattr(path, _ATTRIBUTE) == owner.encode():
            os.removexattr(path, _ATTRIBUTE)
    except OSError as error:
        if error.errno not in (*_NO_ATTRIBUTES, errno.ENODATA, errno.ENOENT):
            raise
