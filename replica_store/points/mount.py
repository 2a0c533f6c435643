"""A mount of the tree of points, from the check of the directory to the unmount on SIGTERM."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import trio

from asrfs.errors import AsrfsError, BadInputError, NotFoundError, RefusedError
from asrfs.fuse.tree import serve_tree
from replica_store.points.history import History
from replica_store.points.point_disk import FRAME_CACHE_BYTES, FrameCache
from replica_store.points.tree import point_tree


def mount_points(
    history: History,
    mount_point: Path,
    *,
    source: str,
    ready: Callable[[], None],
    report: Callable[[str], None],
    frame_bytes_max: int = FRAME_CACHE_BYTES,
) -> None:
    """Serve the tree until SIGTERM, SIGINT or an unmount by somebody else. Blocks; unmounted when it returns."""
    check_mount_point(mount_point)
    root = point_tree(history, FrameCache(history, frame_bytes_max))
    absolute = os.path.abspath(mount_point)

    async def serve() -> None:
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            await nursery.start(_stop_on_signal, stop)
            await serve_tree(root, absolute, source=source, ready=ready, stop=stop, report=report)
            nursery.cancel_scope.cancel()

    trio.run(serve)


def check_mount_point(path: Path) -> None:
    """Raise unless `path` is an empty directory on which nothing is mounted."""
    try:
        if not path.is_dir():
            if path.exists():
                raise BadInputError(f"{path} is not a directory: name an empty one to mount on")
            raise NotFoundError(f"there is no directory {path}: make it first")
        if os.path.ismount(path):
            raise RefusedError(f"something is mounted on {path} already: unmount it or name another directory")
        if next(path.iterdir(), None) is not None:
            raise RefusedError(f"{path} is not empty: mount on an empty directory")
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise RefusedError(f"a mount on {path} has lost its server: run `umount {path}` first") from None
        raise AsrfsError(f"cannot mount on {path}: {error.strerror}") from None


async def _stop_on_signal(stop: trio.Event, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            stop.set()
