"""The supervisor, `asrfs serve`: makes the mount, keeps its descriptor, keeps disk server and agent running.

    start:  lock → adopt the disk server that runs, or mount and start one → adopt or start the agent → ready
    stop:   loop devices → unmount → disk server flushes and ends → agent applies and ends → exit 0

It never touches a byte of a disk and never waits for the mount in its own task: the disk server may be away. A disk
server that ends while the mount is there is replaced at once by one that inherits the descriptor. Nothing dies with
the supervisor; the next one finds what runs by the locks in `run/`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import TextIO

import trio

from asrfs.daemon import attachments, processes, unmounting
from asrfs.daemon.control import ControlClient, Fields
from asrfs.daemon.control_trio import call_async, serve_control
from asrfs.daemon.logs import start_logging
from asrfs.daemon.processes import RestartPace, WatchedProcess
from asrfs.daemon.sd_notify import notify
from asrfs.daemon.state import Served, StateDirectory
from asrfs.errors import AsrfsError, IntegrityError, RefusedError, TemporaryError, error_class
from asrfs.fuse import abi
from asrfs.fuse import mount as fuse_mount
from asrfs.model.names import check_path
from asrfs.storage.priority import be_usual

ADOPT_SECONDS_MAX = 30.0
DISK_SERVER_END_SECONDS_MAX = 60.0
AGENT_ANSWER_SECONDS_MAX = 10.0
AGENT_END_SECONDS_MAX = 600.0
_TRY_INTERVAL_S = 0.05
_PREPARE_SECONDS_MAX = 10.0
_LOOK_SECONDS_MAX = 1.0

log = logging.getLogger("asrfs.supervisor")


def run(state: StateDirectory, mount: str) -> int:
    """Serve the machine at `mount` until SIGTERM or SIGINT; the exit code. Raises AsrfsError if it cannot start."""
    mount = check_path(fuse_mount.real_path(mount))
    state.check()
    lock = state.take_lock("supervisor")
    if lock is None:
        machine = state.load_machine().name
        raise RefusedError(f"machine {machine} is already served by process {state.lock_holder('supervisor')}")
    be_usual()
    try:
        start_logging(state, "supervisor", owns_stderr=False)
        return trio.run(Supervisor(state, mount).run)
    finally:
        lock.close()


def say(message: str) -> None:
    """Tell whoever looks at the terminal, and the log."""
    log.warning("%s", message)
    _print(sys.stderr, f"asrfs: {message}")


def _print(stream: TextIO, line: str) -> None:
    try:
        stream.write(line + "\n")
        stream.flush()
    except OSError:
        pass  # nobody listens


class Supervisor:
    """One life of a supervisor. `mount`: an absolute path."""

    def __init__(self, state: StateDirectory, mount: str) -> None:
        self._state = state
        self._mount = mount
        self._fuse_fd = -1
        self._has_resend = False
        self._disk_server: WatchedProcess | None = None
        self._agent: WatchedProcess | None = None
        self._stop = trio.Event()
        self._failure: AsrfsError | None = None
        self._detached = False
        self._stopping_agent = False
        self._disk_server_ended = trio.Event()
        self._agent_code: int | None = None
        self._agent_ended = trio.Event()

    async def run(self) -> int:
        """See `run` of the module."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            await self._start()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_on_signal, signals)
                nursery.start_soon(self._keep_disk_server)
                nursery.start_soon(self._keep_agent)
                verbs = {"hello": self._hello, "stop": self._stop_verb}
                await nursery.start(serve_control, self._state.socket_path("supervisor"), verbs)
                self._say_ready()
                await self._stop.wait()
                code = await self._shut_down()
                nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure
        return code

    # ---- start ------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._disk_server = await self._adopt_disk_server()
        if self._disk_server is None:
            flags = await self._mount_volume()
            try:
                self._state.save_served(Served(mount=self._mount, kernel_flags=flags, has_resend=self._has_resend))
                self._disk_server = await self._spawn_disk_server(resume=False)
            except BaseException:
                self._abandon_mount()
                raise
        else:
            log.info("adopted disk server %d", self._disk_server.pid)
        self._agent = self._find_agent()
        if not self._has_resend:
            say(
                "this kernel is older than 6.9 (no FUSE_NOTIFY_RESEND): "
                "if the disk server dies, programs that use the disks get I/O errors"
            )

    async def _adopt_disk_server(self) -> WatchedProcess | None:
        """The disk server that runs, and its descriptor; None if there is none. Raises RefusedError."""
        deadline = time.monotonic() + ADOPT_SECONDS_MAX
        while (pid := self._state.lock_holder("disk_server")) is not None or await self._is_one_starting():
            if pid is not None and pid == self._state.lock_holder("agent"):
                # The agent of a supervisor that was killed while it stopped: it ends when everything is applied.
                deadline = time.monotonic() + ADOPT_SECONDS_MAX
            if time.monotonic() >= deadline:
                raise RefusedError(f"process {pid} serves the disks of this machine and does not answer: end it first")
            if pid is None:
                await trio.sleep(_TRY_INTERVAL_S)
                continue
            try:
                hello, fd = await trio.to_thread.run_sync(self._ask_for_descriptor)
            except (TemporaryError, OSError):
                await trio.sleep(_TRY_INTERVAL_S)
                continue
            if not fuse_mount.is_connected(fd):  # it is just ending
                os.close(fd)
                await trio.sleep(_TRY_INTERVAL_S)
                continue
            if hello["mount"] != self._mount:
                os.close(fd)
                raise RefusedError(f"the disks are being served at {hello['mount']}: use --mount {hello['mount']}")
            try:
                process = WatchedProcess(hello["pid"])
            except ProcessLookupError:
                os.close(fd)
                continue
            self._fuse_fd, self._has_resend = fd, hello["has_resend"]
            return process
        return None

    async def _is_one_starting(self) -> bool:
        """Whether our mount is there and alive although nobody has the lock: a disk server is just being started."""
        served, mounted = self._state.load_served(), fuse_mount.mount_at(self._mount)
        if served is None or served.mount != self._mount:
            return False
        if mounted is None or mounted.type != fuse_mount.FILESYSTEM_TYPE:
            return False
        try:
            return not await unmounting.in_thread("a look", _LOOK_SECONDS_MAX, fuse_mount.is_dead, self._mount)
        except TemporaryError:
            return True

    def _ask_for_descriptor(self) -> tuple[Fields, int]:
        with ControlClient(self._state.socket_path("disk_server")) as client:
            return client.call_for_descriptor("descriptor")

    async def _mount_volume(self) -> int:
        """Make the mount; the flags the kernel agreed on."""
        await unmounting.in_thread(
            f"looking at {self._mount}", _PREPARE_SECONDS_MAX, fuse_mount.prepare_directory, self._mount
        )
        self._fuse_fd, flags = await trio.to_thread.run_sync(fuse_mount.mount_volume, self._mount)
        self._has_resend = bool(flags & abi.HAS_RESEND)
        return flags

    def _abandon_mount(self) -> None:
        """Take the mount away, if there is one, whatever is going on there; requests under way fail."""
        if self._fuse_fd < 0:
            return
        try:
            fuse_mount.unmount(self._mount, lazily=True)
        except OSError as error:
            log.warning("detaching %s: %s", self._mount, error)
        self._close_descriptor()

    def _close_descriptor(self) -> None:
        """Give up our hold on the connection; the last one to do so ends every request under way."""
        if self._fuse_fd >= 0:
            os.close(self._fuse_fd)
            self._fuse_fd = -1

    async def _spawn_disk_server(self, *, resume: bool) -> WatchedProcess:
        """Start a disk server and wait until it serves. Raises what it could not start for."""
        status, status_of_child = os.pipe2(os.O_CLOEXEC)
        arguments = ["--mount", self._mount, "--fuse-fd", str(self._fuse_fd), "--status-fd", str(status_of_child)]
        arguments += ["--has-resend"] * self._has_resend + ["--resume"] * resume
        try:
            process = processes.spawn(self._state, "disk_server", arguments, (self._fuse_fd, status_of_child))
        except BaseException:
            os.close(status)
            raise
        finally:
            os.close(status_of_child)
        async with trio.lowlevel.FdStream(status) as stream:
            said = b"".join([piece async for piece in stream]).decode(errors="replace").strip()
        if said == "ready":
            return process
        exit_code = await process.wait()
        process.close()
        if said.startswith("failed "):
            _, code, text = said.split(" ", 2)
            raise error_class(int(code))(text)
        raise TemporaryError(
            f"the disk server ended with {exit_code} before it served: see {self._state.log_path('disk_server')}"
        )

    def _find_agent(self) -> WatchedProcess:
        """The agent that runs, else a new one."""
        return processes.adopt(self._state, "agent") or processes.spawn(self._state, "agent", [])

    def _say_ready(self) -> None:
        for lost in attachments.stale(self._state):
            say(str(lost))
        log.info("ready: %s", self._mount)
        _print(sys.stdout, "ready")
        notify("READY=1")

    # ---- while serving ----------------------------------------------------------------------------------------

    async def _stop_on_signal(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            self._stop.set()

    async def _hello(self, request: Fields) -> Fields:
        return {"pid": os.getpid(), "mount": self._mount}

    async def _stop_verb(self, request: Fields) -> Fields:
        self._stop.set()
        return {}

    async def _keep_disk_server(self) -> None:
        """Replace the disk server whenever it ends, as long as the mount is there."""
        pace = RestartPace()
        while True:
            assert self._disk_server is not None
            code = await self._disk_server.wait()
            lived_s = time.monotonic() - self._disk_server.started
            if self._detached or not fuse_mount.is_connected(self._fuse_fd):
                break
            log.warning("disk server %d ended with %s after %.1f s", self._disk_server.pid, code, lived_s)
            dead = self._disk_server
            while not await self._replace_disk_server(pace.delay(lived_s)):
                lived_s = 0.0
            dead.close()
            if self._failure is not None:
                break
            if self._detached:  # meanwhile nobody wanted one any more
                self._disk_server.kill()
        if not self._stop.is_set() and self._failure is None:
            say(f"{self._mount} was unmounted from outside: stopping")
        self._disk_server_ended.set()
        self._stop.set()

    async def _replace_disk_server(self, delay_s: float) -> bool:
        """Start another one after `delay_s`; False if it could not start and may be tried again.

        Once we are stopping there is no delay and one try: it is needed to flush what programs wrote, but who stops
        must not wait for one that cannot start.
        """
        with trio.move_on_after(delay_s):
            await self._stop.wait()
        try:
            if not self._has_resend:
                # Requests that the old one had read would wait for ever: end them, begin anew.
                say("the disk server died: programs that use the disks get I/O errors; mounting again")
                self._abandon_mount()
                await self._mount_volume()
            self._disk_server = await self._spawn_disk_server(resume=self._has_resend)
        except IntegrityError as error:
            self._give_up(error)
        except (AsrfsError, OSError) as error:
            log.error("the disk server could not be started: %s", error)
            if not self._stop.is_set():
                return False
            self._give_up(error if isinstance(error, AsrfsError) else TemporaryError(str(error)))
        return True

    def _give_up(self, error: AsrfsError) -> None:
        say(f"the disk server cannot go on: {error}")
        self._failure = error
        self._abandon_mount()

    async def _keep_agent(self) -> None:
        pace = RestartPace()
        while True:
            assert self._agent is not None
            code = await self._agent.wait()
            lived_s = time.monotonic() - self._agent.started
            if not self._stopping_agent:
                log.warning("agent %d ended with %s after %.1f s", self._agent.pid, code, lived_s)
                await trio.sleep(pace.delay(lived_s))
            if self._stopping_agent:
                self._agent_code = code
                self._agent_ended.set()
                return
            self._agent.close()
            self._agent = self._find_agent()

    # ---- stop -------------------------------------------------------------------------------------------------

    async def _shut_down(self) -> int:
        notify("STOPPING=1")
        if self._failure is None:
            await unmounting.release_loop_devices(self._mount, say)
            await self._unmount()
            self._close_descriptor()
        images_are_current = await self._stop_agent()
        log.info("stopped")
        return 0 if images_are_current else 1

    async def _unmount(self) -> None:
        """Take the mount away and let the disk server end: it flushes first."""
        if not await unmounting.unmount(self._mount, say):
            self._detached = True
            await self._tell_disk_server_to_stop()
        with trio.move_on_after(DISK_SERVER_END_SECONDS_MAX) as waiting:
            await self._disk_server_ended.wait()
        if waiting.cancelled_caught:
            assert self._disk_server is not None
            say(f"the disk server did not end within {DISK_SERVER_END_SECONDS_MAX:g} s: killed")
            self._detached = True
            self._disk_server.kill()
            await self._disk_server_ended.wait()

    async def _tell_disk_server_to_stop(self) -> None:
        try:
            await call_async(self._state.socket_path("disk_server"), "stop", seconds_max=AGENT_ANSWER_SECONDS_MAX)
        except AsrfsError as error:
            log.warning("stopping the disk server: %s", error)

    async def _stop_agent(self) -> bool:
        """Have everything durable applied to the images; whether that was done."""
        assert self._agent is not None
        self._stopping_agent = True
        with trio.move_on_after(AGENT_END_SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell_agent_to_stop)
                await self._agent_ended.wait()
                nursery.cancel_scope.cancel()
        self._agent.kill()
        if self._agent_code == 0:
            return True
        await self._agent_ended.wait()
        log.info("the agent ended with %s: applying what it left", self._agent_code)
        once = processes.spawn(self._state, "agent", ["--apply-only"])
        code = await once.wait()
        once.close()
        if code != 0:
            say(f"the disk images are not up to date: see {self._state.log_path('agent')}; the next start goes on")
        return code == 0

    async def _tell_agent_to_stop(self) -> None:
        """Ask until it listens; what never does is killed."""
        deadline = time.monotonic() + AGENT_ANSWER_SECONDS_MAX
        path = self._state.socket_path("agent")
        while True:
            try:
                await call_async(path, "stop", seconds_max=AGENT_END_SECONDS_MAX)
                return
            except AsrfsError as error:
                if time.monotonic() >= deadline:
                    log.warning("the agent does not answer: %s", error)
                    break
            await trio.sleep(_TRY_INTERVAL_S)
        assert self._agent is not None
        self._agent.kill()
