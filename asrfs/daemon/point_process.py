"""Makes one point for which something is quiesced: `python -m asrfs.daemon.point_process --state DIR [--settle]`.

Composition only; the agent starts it and tells it the order as one line of JSON on its standard input, and it answers
with lines of JSON: `held` for a point that somebody else marks, then `outcome` or `failed`. Agent, disk server and
supervisor may die: it goes on, and ends what it began. Should it be killed itself, the watchdog thaws, and the next
one runs its post hooks: what it was doing is written down in `run/point.json`.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from asrfs.consistency.filesystems import Kernel
from asrfs.consistency.freezing import FrozenTogether, KernelFreezer, OpenFilesystem, open_filesystems
from asrfs.consistency.hook_run import adopt_orphans, kill_hooks_of
from asrfs.consistency.hook_sequence import HookSequence
from asrfs.consistency.hooks import HookFiles
from asrfs.consistency.own_files import file_of_ours
from asrfs.consistency.procedure import Held, Outcome, PointOrder, Procedure, Watch
from asrfs.daemon.control import ControlClient
from asrfs.daemon.freeze_watchdog import WatchdogProcess
from asrfs.daemon.hardening import ignore_terminal, raise_file_limit
from asrfs.daemon.state import StateDirectory
from asrfs.errors import AsrfsError, RefusedError, TemporaryError
from asrfs.model.marker import MarkerRecord, encode_marker
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import read_whole, write_atomically
from asrfs.storage.priority import be_usual
from asrfs.storage.system_clock import SystemClock

ORDER_FILE = "run/point.json"
MARKED = b"marked\n"
_TURN_S_MAX = 600.0
_RESTART_S_MAX = 10.0
_RETRY_S = 0.05
_LINE_BYTES_MAX = 1 << 16


class HostPlace:
    """`procedure.Place` of a machine that is served on this host."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._kernel = Kernel()
        self._clock = SystemClock()

    def open_filesystems(self) -> list[OpenFilesystem]:
        served = self._state.load_served()
        if served is None:
            raise RefusedError("the machine has never been served, so none of its filesystems is mounted")
        found = self._kernel.filesystems_on(served.mount)
        if why := file_of_ours(self._kernel, found, self._own_files()):
            raise RefusedError(why)
        return open_filesystems(self._kernel, found)

    def _own_files(self) -> list[tuple[str, str]]:
        state = self._state
        own = [("state directory", state.root), ("journal", state.journal), ("log", state.path("log"))]
        own += [("keys", state.keys), ("images", state.path("images")), ("run directory", state.path("run"))]
        return own + [
            (f"image of disk {disk.name}", state.image_path(disk)) for disk in state.load_machine().live_disks()
        ]

    def together(self, filesystems: Sequence[OpenFilesystem]) -> FrozenTogether:
        return FrozenTogether(filesystems, KernelFreezer(), self._clock)

    def watch(self, filesystems: Sequence[OpenFilesystem]) -> Watch:
        return WatchdogProcess([each.fd for each in filesystems])

    def mark(self, payload: MarkerRecord, not_after: float | None) -> tuple[int, int]:
        """Again if the disk server dies meanwhile: its death is a pause here, too, as long as there is time."""
        limit = self._clock.monotonic() + _RESTART_S_MAX
        limit = limit if not_after is None else min(limit, not_after)
        fields: dict[str, Any] = {"payload": encode_marker(payload), "not_after": not_after}
        while True:
            try:
                left = max(_RETRY_S, limit - self._clock.monotonic())
                with ControlClient(self._state.socket_path("disk_server"), seconds_max=left) as client:
                    reply = client.call("marker", seconds_max=left if not_after is not None else 60.0, **fields)
                return int(reply["lsn"]), int(reply["time_ns"])
            except TemporaryError:
                if self._clock.monotonic() >= limit:
                    raise
            time.sleep(_RETRY_S)

    def wait_external(self, held: Held) -> bool:
        """At the end of its standard input nobody waits any more."""
        say({"held": held})
        left = None if held.deadline is None else max(0.0, held.deadline - self._clock.monotonic())
        return bool(select.select([0], [], [], left)[0]) and os.read(0, len(MARKED)) == MARKED


def hooks_for(state: StateDirectory, order: PointOrder) -> HookSequence:
    """The hooks as they are now. Raises RefusedError, FormatError."""
    facts = {"MACHINE": order.machine, "POINT": order.id, "CONSISTENCY": order.consistency}
    hooks = HookFiles(DirectoryStorage(state.hooks), state.hooks).load()
    return HookSequence(hooks, facts, SystemClock())


def make_point(state: StateDirectory, order: PointOrder) -> Outcome:
    """Raises AsrfsError."""
    place = HostPlace(state)
    has_hooks = order.consistency == "application"
    files = DirectoryStorage(state.root)
    if has_hooks:
        write_atomically(files, ORDER_FILE, msgspec.json.encode(order))
    try:
        return Procedure(order, lambda: hooks_for(state, order), place, SystemClock()).run()
    finally:
        if has_hooks:
            files.unlink(ORDER_FILE)


def settle(state: StateDirectory) -> None:
    """Run the post hooks of a point whose process was killed."""
    files = DirectoryStorage(state.root)
    if not files.exists(ORDER_FILE):
        return
    try:
        order = msgspec.json.decode(read_whole(files, ORDER_FILE), type=PointOrder)
        kill_hooks_of(order.id)
        hooks_for(state, order).end("the process that made the point was killed")
    except (msgspec.MsgspecError, AsrfsError, ValueError) as error:
        print(f"post hooks of a point that was interrupted could not run: {error}", file=sys.stderr)  # noqa: T201
    files.unlink(ORDER_FILE)


def say(fields: dict[str, Any]) -> None:
    """Tell the agent, if it still listens."""
    try:
        os.write(1, msgspec.json.encode(fields) + b"\n")
    except OSError:
        pass


def serve(state: StateDirectory, *, only_settle: bool) -> None:
    line = b"" if only_settle else os.read(0, _LINE_BYTES_MAX)
    deadline = time.monotonic() + _TURN_S_MAX
    while (lock := state.take_lock("point")) is None:
        if time.monotonic() >= deadline:
            raise TemporaryError(f"process {state.lock_holder('point')} is still making another point")
        state.wait_lock_free("point", 1.0)
    try:
        settle(state)
        if not only_settle:
            order = msgspec.json.decode(line, type=PointOrder)
            say({"outcome": make_point(state, order)})
    finally:
        lock.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="asrfs.daemon.point_process")
    parser.add_argument("--state", required=True)
    parser.add_argument("--settle", action="store_true", help="only run the post hooks of one that was killed")
    arguments = parser.parse_args()
    ignore_terminal()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    raise_file_limit()
    adopt_orphans()
    be_usual()
    try:
        serve(StateDirectory.open(arguments.state), only_settle=arguments.settle)
    except AsrfsError as error:
        say({"failed": str(error), "exit_code": error.exit_code})
        return error.exit_code
    except OSError as error:
        say({"failed": f"{error.filename or 'a file'}: {error.strerror}", "exit_code": TemporaryError.exit_code})
        return TemporaryError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
