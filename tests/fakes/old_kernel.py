"""`asrfs` as it runs on a kernel without FUSE_NOTIFY_RESEND: the flag is never agreed on."""

from __future__ import annotations

from asrfs.cli import main
from asrfs.fuse import abi, mount

if __name__ == "__main__":
    mount.WANTED_FLAGS &= ~abi.HAS_RESEND
    main.main()
