"""A recovered machine whose filesystems are mounted here and whose work is begun here: done, and undone in reverse.

Each step is written down, durable, before it is taken, so whoever comes after a SIGKILL undoes what may have been done:
undoing what was not is nothing. Starting again begins by undoing, because half a start is not to be trusted.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from asrfs.errors import AsrfsError, IntegrityError, NotFoundError, RefusedError, TemporaryError, foreign_line
from asrfs.model.boot import BootSettings, Command
from asrfs.model.quantities import SECTOR_BYTES
from asrfs.storage.directory import DirectoryStorage
from asrfs.storage.interface import read_whole, write_atomically
from asrfs.storage.kernel_text import kernel_lines, kernel_text
from replica_store.boot.health import Place, wait_until_healthy
from replica_store.boot.mount_steps import Step, mount_steps

STEPS_FILE = "mounted.json"
TOOL_S_MAX = 60.0
COMMAND_S_MAX = 600.0
_XFS_MAGIC = b"XFSB"


class _Extent(NamedTuple):
    offset: int
    length: int


class _Loop(NamedTuple):
    device: str
    offset: int


class Journal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What has been begun, in order, and what stops it. `root`: see `mount_steps`."""

    root: str
    begun: tuple[Step, ...] = ()
    stop: tuple[Command, ...] = ()


class MountedMachine:
    """The machine whose steps are written down in `directory`. `variables`: environment of its commands."""

    def __init__(self, directory: Path, *, variables: Mapping[str, str] | None = None) -> None:
        self._storage = DirectoryStorage(str(directory))
        self._variables = dict(os.environ if variables is None else variables)

    def start(self, settings: BootSettings, disks: Mapping[str, str], *, root: str = "", is_test: bool) -> float:
        """Do all of it and wait until it runs; the seconds that took. What fails is undone. Raises AsrfsError."""
        boot = settings.mount
        assert boot is not None
        begin = time.monotonic()
        self.stop()
        steps = mount_steps(boot, disks, root, is_test=is_test)
        for step in steps:
            if step.kind == "mount" and os.path.ismount(step.subject):
                raise RefusedError(f"something is mounted on {step.subject} already: unmount it first")
            if step.kind == "attach" and (taken := _loops_over(step.source)):
                raise RefusedError(f"{step.source} is attached as {taken[0].device} already: detach it first")
        journal = Journal(root=root, stop=boot.stop)
        try:
            for step in steps:
                journal = msgspec.structs.replace(journal, begun=(*journal.begun, step))
                self._save(journal)
                self._do(step, root)
            if settings.health is not None:
                place = Place(variables=self._with_root(root))
                wait_until_healthy(settings.health, place, lambda: None)
        except BaseException:
            self.stop()
            raise
        return time.monotonic() - begin

    def stop(self) -> None:
        """Undo whatever has been begun. Raises TemporaryError for what cannot be: it may be tried again."""
        journal = self._load()
        if journal is None:
            return
        has_started = any(step.kind in ("start", "service") for step in journal.begun)
        for step in reversed(journal.begun):
            if step.kind == "service":
                self._run(["systemctl", "stop", step.subject], TOOL_S_MAX, journal.root, accepted=None)
        if has_started:
            for words in journal.stop:
                self._run(words, COMMAND_S_MAX, journal.root, accepted=None)
        devices = {loop.device for step in journal.begun if step.kind == "attach" for loop in _loops_over(step.source)}
        for step in reversed(journal.begun):
            if step.kind == "mount":
                self._unmount(step.subject, devices)
        for device in sorted(devices):
            self._run(["losetup", "--detach", device], TOOL_S_MAX, journal.root, accepted=None)
        self._storage.unlink(STEPS_FILE)
        self._storage.sync_directory("")

    def is_started(self) -> bool:
        """Whether anything was begun and not undone."""
        return self._storage.exists(STEPS_FILE)

    # ---- steps ----------------------------------------------------------------------------------------------------

    def _do(self, step: Step, root: str) -> None:
        if step.kind == "attach":
            extent = _extent_of(step)
            place = [] if extent is None else [f"--offset={extent.offset}", f"--sizelimit={extent.length}"]
            self._run(["losetup", "--find", "--direct-io=on", *place, step.source], TOOL_S_MAX, root)
        elif step.kind == "mount":
            self._mount(step, root)
        elif step.kind == "start":
            self._run(step.words, COMMAND_S_MAX, root)
        else:
            self._run(["systemctl", "start", step.subject], COMMAND_S_MAX, root)

    def _mount(self, step: Step, root: str) -> None:
        extent = _extent_of(step)
        offset = 0 if extent is None else extent.offset
        devices = [loop.device for loop in _loops_over(step.source) if loop.offset == offset]
        if not devices:
            raise TemporaryError(f"the loop device over {step.source} has gone: try again")
        os.makedirs(step.subject, exist_ok=True)
        options = [step.options] if step.options else []
        if _begins_with(devices[-1], _XFS_MAGIC):
            options.append("nouuid")  # the disk it was recovered from may be mounted here, too
        words = ["mount", *(["-t", step.type] if step.type else [])]
        words += [*(["-o", ",".join(options)] if options else []), devices[-1], step.subject]
        self._run(words, TOOL_S_MAX, root)

    def _unmount(self, path: str, devices: set[str]) -> None:
        """Only what is mounted from our own devices: a path may have been somebody else's before we came to it."""
        for _ in range(2):
            if not _is_mounted_from(path, devices):
                return
            self._run(["umount", path], TOOL_S_MAX, "", accepted=None)
        if _is_mounted_from(path, devices):
            raise TemporaryError(f"{path} is in use: end whoever uses it and try again")

    def _with_root(self, root: str) -> dict[str, str]:
        return self._variables | {"ASRFS_ROOT": root}

    def _run(
        self, words: Sequence[str], seconds_max: float, root: str, *, accepted: Sequence[int] | None = (0,)
    ) -> None:
        """`accepted` None: whatever it ends with."""
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=seconds_max,
                env=self._with_root(root),
                check=False,
            )
        except FileNotFoundError:
            raise NotFoundError(f"the program {words[0]} is not there") from None
        except subprocess.TimeoutExpired:
            raise TemporaryError(f"{' '.join(words)[:200]} did not end within {seconds_max:g} s") from None
        if accepted is not None and done.returncode not in accepted:
            said = foreign_line(done.stderr.decode(errors="replace"))
            raise AsrfsError(f"{' '.join(words)[:200]} ended with {done.returncode}: {said}")

    # ---- what is written down -------------------------------------------------------------------------------------

    def _save(self, journal: Journal) -> None:
        write_atomically(self._storage, STEPS_FILE, msgspec.json.encode(journal) + b"\n")

    def _load(self) -> Journal | None:
        try:
            return msgspec.json.decode(read_whole(self._storage, STEPS_FILE), type=Journal)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise IntegrityError(f"{self._storage.path(STEPS_FILE)} cannot be read: {error}") from None


def _extent_of(step: Step) -> _Extent | None:
    """Where the partition lies, None for the whole disk; as the kernel would find it, without its doing so.

    Raises NotFoundError.
    """
    if not step.partition:
        return None
    words = ["partx", "--show", "--noheadings", "--output", "START,SECTORS", "--nr", str(step.partition), step.source]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=TOOL_S_MAX, check=False)
    found = done.stdout.split()
    if done.returncode or len(found) != 2 or not all(word.isdigit() for word in found):
        raise NotFoundError(f"disk {step.source} has no partition {step.partition}")
    return _Extent(int(found[0]) * SECTOR_BYTES, int(found[1]) * SECTOR_BYTES)


def _loops_over(path: str) -> list[_Loop]:
    """Loop devices over that very file, found by the kernel's own list."""
    real = os.path.realpath(path)
    found = []
    for entry in sorted(Path("/sys/block").glob("loop*/loop")):
        try:
            if kernel_text(entry / "backing_file").removesuffix(" (deleted)") == real:
                found.append(_Loop(f"/dev/{entry.parts[3]}", int((entry / "offset").read_text())))
        except OSError:  # detached meanwhile
            continue
    return found


def _is_mounted_from(path: str, devices: set[str]) -> bool:
    real = os.path.realpath(path)
    for line in kernel_lines("/proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        source = right.split(" ")[1]
        if _plain(left.split(" ")[4]) == real and source in devices:
            return True
    return False


def _plain(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def _begins_with(device: str, magic: bytes) -> bool:
    try:
        with open(device, "rb", buffering=0) as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise AsrfsError(f"{device} cannot be read: {error.strerror}") from None
