"""Where a benchmark works: one scratch directory, and the processes, mounts and loop devices made for it.

Whatever is begun is put on an `ExitStack`, so that it is undone in the opposite order however the benchmark ends. What
cannot be undone is said, and does not keep the rest from being undone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from lab import LabError, run, stop, wait_until

from asrfs.daemon import loop_devices
from asrfs.errors import AsrfsError

from .packages import Packages

TOLD_FAILURES = (LabError, AsrfsError, OSError, subprocess.SubprocessError)
"""What can go wrong with a program that is measured; anything else is a mistake of ours."""

_SOCKET_PATH_MAX = 100
_READY_SECONDS_MAX = 30.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says. `seconds` None: as long as each benchmark thinks right. `peers` empty: all."""

    turns: int = 5
    seconds: float | None = None
    size_bytes: int = 1 << 30
    peers: tuple[str, ...] = ()
    tiny: bool = False
    may_install: bool = True
    scratch: Path | None = None
    rates: tuple[int, ...] = ()
    machines: tuple[int, ...] = ()
    records: int = 10_000_000
    backlog_bytes: int = 1 << 30
    image_bytes: int = 4 << 30


@dataclass
class Workbench:
    """`root` is the scratch directory, there inside the `with` block; everything started names it where it can."""

    options: Options
    root: Path = field(init=False)
    packages: Packages = field(init=False)

    def __post_init__(self) -> None:
        self.packages = Packages(may_install=self.options.may_install)
        self._numbers = count(1)

    def __enter__(self) -> Workbench:
        self.root = Path(tempfile.mkdtemp(prefix="bench-", dir=self.options.scratch))
        return self

    def __exit__(self, *_: object) -> None:
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        if any(mount.startswith(f"{self.root}/") for mount in mounts):
            self.say(f"something is still mounted below {self.root}: it stays")
        else:
            shutil.rmtree(self.root, ignore_errors=True)

    def say(self, text: str) -> None:
        print(f"bench: {text}", file=sys.stderr, flush=True)

    def wants(self, peer: str) -> bool:
        return not self.options.peers or peer in self.options.peers

    def seconds(self, usual: float) -> float:
        return self.options.seconds or usual

    def flush_everything(self) -> None:
        """Have the kernel write back what it holds back, of whomever; no use where nothing is really measured."""
        if not self.options.tiny:
            run(["sync"], timeout=600)

    # ---- places -----------------------------------------------------------------------------------------------

    def directory(self, name: str) -> Path:
        """A new directory."""
        path = self.root / f"{next(self._numbers)}-{name}"
        path.mkdir()
        return path

    def socket(self, name: str) -> Path:
        """A path for a Unix socket, which must be short."""
        path = self.root / f"{next(self._numbers)}{name}"
        if len(str(path)) > _SOCKET_PATH_MAX:
            raise LabError(f"{path} is too long for a socket: choose a shorter directory with --scratch")
        return path

    # ---- what is begun and undone -----------------------------------------------------------------------------

    def start(
        self,
        stack: ExitStack,
        words: Sequence[str | Path],
        ready: Callable[[], object],
        *,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program, wait until it is ready, and end it with the stack. Raises LabError with its own words."""
        log = self.root / f"{next(self._numbers)}-{Path(words[0]).name}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                list(map(str, words)),
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                text=True,
                start_new_session=True,  # a Ctrl-C is for us, who end it in its turn
                env=None if environment is None else {**os.environ, **environment},
            )
        stack.callback(self.quietly, lambda: stop(process))
        wait_until(lambda: process.poll() is not None or bool(ready()), f"the start of {words[0]}", _READY_SECONDS_MAX)
        if process.poll() is not None:
            said = " ".join(log.read_text(errors="replace").split())[-400:]
            raise LabError(f"{Path(words[0]).name} ended with {process.returncode}: {said}")
        return process

    def unmount_at_end(self, stack: ExitStack, directory: Path) -> None:
        """Unmount what is still mounted there when the stack ends: its server may have been killed."""

        def unmount() -> None:
            if is_mounted(directory):
                run(["umount", "--lazy", str(directory)], timeout=60)

        stack.callback(self.quietly, unmount)

    def attach(self, stack: ExitStack, path: Path) -> str:
        """A loop device with direct I/O, as `asrfs attach` makes it, so that all peers have the same."""
        device = loop_devices.attach(str(path))
        sequence = loop_devices.sequence_of(device)

        def detach() -> None:
            if loop_devices.sequence_of(device) == sequence:  # else it was taken from us, and may be another's now
                loop_devices.detach(device)

        stack.callback(self.quietly, detach)
        return device

    def quietly(self, action: Callable[[], object]) -> None:
        """Undo something; what cannot be undone is said."""
        try:
            action()
        except TOLD_FAILURES as error:
            self.say(f"cleaning up: {error}")

    @contextmanager
    def stack(self) -> Iterator[ExitStack]:
        with contextlib.ExitStack() as stack:
            yield stack


def is_mounted(path: Path) -> bool:
    """Whether anything is mounted exactly there."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) for line in lines)
