"""A filesystem under load, and what a copy of it must look like that was cut while it was frozen.

python -m tests.proof.kernel.churn DIRECTORY SEED     until it is killed: makes, overwrites, renames and removes
files
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.proof.kernel.filesystems import mounted_copy
from tests.waiting import wait_until

FILES = 64
FILE_BYTES_MAX = 256 << 10
MARK = b"a whole file ends with this"


@contextlib.contextmanager
def churn(where: Path, seed: int) -> Iterator[subprocess.Popen[bytes]]:
    """Two processes at work below `where`; they are ended with the block, and must not have seen an error."""
    directories = [where / "churn-0", where / "churn-1"]
    for directory in directories:
        directory.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.proof.kernel.churn"]
    workers = [
        subprocess.Popen([*command, str(directory), str(seed + n)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for n, directory in enumerate(directories)
    ]
    try:
        for directory in directories:
            wait_until(lambda directory=directory: len(os.listdir(directory)) > 8, what="files under load")
        yield workers[0]
        for worker in workers:
            assert worker.poll() is None, f"I8: {worker.communicate()[1].decode()[-1000:]}"
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


_WITHOUT_REPLAY = {"ext4": "noload", "xfs": "nouuid,norecovery", "btrfs": "rescue=nologreplay"}


def check_clean(image: Path, kind: str, where: Path) -> int:
    """Nothing needs to be replayed, nothing is wrong, every renamed file is whole; how many files there are."""
    if kind == "ext4":
        features = _said("dumpe2fs", "-h", image)
        assert "needs_recovery" not in features, "a filesystem point has a journal to replay"
        assert "Filesystem state:         clean" in features, features
        _said("e2fsck", "-fn", image)
    elif kind == "btrfs":
        superblock = _said("btrfs", "inspect-internal", "dump-super", image)
        assert re.search(r"^log_root\s+0$", superblock, re.MULTILINE), "a filesystem point has a log to replay"
        _said("btrfs", "check", "--readonly", image)
    else:
        check_xfs(image)
    with mounted_copy(image, where, kind, f"ro,noatime,{_WITHOUT_REPLAY[kind]}") as copy:
        files = [path for path in copy.rglob("kept-*") if path.is_file()]
        for path in files:
            assert path.read_bytes().endswith(MARK), f"{path} was synced before it was renamed, and is not whole"
    if kind == "xfs":
        with mounted_copy(image, where, kind, "noatime,nouuid"):
            pass
        _said("xfs_repair", "-n", "-f", image)
    return len(files)


def check_xfs(image: Path) -> None:
    """Without a replay, everything but a counter is in its place.

    XFS logs its superblock once more when it freezes, so that the next mount looks for unlinked files, and the count of
    free blocks in it lacks what it keeps in reserve: each mount of a frozen copy counts anew. Nothing else may be in
    the log, and nothing else may be found by xfs_repair.
    """
    device = _said("losetup", "--find", "--show", "--read-only", image).strip()
    try:
        log = _said("xfs_logprint", "-t", device)
        items = re.findall(r"^([A-Z]+): ", log, re.MULTILINE)
        buffers = re.findall(r"^\s+([A-Z][A-Z0-9 ]*) (?:Block )?Buffer", log, re.MULTILINE)
        assert set(items) <= {"TRANS", "BUF"} and set(buffers) <= {"SUPER"}, f"there is something to replay: {log}"
        done = _run("xfs_repair", "-n", device)
        lines = (done.stdout + done.stderr).splitlines()
        strange = [line for line in lines if line.strip() and not _XFS_EXPECTED.match(line)]
        assert not strange, f"xfs_repair finds more than a count of free blocks: {strange}"
    finally:
        _said("losetup", "--detach", device)


_XFS_EXPECTED = re.compile(
    r"Phase \d|\s+- |ALERT: The filesystem has valuable metadata changes in a log|"
    r"ignored because the -n option was used|"
    r"which may be resolved by first mounting|sb_fdblocks \d+, counted \d+|No modify flag set"
)


def _said(*words: str | Path) -> str:
    done = _run(*words)
    assert done.returncode == 0, f"{words} ended with {done.returncode}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def _run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False
    )


def work(directory: Path, rng: random.Random) -> None:
    """For ever. A file under its kept name was whole and synced before it got it."""
    while True:
        number = rng.randrange(FILES)
        fresh, kept = directory / f"fresh-{number}", directory / f"kept-{number}"
        what = rng.random()
        if what < 0.5:
            with fresh.open("wb") as file:
                file.write(rng.randbytes(rng.randrange(FILE_BYTES_MAX)) + MARK)
                file.flush()
                os.fdatasync(file.fileno())
            fresh.rename(kept)
        elif what < 0.7:
            kept.unlink(missing_ok=True)
        elif what < 0.8:
            os.makedirs(directory / f"d{number}" / "x" / "y", exist_ok=True)
        elif what < 0.9:
            with contextlib.suppress(OSError):
                os.removedirs(directory / f"d{number}" / "x" / "y")
        else:
            with (directory / "large").open("ab") as file:
                file.truncate(rng.randrange(4 << 20))
                file.write(rng.randbytes(1 << 16))


if __name__ == "__main__":
    work(Path(sys.argv[1]), random.Random(int(sys.argv[2])))
