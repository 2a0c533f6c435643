"""The process that digests disk images: `python -m asrfs.daemon.digest_process STATE`, started by `digesting`.

Its interpreter and its place in the queues of processor and disk are its own, so that neither the agent nor who writes
waits for it. Requests are a path and a region, answers the digests or why there are none. STATE only says whose it is.
"""

from __future__ import annotations

import os
import sys

import msgspec

from asrfs.daemon.hardening import ignore_terminal
from asrfs.disk.base_file import BaseFile
from asrfs.disk.overlay import WholeView
from asrfs.errors import AsrfsError, TemporaryError
from asrfs.model.digest_tree import Region
from asrfs.replication.image_digests import digest_in_threads
from asrfs.storage.directory import open_path
from asrfs.storage.priority import yield_to_others
from asrfs.transport.working import work


class Order(msgspec.Struct, array_like=True):
    path: str
    size_bytes: int
    first: int
    nodes: int
    base: str = ""
    """Of an image that does not hold all yet."""
    threads: int = 1


class Reply(msgspec.Struct, array_like=True):
    """`failed`: why there are no digests."""

    leaves: bytes = b""
    bytes_read: int = 0
    failed: str = ""


def answer(request: bytes) -> bytes:
    order = msgspec.msgpack.decode(request, type=Order)
    try:
        return msgspec.msgpack.encode(_digest(order))
    except (AsrfsError, OSError) as error:
        return msgspec.msgpack.encode(Reply(failed=f"{order.path} cannot be read: {error}"))


def _digest(order: Order) -> Reply:
    image = open_path(order.path)
    try:
        os.posix_fadvise(image.fd, 0, 0, os.POSIX_FADV_NOREUSE)  # from Linux 6.3 on: what others read stays cached
        whole = WholeView(image, BaseFile(order.base, order.size_bytes)) if order.base else image
        region = Region(order.size_bytes, order.first, order.nodes)
        leaves, bytes_read = digest_in_threads(whole, region, order.threads)
    finally:
        image.close()
    return Reply(leaves, bytes_read)


def main() -> int:
    ignore_terminal()
    yield_to_others()
    try:
        work(answer)
    except OSError:
        return TemporaryError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
