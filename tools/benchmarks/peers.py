"""What every peer is to a benchmark, and the two limits: the raw file, and FUSE itself in C."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

from lab import run

from .packages import version_of
from .workbench import Workbench, is_mounted

SOURCE = Path(__file__).with_name("passthrough.c")


class Peer:
    """A disk of `size_bytes`, served by something, behind a loop device with direct I/O.

    `packages` are Debian's. `serve` begins everything on a stack and returns the device; it raises one of
    `TOLD_FAILURES` where it cannot.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, bench: Workbench, size_bytes: int) -> None:
        self.bench = bench
        self.size_bytes = size_bytes

    def serve(self, stack: ExitStack) -> str:
        raise AssertionError(f"{self.key} serves nothing")

    def settle(self) -> None:
        """Wait until nothing of what was written is under way any more."""

    def processes(self) -> dict[str, int]:
        """Process ids by role; `store` is the one that in earnest is another computer."""
        return {}

    def version(self) -> str:
        found = [(package, version_of(package)) for package in self.packages]
        return ", ".join(f"{package} {version}" for package, version in found if version)

    def make_image(self, directory: Path, name: str = "disk.img") -> Path:
        """A backing file with all its space."""
        path = directory / name
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.size_bytes)
        return path


class RawPeer(Peer):
    """The loop device goes to the file itself, past the page cache."""

    key = "raw"
    title = "raw file"

    def serve(self, stack: ExitStack) -> str:
        return self.bench.attach(stack, self.make_image(self.bench.directory("raw")))


class PassthroughPeer(Peer):
    """Our small program over libfuse, compiled here."""

    key = "passthrough"
    title = "C pass-through"
    packages = ("libfuse3-dev", "pkg-config", "gcc", "libc6-dev", "fuse3")

    def serve(self, stack: ExitStack) -> str:
        directory = self.bench.directory("passthrough")
        mount = directory / "mount"
        mount.mkdir()
        program = self._compile()
        self.bench.unmount_at_end(stack, mount)
        words = (program, self.make_image(directory), mount)
        self._process = self.bench.start(stack, words, lambda: is_mounted(mount))
        return self.bench.attach(stack, mount / "disk.img")

    def processes(self) -> dict[str, int]:
        return {"server": self._process.pid}

    def _compile(self) -> Path:
        program = self.bench.root / "passthrough"
        if not program.exists():
            flags = run(["pkg-config", "--cflags", "--libs", "fuse3"]).split()
            run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(SOURCE), *flags])
        return program
