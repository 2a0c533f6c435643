"""The main job, on real files: protect a disk, damage it, kill the server under it, and get everything back.

    store + host on this machine → disk → ext4 → a real tree from /usr → point → ransomware, SIGKILL
    → export of the point and read-only mount → e2fsck → every file's digest → the second before the damage by time:

Prints what happened with times, LSNs and sizes; exits 0 only if every file came back. Leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from lab import Lab, LabError, run, wait_until

FILES_MAX = 5000
FILES_MIN = 2000
BYTES_MAX = 160 << 20
DISK_SIZE = "1G"
SOURCES = ("/usr/share", "/usr/lib/python3", "/usr/lib/python3.11", "/usr/include", "/usr/lib")
DAMAGED_SHARE = 0.6

Digests = dict[str, str]


class Story:
    """Tells what happens, with the seconds since the start."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def tell(self, text: str) -> None:
        print(f"{time.monotonic() - self._begin:6.1f} s  {text}", flush=True)


def main() -> int:
    if os.geteuid() != 0:
        print("demo: error: mounting disks needs root", file=sys.stderr)
        return 2
    story = Story()
    lab = Lab()
    try:
        demonstrate(lab, story)
    except LabError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    finally:
        lab.close()
    story.tell("nothing is left behind")
    return 0


def demonstrate(lab: Lab, story: Story) -> None:
    tree = protect(lab, story)
    before = make_point(lab, story, tree)
    late = tree / "written-after-the-point.txt"
    late.write_text("one more file, written after the point and before the damage\n")
    sync(tree)
    after_point = digests(tree)
    instant = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    story.tell(f"one more file is written; the last good instant is {instant}")
    damage(lab, story, tree)
    if digests(tree) == after_point:
        raise LabError("the damage did no damage: this demonstration would prove nothing")
    drained = lab.asrfs("drain", "--timeout", "60s")
    story.tell(f"everything is at the store: {drained}")

    restored = lab.root / "restored.img"
    export(lab, story, "before-attack", restored)
    check(story, restored, before, lab.root / "restored", "the point before-attack")
    tree_of_points = lab.root / "points"
    lab.mount_points(tree_of_points)
    in_tree = tree_of_points / lab.machine / "before-attack" / "root.img"
    check(story, in_tree, before, lab.root / "restored-from-tree", "the same point in the read-only tree")
    by_time = lab.root / "second-before.img"
    export(lab, story, f"time:{instant}", by_time)
    check(story, by_time, after_point, lab.root / "second-before", "the instant before the damage", replay=True)
    summarize(lab, restored)


def protect(lab: Lab, story: Story) -> Path:
    """A store, an enrolled host, a served disk with ext4 and a real tree; where that tree is."""
    lab.start_store()
    story.tell(f"a replica store serves at {lab.manage}")
    lab.asrfs("init", lab.machine)
    lab.asrfs("disk", "add", "root", "--size", DISK_SIZE)
    lab.enroll()
    lab.start_host()
    story.tell(f"machine {lab.machine} is enrolled and serves disk root ({DISK_SIZE}) at {lab.disks}/root.img")
    where = lab.root / "fs"
    where.mkdir()
    device = lab.attach("root", "--format", "ext4", "--on", where)
    story.tell(f"{device} carries ext4, mounted at {where}")
    tree = where / "usr"
    count, size = copy_real_tree(tree)
    sync(tree)
    story.tell(f"{count} real files, {size / 1e6:.0f} MB, copied from /usr")
    return tree


def copy_real_tree(target: Path) -> tuple[int, int]:
    """Copy files of /usr in a fixed order up to the bounds; `(files, bytes)`."""
    count = size = 0
    for path in real_files():
        length = path.stat().st_size
        if size + length > BYTES_MAX:
            continue
        goal = target / path.relative_to("/usr")
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, goal)
        count += 1
        size += length
        if count == FILES_MAX:
            break
    if count < FILES_MIN:
        raise LabError(f"only {count} files found below /usr")
    return count, size


def real_files() -> Iterator[Path]:
    seen = set()
    for source in SOURCES:
        for directory, _, names in sorted(os.walk(source)):
            for name in sorted(names):
                path = Path(directory, name)
                if path.is_file() and not path.is_symlink() and path not in seen:
                    seen.add(path)
                    yield path


def make_point(lab: Lab, story: Story, tree: Path) -> Digests:
    """A point with the filesystem frozen around it; the digest of every file in it."""
    before = digests(tree)
    mounted_on = str(tree.parent)
    run(["fsfreeze", "-f", mounted_on], timeout=60)
    try:
        point = lab.asrfs("point", "create", "--name", "before-attack")
    finally:
        run(["fsfreeze", "-u", mounted_on], timeout=60)
    lab.asrfs("drain", "--timeout", "60s")
    story.tell(f"point before-attack: LSN {point['lsn']} at {point['time']}, recoverable at the store")
    return before


def damage(lab: Lab, story: Story, tree: Path) -> None:
    """Overwrite files as ransomware would, and kill the disk server in the middle of it."""
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    chosen = random.Random(1).sample(files, int(len(files) * DAMAGED_SHARE))
    half_done = threading.Event()
    failed: list[OSError] = []

    def overwrite() -> None:
        noise = random.Random(2)
        for i, path in enumerate(chosen):
            try:
                path.write_bytes(noise.randbytes(max(path.stat().st_size, 64)))
            except OSError as error:
                failed.append(error)
            if i == len(chosen) // 2:
                half_done.set()
        sync(tree)

    ransomware = threading.Thread(target=overwrite)
    ransomware.start()
    half_done.wait()
    killed = lab.kill("disk_server")
    ransomware.join()
    if failed:
        raise LabError(f"the kill was visible above: {failed[0]}")
    wait_until(lambda: lab.pid("disk_server") not in (0, killed), "the start of the next disk server")
    story.tell(
        f"{len(chosen)} files are overwritten with noise; disk server {killed} was killed on the way, "
        f"{lab.pid('disk_server')} took over: no error above"
    )


def export(lab: Lab, story: Story, selector: str, output: Path) -> None:
    done = lab.replica_store("export", lab.machine, "root", "--point", selector, "--output", output)
    used = output.stat().st_blocks * 512
    story.tell(
        f"export of {selector}: LSN {done['lsn']}, {output.stat().st_size / 1e6:.0f} MB, "
        f"{used / 1e6:.0f} MB of it used, in {done['seconds']:.1f} s"
    )


def check(story: Story, image: Path, expected: Digests, where: Path, what: str, *, replay: bool = False) -> None:
    """fsck a recovered image and compare every file with what it was. `replay`: replay ext4's own log first."""
    where.mkdir()
    if replay:
        with mounted(image, where, "loop"):
            pass
    run(["e2fsck", "-fn", str(image)])
    with mounted(image, where, "loop,ro"):
        found = digests(where / "usr")
    wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if wrong:
        raise LabError(f"{what}: {len(wrong)} files differ, among them {wrong[0]}")
    story.tell(f"{what}: e2fsck -fn is clean, all {len(found)} files are what they were")


class mounted:
    """A filesystem image, mounted while the block runs."""

    def __init__(self, image: Path, where: Path, options: str) -> None:
        self._image, self._where, self._options = image, where, options

    def __enter__(self) -> None:
        run(["mount", "-o", self._options, str(self._image), str(self._where)])

    def __exit__(self, *_: object) -> None:
        run(["umount", str(self._where)])


def digests(tree: Path) -> Digests:
    """SHA-256 of every file by its path below `tree`."""
    found = {}
    for path in tree.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found[str(path.relative_to(tree))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def sync(path: Path) -> None:
    subprocess.run(["sync", "-f", str(path)], check=True, timeout=120)


def summarize(lab: Lab, restored: Path) -> None:
    status = lab.status()
    machine = lab.replica_store("machine", "show", lab.machine)
    in_vault = sum(path.stat().st_size for path in (lab.vault / "objects").rglob("*") if path.is_file())
    print()
    print(f"  history      LSN 1 … {status['lsn']['appended']}, acknowledged {status['lsn']['acknowledged']}")
    print(f"  machine      {status['state']}, epoch {machine['epoch']}, link {status['link']}")
    print(f"  disk         {restored.stat().st_size / 1e6:.0f} MB, in the vault {in_vault / 1e6:.0f} MB")
    print()


if __name__ == "__main__":
    sys.exit(main())
