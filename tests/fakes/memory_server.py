"""Serves disks in memory by the direct session until its mount is gone.

`python -m tests.fakes.memory_server DIR NAME=BYTES… [--null]` prints `ready`.
"""

from __future__ import annotations

import sys

from asrfs.fuse.direct import DirectSession
from asrfs.fuse.mount import mount_volume, prepare_directory
from asrfs.fuse.volume import SyncCallback, Volume
from tests.fakes.memory_disk import MemoryDisk, NullDisk


def main(path: str, *words: str) -> None:
    def request_sync(callback: SyncCallback) -> None:
        callback(None)

    kind = NullDisk if "--null" in words else MemoryDisk
    volume = Volume(request_sync)
    for slot, word in enumerate(word for word in words if "=" in word):
        name, _, size = word.partition("=")
        volume.add(name, slot, kind(int(size)))
    prepare_directory(path)
    fd, _ = mount_volume(path)
    session = DirectSession(fd, volume, time_s=1_700_000_000)
    print("ready", flush=True)
    session.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
