"""Takes a mount away in good order: filesystems on its loop devices, the loop devices, then the mount itself.

    sync and unmount filesystems → detach loop devices → unmount → else sync, then detach the mount lazily

Each step is bounded, because any of them can hang on a filesystem that is frozen or in use. Whoever uses one has a
few seconds to leave. What cannot be done is said and does not stop the rest.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TypeVar

import trio

from asrfs.daemon import loop_devices
from asrfs.errors import AsrfsError, RefusedError, TemporaryError
from asrfs.fuse import mount as fuse_mount

STEP_SECONDS_MAX = 60.0
BUSY_SECONDS_MAX = 5.0
_BUSY_INTERVAL_S = 0.2

T = TypeVar("T")
Say = Callable[[str], None]


async def in_thread(what: str, seconds_max: float, function: Callable[..., T], *arguments: object) -> T:
    """Run a call that may hang in a thread; TemporaryError naming `what` if it has not returned in time."""
    with trio.move_on_after(seconds_max):
        return await trio.to_thread.run_sync(function, *arguments, abandon_on_cancel=True)
    raise TemporaryError(f"{what} did not end within {seconds_max:g} s")


async def release_loop_devices(mount: str, say: Say) -> None:
    """Unmount what lies on loop devices over files of `mount`, and detach these."""
    try:
        loops = await in_thread("looking for loop devices", STEP_SECONDS_MAX, loop_devices.loop_devices_below, mount)
    except (AsrfsError, OSError) as error:
        say(f"loop devices over {mount} could not be listed: {error}")
        return
    for loop in loops:
        for directory in loop.mounted_on:
            await _try(say, f"unmounting {directory}", loop_devices.unmount, directory, patience_s=BUSY_SECONDS_MAX)
        await _try(say, f"detaching {loop.device}", loop_devices.detach, loop.device)


async def unmount(path: str, say: Say) -> bool:
    """Take the mount away. True: it is gone for everyone; False: hidden, but files of it are still open."""
    try:
        await _patiently(f"unmounting {path}", BUSY_SECONDS_MAX, fuse_mount.unmount, path)
        return True
    except TemporaryError as error:
        say(f"{error}: detaching the mount")
    except OSError as error:
        if error.errno == errno.EINVAL:  # somebody unmounted it before; files of it may be open still
            return False
        if error.errno != errno.EBUSY:
            say(f"unmounting {path} failed: {error.strerror}: detaching the mount")
        else:
            say(f"{path} is still in use: whoever has a disk open will get I/O errors from now on")
    await _try(say, "sync", os.sync)
    await _try(say, f"detaching {path}", lambda: fuse_mount.unmount(path, lazily=True))
    return False


async def _patiently(what: str, patience_s: float, function: Callable[..., object], *arguments: object) -> None:
    """Try again for a while what is refused because somebody uses it. Raises the last refusal."""
    deadline = trio.current_time() + patience_s
    while True:
        try:
            await in_thread(what, STEP_SECONDS_MAX, function, *arguments)
            return
        except (RefusedError, OSError) as error:
            is_busy = isinstance(error, RefusedError) or error.errno == errno.EBUSY
            if not is_busy or trio.current_time() >= deadline:
                raise
        await trio.sleep(_BUSY_INTERVAL_S)


async def _try(
    say: Say, what: str, function: Callable[..., object], *arguments: object, patience_s: float = 0.0
) -> None:
    try:
        await _patiently(what, patience_s, function, *arguments)
    except AsrfsError as error:
        say(str(error))
    except OSError as error:
        say(f"{what} failed: {error.strerror}")
