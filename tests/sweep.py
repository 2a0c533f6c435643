"""Finds and removes what test runs leave on the machine: processes, FUSE mounts, loop devices, directories.

Each run works below a directory of its own, `/tmp/asrfs-test-PID-START`, that names the run by its process id
and the start time of that process, so that a process id used again is not taken for the run. Everything a
test starts has that directory in its command line, its mount point or its backing file; this is how it is
recognised, and nothing else is ever touched.

Order matters: killed servers release whoever waits for them; forced unmounting aborts the FUSE connections that
live on; only then can loop devices go. Every step is bounded. `python -m tests.sweep` sweeps by hand.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

RUNS = Path("/tmp")
NETWORKS = Path("/run/netns")
COMMAND_SECONDS_MAX = 15.0
DEATH_SECONDS_MAX = 10.0
ROUNDS_MAX = 4
"""A supervisor may have started another process between being found and being killed."""

_RUN_NAME = re.compile(r"asrfs-test-(\d+)-(\d+)")
_DELETED = " (deleted)"


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo: where, of what type, from what."""

    target: str
    kind: str
    source: str


@dataclass(frozen=True)
class Leftovers:
    """What was found below a directory. False when there is nothing."""

    processes: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    loops: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.processes or self.mounts or self.loops)

    def __str__(self) -> str:
        found = [*(f"process {p}" for p in self.processes), *(f"mount {m}" for m in self.mounts)]
        return "; ".join([*found, *(f"loop device {loop}" for loop in self.loops)])


def run_directory(pid: int) -> Path:
    """The directory of the run that is process `pid`, which must live."""
    started = _start_ticks(pid)
    if started is None:
        raise ProcessLookupError(pid)
    return RUNS / f"asrfs-test-{pid}-{started}"


def dead_runs(runs: Path = RUNS) -> list[Path]:
    """Directories of runs whose process is gone."""
    found = []
    for path in sorted(runs.glob("asrfs-test-*")):
        match = _RUN_NAME.fullmatch(path.name)
        if match and not path.is_symlink() and _start_ticks(int(match[1])) != int(match[2]):
            found.append(path)
    return found


def find(base: Path) -> Leftovers:
    """What lies below `base` or names it, changing nothing."""
    loops = _loops_below(base)
    return Leftovers(
        processes=tuple(f"{pid} {command}" for pid, command in _processes_naming(base)),
        mounts=tuple(mount.target for mount in _mounts_below(base, loops)),
        loops=tuple(loops),
    )


def sweep(base: Path) -> Leftovers:
    """End, unmount and detach everything below `base`, then remove it. Returns what was found at first."""
    found = find(base)
    left = found
    for _ in range(ROUNDS_MAX):
        if not left:
            break
        _remove(base)
        left = find(base)
    if left:
        print(f"sweep: could not remove from {base}: {left}", file=sys.stderr)
    else:
        _remove_tree(base)
    for network in networks_of(base):
        _run(["ip", "netns", "delete", network])
    return found


def networks_of(base: Path) -> list[str]:
    """Network namespaces of a run, whose names begin with that of its directory; none of a directory below it."""
    if not _RUN_NAME.fullmatch(base.name) or not NETWORKS.is_dir():
        return []
    return [path.name for path in sorted(NETWORKS.iterdir()) if path.name.startswith(f"{base.name}-")]


def _remove_tree(base: Path) -> None:
    """Another run may be sweeping after the same dead one. Raises OSError for what really cannot be removed."""
    for _ in range(ROUNDS_MAX):
        shutil.rmtree(base, ignore_errors=True)
        if not base.exists():
            return
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(base)


def sweep_dead_runs(runs: Path = RUNS) -> None:
    """Sweep after every run whose process is gone; says so when it found anything."""
    for base in dead_runs(runs):
        if found := sweep(base):
            print(f"sweep: removed what {base.name} left: {found}", file=sys.stderr)


def parse_mounts(mountinfo: str) -> list[Mount]:
    """Mounts of a `/proc/PID/mountinfo`, in its order: what is mounted later comes later."""
    mounts = []
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        dash = fields.index("-")
        target = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        mounts.append(Mount(target, fields[dash + 1], fields[dash + 2]))
    return mounts


def names_directory(command_line: bytes, base: Path) -> bool:
    """Whether a command line names `base` or what is below it, and not a longer name that begins like it."""
    return re.search(re.escape(os.fsencode(base)) + rb"(?![\w.-])", command_line) is not None


def _remove(base: Path) -> None:
    for pid, _ in _processes_naming(base):
        _kill(pid, base)
    loops = _loops_below(base)
    for mount in reversed(_mounts_below(base, loops)):
        _run(["umount", "--force", "--lazy", "--no-canonicalize", mount.target])
    for loop in loops:
        _run(["losetup", "--detach", loop])


def _mounts_below(base: Path, loops: Sequence[str]) -> list[Mount]:
    mounts = parse_mounts(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
    return [m for m in mounts if _is_below(m.target, base) or m.source in loops]


def _loops_below(base: Path) -> list[str]:
    loops = []
    for attribute in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):  # detached meanwhile
            backing = attribute.read_text(errors="surrogateescape").rstrip("\n").removesuffix(_DELETED)
            if _is_below(backing, base):
                loops.append(f"/dev/{attribute.parts[3]}")
    return loops


def _is_below(path: str, base: Path) -> bool:
    return path == str(base) or path.startswith(f"{base}/")


def _processes_naming(base: Path) -> Iterator[tuple[int, str]]:
    spared = _self_and_ancestors()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in spared:
            continue
        with contextlib.suppress(OSError):  # ended meanwhile
            command = (entry / "cmdline").read_bytes()
            if names_directory(command, base):
                yield int(entry.name), command.replace(b"\0", b" ").decode(errors="replace").strip()


def _self_and_ancestors() -> set[int]:
    pids: set[int] = set()
    pid = os.getpid()
    while pid and pid not in pids:
        pids.add(pid)
        stat = _stat_fields(pid)
        pid = int(stat[1]) if stat else 0
    return pids


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of `/proc/PID/stat` from the state on (the command before it may contain anything), or None."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _start_ticks(pid: int) -> int | None:
    stat = _stat_fields(pid)
    return int(stat[19]) if stat else None


def _kill(pid: int, base: Path) -> None:
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return
    try:
        # The descriptor holds this process: what is read now cannot belong to a later one of the same number.
        if names_directory(Path(f"/proc/{pid}/cmdline").read_bytes(), base):
            signal.pidfd_send_signal(process, signal.SIGKILL)
            poll = select.poll()
            poll.register(process, select.POLLIN)
            poll.poll(DEATH_SECONDS_MAX * 1000)
    except OSError:
        pass
    finally:
        os.close(process)


def _run(command: list[str]) -> None:
    """Run a command, and forget it when it hangs: who waits for a dead server cannot even be killed."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(COMMAND_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        print(f"sweep: {' '.join(command)} hangs", file=sys.stderr)


if __name__ == "__main__":
    sweep_dead_runs()
