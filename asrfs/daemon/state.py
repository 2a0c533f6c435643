"""The state directory of a machine: its paths, its locks, and the small files that describe it.

Nothing here is on the write path. Every file is replaced atomically and is durable when the call returns;
whoever edits `machine.json` holds `machine.lock` from reading it to replacing it. A process holds the lock of
its role in `run/` for its whole life; the kernel frees it however the process ends, so a lock file that merely
lies there means nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import msgspec

from asrfs.daemon.settings import Settings, check_overrides, parse_overrides
from asrfs.errors import (
    BadInputError,
    FormatError,
    IntegrityError,
    NoSpaceError,
    NotFoundError,
    RefusedError,
    TemporaryError,
)
from asrfs.model.configuration import HostConfiguration, decode_configuration
from asrfs.model.machine import SLOT_MAX, DiskConfig, MachineConfig, check_machine
from asrfs.model.names import check_name, check_path
from asrfs.model.positions import Positions
from asrfs.model.promoting import PROMOTING_FILE
from asrfs.model.recovered import RecoveredMachine, decode_recovered, encode_recovered
from asrfs.model.rejoining import FENCE_FILE
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import read_whole, write_atomically

Role = Literal["supervisor", "disk_server", "agent"]
ROLES: tuple[Role, ...] = ("supervisor", "disk_server", "agent")
LockName = Role | Literal["point"]
"""`point`: whoever is making a point for which something is quiesced."""

MACHINE_FILE = "machine.json"
SETTINGS_FILE = "settings.json"
POSITIONS_FILE = "positions.json"
DIRTY_MAP_FILE = "dirty.map"
POINTS_FILE = "points.jsonl"
CONFIGURATION_FILE = "configuration.json"
RECOVERED_FILE = "recovered.json"
HYDRATION_FILE = "hydration.json"
SERVED_FILE = "run/served.json"
_DIRECTORIES = ("journal", "images", "keys", "run", "log", "hooks")
_LOCK_TRIES = 25
_LOCK_TRY_INTERVAL_S = 0.01

T = TypeVar("T")


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor wrote down about the mount it made. `kernel_flags`: what INIT agreed on."""

    mount: str
    kernel_flags: int = 0
    has_resend: bool = False


class RunLock:
    """A lock held by this process until `close` or its death."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path

    def close(self) -> None:
        os.close(self.fd)


class StateDirectory:
    """One machine's state directory. Opening it reads nothing; `open` and `create` check that it is one."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)

    @classmethod
    def open(cls, root: str) -> StateDirectory:
        """The state directory at `root`. Raises NotFoundError if there is none."""
        state = cls(root)
        if not os.path.isfile(state.path(MACHINE_FILE)):
            raise NotFoundError(f"{state.root} is not a state directory: make one with `asrfs init MACHINE`")
        return state

    @classmethod
    def create(cls, root: str, machine_name: str) -> StateDirectory:
        """Make the state directory of a new machine; the machine exists once `machine.json` does.

        Raises BadInputError for a bad name, RefusedError if `root` has content or is not a directory.
        """
        check_name(machine_name, "machine")
        state = cls(root)
        with state._creating():
            state.save_machine(MachineConfig(id=uuid.uuid4().hex, name=machine_name))
        return state

    @classmethod
    def create_recovered(cls, root: str, recovered: RecoveredMachine) -> StateDirectory:
        """Make the state directory of a machine that goes on from a recovery point, with empty images over its bases.

        The machine exists once `machine.json` does. Raises RefusedError as `create` does, NoSpaceError, BadInputError
        where the filesystem takes no file as long as a disk.
        """
        state = cls(root)
        names = (RECOVERED_FILE, POSITIONS_FILE, MACHINE_FILE)
        with state._creating(*names[:2], *(f".{name}.new" for name in names)):
            machine = recovered.config()
            for disk in machine.live_disks():
                state.make_image(disk, anew=True)
            state._replace(RECOVERED_FILE, encode_recovered(recovered))
            state.save_positions(recovered.positions())
            state.save_machine(machine)
        return state

    @contextmanager
    def _creating(self, *left: str) -> Iterator[None]:
        """Empty directories, and the right to make the machine. `left`: what who died while doing so may have left."""
        check_path(self.root)
        if os.path.lexists(self.path(MACHINE_FILE)):
            raise RefusedError(f"{self.root} is already the state directory of a machine")
        if os.path.lexists(self.root) and not os.path.isdir(self.root):
            raise RefusedError(f"{self.root} is not a directory")
        if os.path.isdir(self.root) and set(os.listdir(self.root)) - {*_DIRECTORIES, "machine.lock", *left}:
            raise RefusedError(f"{self.root} is not empty: choose another directory for the state")
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        os.chmod(self.root, 0o700)
        for name in _DIRECTORIES:
            os.makedirs(self.path(name), mode=0o700, exist_ok=True)
        with self._exclusive("machine.lock"):
            if os.path.lexists(self.path(MACHINE_FILE)):
                raise RefusedError(f"{self.root} is already the state directory of a machine")
            yield

    def check(self) -> None:
        """Raise IntegrityError if a file that serving needs cannot be read.

        Without `positions.json` a journal that lost its beginning or its end could not be told from a whole one (I2).
        What only healing needs is not among them (I8).
        """
        self.load_machine()
        self.load_settings()
        self.load_positions()

    def settle(self) -> None:
        """Make what is found here durable: who wrote it may have died before its last step, which is this one.

        Whoever serves or applies begins with it, so that no power loss takes back what it then relied on, be it a
        position on the strength of which segments are freed. Raises TemporaryError.
        """
        try:
            DirectoryStorage(self.root).sync_directory("")
        except OSError as error:
            raise TemporaryError(f"cannot sync {self.root}: {error.strerror}") from None

    # ---- paths --------------------------------------------------------------------------------------------

    def path(self, *parts: str) -> str:
        """The path of something inside."""
        return os.path.join(self.root, *parts)

    @property
    def journal(self) -> str:
        return self.path("journal")

    @property
    def keys(self) -> str:
        return self.path("keys")

    @property
    def hooks(self) -> str:
        return self.path("hooks")

    def is_enrolled(self) -> bool:
        """Whether a store has let this machine in; `keys/store.json` is the last file that enrolment writes."""
        return os.path.exists(os.path.join(self.keys, "store.json"))

    def is_fenced(self) -> bool:
        """Whether no guest may write: another side of this machine has taken its place, or its disks are being brought
        to another point. Also if the file cannot be read."""
        return os.path.exists(self.path(FENCE_FILE)) or self.is_promoting()

    def check_not_promoting(self) -> None:
        """Raise RefusedError while a point is being copied back over the disks."""
        if self.is_promoting():
            raise RefusedError("a point is being copied back over the disks of this machine: wait until that is over")

    def is_promoting(self) -> bool:
        """Whether a point is being copied back over the disks."""
        return os.path.exists(self.path(PROMOTING_FILE))

    @property
    def points_file(self) -> str:
        return self.path(POINTS_FILE)

    def image_path(self, disk: DiskConfig) -> str:
        """Where the disk's raw image lies: our own sparse file, or the adopted one."""
        return disk.adopted or self.path("images", f"{disk.id}.img")

    def socket_path(self, role: Role) -> str:
        return self.path("run", f"{role}.sock")

    def log_path(self, role: Role) -> str:
        return self.path("log", f"{role}.log")

    # ---- machine.json -------------------------------------------------------------------------------------

    def load_machine(self) -> MachineConfig:
        """Raises NotFoundError or IntegrityError."""
        machine = self._load(MACHINE_FILE, MachineConfig)
        try:
            check_machine(machine)
        except FormatError as error:
            raise IntegrityError(f"{self.path(MACHINE_FILE)}: {error}") from None
        return machine

    def save_machine(self, machine: MachineConfig) -> None:
        """Replace `machine.json`. Only under `edit_machine` or `machine_lock`."""
        self._save(MACHINE_FILE, machine)

    def edit_machine(self, change: Callable[[MachineConfig], MachineConfig]) -> MachineConfig:
        """Replace the machine by `change` of it, under the lock. What `change` raises changes nothing."""
        with self.machine_lock():
            machine = change(self.load_machine())
            self.save_machine(machine)
        return machine

    @contextmanager
    def machine_lock(self) -> Iterator[None]:
        """Wait for and hold the right to edit `machine.json`."""
        with self._exclusive("machine.lock"):
            yield

    @contextmanager
    def enrolment_lock(self) -> Iterator[None]:
        """Wait for and hold the right to enrol: keys and certificate of one enrolment, never of two."""
        with self._exclusive("enrolment.lock"):
            yield

    @contextmanager
    def attachments_lock(self) -> Iterator[None]:
        """Wait for and hold the right to edit what is known of loop devices."""
        with self._exclusive("run/attached.lock"):
            yield

    def make_image(self, disk: DiskConfig, *, anew: bool = False) -> None:
        """Make the sparse image of a new disk of ours, durable, before `machine.json` names the disk.

        `anew`: one that is there was left by who died before that.
        """
        storage = DirectoryStorage(self.path("images"))
        try:
            if anew and storage.exists(f"{disk.id}.img"):
                storage.unlink(f"{disk.id}.img")
            file = storage.create(f"{disk.id}.img")
            try:
                file.truncate(disk.size_bytes)
                file.datasync()
            finally:
                file.close()
            storage.sync_directory("")
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise BadInputError(
                    f"the filesystem of {storage.root} takes no file of {disk.size_bytes} bytes: make disk {disk.name} "
                    "smaller, or use another filesystem"
                ) from None
            raise NoSpaceError(
                f"cannot make an image of {disk.size_bytes} bytes for disk {disk.name} in {storage.root}: "
                f"{error.strerror}"
            ) from None

    # ---- settings.json and positions.json -----------------------------------------------------------------

    def load_overrides(self) -> dict[str, str]:
        """What `asrfs set` changed, as it was written."""
        if not os.path.exists(self.path(SETTINGS_FILE)):
            return {}
        return self._load(SETTINGS_FILE, dict[str, str])

    def load_settings(self) -> Settings:
        """Defaults, the policy that was told and the overrides of this machine. Raises IntegrityError."""
        try:
            return parse_overrides(self.load_overrides(), self.load_configuration())
        except BadInputError as error:
            raise IntegrityError(f"{self.path(SETTINGS_FILE)}: {error}") from None

    def change_settings(self, given: dict[str, str], wrong: Sequence[str] = ()) -> Settings:
        """Add overrides, all or none; an empty text or `default` takes one back. Raises BadInputError, with what is
        `wrong` already."""
        with self._exclusive("machine.lock"):
            merged = self.load_overrides() | given
            merged = {key: text for key, text in merged.items() if text and text.lower() != "default"}
            taken_back = [key for key in given if key not in merged]
            settings = check_overrides(merged, taken_back, self.load_configuration(), wrong)
            self._save(SETTINGS_FILE, merged)
        return settings

    def load_configuration(self) -> HostConfiguration:
        """What the store last told this host; nothing if it never did or the file cannot be read."""
        try:
            return decode_configuration(read_whole(DirectoryStorage(self.root), CONFIGURATION_FILE))
        except (FileNotFoundError, FormatError):
            return HostConfiguration()

    def load_recovered(self) -> RecoveredMachine | None:
        """The point from which this machine goes on; None for one that began with nothing. Raises IntegrityError."""
        try:
            return decode_recovered(read_whole(DirectoryStorage(self.root), RECOVERED_FILE))
        except FileNotFoundError:
            return None
        except FormatError as error:
            raise IntegrityError(f"{self.path(RECOVERED_FILE)}: {error}") from None

    def load_positions(self) -> Positions:
        """What the agent wrote down last; the beginning of the history if it never did."""
        if not os.path.exists(self.path(POSITIONS_FILE)):
            return Positions()
        return self._load(POSITIONS_FILE, Positions)

    def save_positions(self, positions: Positions) -> None:
        """Only the agent calls this."""
        self._save(POSITIONS_FILE, positions)

    # ---- run/ ---------------------------------------------------------------------------------------------

    def load_served(self) -> Served | None:
        """What was served last, or None when nothing ever was."""
        try:
            return self._load(SERVED_FILE, Served)
        except (NotFoundError, IntegrityError):
            return None

    def save_served(self, served: Served) -> None:
        """Write it down if it is not what was written last: a start where it was needs no space."""
        if served != self.load_served():
            self._save(SERVED_FILE, served)

    def take_lock(self, role: LockName) -> RunLock | None:
        """Become this role: hold its lock for the life of this process. None if another process is it."""
        path = self.path("run", f"{role}.lock")
        os.makedirs(self.path("run"), mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for _ in range(_LOCK_TRIES):  # `lock_holder` of another process may have it for an instant
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOCK_TRY_INTERVAL_S)
                continue
            os.pwrite(fd, f"{os.getpid():<20}\n".encode(), 0)  # in place: needs no space on a full disk
            return RunLock(fd, path)
        os.close(fd)
        return None

    def lock_holder(self, role: LockName) -> int | None:
        """The process id of who is this role now, None if nobody is. It may end at any time after."""
        try:
            fd = os.open(self.path("run", f"{role}.lock"), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(fd, 32, 0).strip()
            return int(text) if text.isdigit() else 0
        else:
            return None
        finally:
            os.close(fd)

    def processes(self) -> dict[str, int | None]:
        """Process ids by role, None for one that is not there."""
        return {role: self.lock_holder(role) for role in ROLES}

    def wait_lock_free(self, role: LockName, seconds_max: float) -> bool:
        """Wait until nobody is this role; False if somebody still is after `seconds_max`."""
        deadline = time.monotonic() + seconds_max
        while self.lock_holder(role) is not None:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOCK_TRY_INTERVAL_S)
        return True

    # ---- inside -------------------------------------------------------------------------------------------

    @contextmanager
    def _exclusive(self, name: str) -> Iterator[None]:
        fd = os.open(self.path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _load(self, name: str, type: type[T]) -> T:
        try:
            content = read_whole(DirectoryStorage(self.root), name)
        except FileNotFoundError:
            raise NotFoundError(f"{self.path(name)} does not exist") from None
        try:
            return msgspec.json.decode(content, type=type)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise IntegrityError(f"{self.path(name)} cannot be read: {error}") from None

    def _save(self, name: str, value: Any) -> None:
        self._replace(name, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")

    def _replace(self, name: str, content: bytes) -> None:
        try:
            write_atomically(DirectoryStorage(self.root), name, content)
        except OSError as error:
            raise NoSpaceError(f"cannot write {self.path(name)}: {error.strerror}") from None


def next_slot(machine: MachineConfig) -> int:
    """The slot of a new disk: never one that was used before. Raises RefusedError when all are used up."""
    slot = max((disk.slot for disk in machine.disks), default=-1) + 1
    if slot > SLOT_MAX:
        raise RefusedError(f"machine {machine.name} has used up its {SLOT_MAX + 1} disk numbers: make a new machine")
    return slot
