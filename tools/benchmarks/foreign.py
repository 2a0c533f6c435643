"""Peers that others wrote: QEMU's FUSE export alone and mirroring, nbdkit with nbdfuse, s3backer in its test mode."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from lab import LabError, wait_until

from .measuring import MIB
from .peers import Peer
from .qmp import Qmp
from .workbench import is_mounted

_SETTLE_SECONDS_MAX = 300.0
_SPARE_BLOCKS = 64


class QemuPeer(Peer):
    """`qemu-storage-daemon` exports a raw file by FUSE, through the page cache as is its default."""

    key = "qemu"
    title = "QEMU FUSE export"
    packages = ("qemu-system-common", "qemu-utils")
    exported: ClassVar[str] = "disk"

    def serve(self, stack: ExitStack) -> str:
        directory = self.bench.directory(self.key)
        export = directory / "export"
        export.touch()
        self._control = self.bench.socket("q.sock")
        image = self.make_image(directory)
        self.bench.unmount_at_end(stack, export)
        words: list[str | Path] = ["qemu-storage-daemon"]
        words += ["--chardev", f"socket,id=control,path={self._control},server=on,wait=off"]
        words += ["--monitor", "chardev=control"]
        words += ["--blockdev", f"driver=file,node-name=file,filename={image},discard=unmap"]
        words += ["--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap"]
        words += self._more_nodes(stack, directory)
        words.append("--export")
        words.append(
            f"type=fuse,id=export,node-name={self.exported},mountpoint={export},writable=on,growable=off",
        )
        self._process = self.bench.start(stack, words, lambda: is_mounted(export))
        self._begin_job(stack)
        return self.bench.attach(stack, export)

    def processes(self) -> dict[str, int]:
        return {"server": self._process.pid}

    def _more_nodes(self, stack: ExitStack, directory: Path) -> list[str]:
        """Options of qemu-storage-daemon that stand before its export."""
        return []

    def _begin_job(self, stack: ExitStack) -> None:
        """None here."""


class _ReplicatingQemuPeer(QemuPeer):
    """The same with a second file behind `qemu-nbd`, which is node `replica`."""

    def processes(self) -> dict[str, int]:
        return super().processes() | {"store": self._target.pid}

    def _more_nodes(self, stack: ExitStack, directory: Path) -> list[str]:
        path = self.bench.socket("n.sock")
        target = self.make_image(directory, "replica.img")
        words = ["nice", "-n", "19", "qemu-nbd", f"--socket={path}", "--format=raw", "--persistent", "--shared=4"]
        self._target = self.bench.start(stack, [*words, target], path.exists)
        return ["--blockdev", f"driver=nbd,node-name=replica,server.type=unix,server.path={path}"]


class QemuMirrorPeer(_ReplicatingQemuPeer):
    """A block job copies to the second file, after the writes."""

    key = "qemu-mirror"
    title = "QEMU, blockdev-mirror"

    def settle(self) -> None:
        def is_equal() -> bool:
            job = self._job()
            return bool(job["offset"] == job["len"])

        wait_until(is_equal, "the mirror's catching up", _SETTLE_SECONDS_MAX)

    def _begin_job(self, stack: ExitStack) -> None:
        self._qmp = Qmp(self._control)
        stack.callback(self._qmp.close)
        words = {"device": "disk", "target": "replica", "sync": "full", "copy_mode": "background"}
        self._qmp.execute("blockdev-mirror", job_id="mirror", **words)
        wait_until(lambda: bool(self._job()["ready"]), "the first copy of the mirror", _SETTLE_SECONDS_MAX)

    def _job(self) -> dict[str, Any]:
        jobs = self._qmp.execute("query-block-jobs")
        if not jobs:
            raise LabError("the mirror ended by itself")
        found: dict[str, Any] = jobs[0]
        return found


class QemuQuorumPeer(_ReplicatingQemuPeer):
    """Each write goes to both files before it is answered; reads come from the first."""

    key = "qemu-quorum"
    title = "QEMU, quorum of two"
    exported = "both"

    def _more_nodes(self, stack: ExitStack, directory: Path) -> list[str]:
        words = "driver=quorum,node-name=both,children.0=disk,children.1=replica,vote-threshold=1,read-pattern=fifo"
        return [*super()._more_nodes(stack, directory), "--blockdev", words]


class NbdkitPeer(Peer):
    """`nbdkit` serves the file, `nbdfuse` makes a file of it again."""

    key = "nbdkit"
    title = "nbdkit + nbdfuse"
    packages = ("nbdkit", "libnbd-bin", "fuse3")

    def serve(self, stack: ExitStack) -> str:
        directory = self.bench.directory(self.key)
        mount = directory / "mount"
        mount.mkdir()
        path = self.bench.socket("n.sock")
        words: list[str | Path] = ["nbdkit", "--foreground", "--unix", path, "file", self.make_image(directory)]
        server = self.bench.start(stack, words, path.exists)
        self.bench.unmount_at_end(stack, mount)
        words = ["nbdfuse", mount / "disk.img", "--unix", path]
        client = self.bench.start(stack, words, lambda: is_mounted(mount))
        self._processes = (server, client)
        return self.bench.attach(stack, mount / "disk.img")

    def processes(self) -> dict[str, int]:
        return {"nbdkit": self._processes[0].pid, "nbdfuse": self._processes[1].pid}


class S3backerPeer(Peer):
    """Blocks as files of a directory in place of objects of a bucket, behind s3backer's cache in memory.

    Its test mode waits a random time of up to 0.2 s for each block that it loads or stores, as for a bucket far away.
    The cache has room for all blocks, since what the other peers serve is in memory too.
    """

    key = "s3backer"
    title = "s3backer --test, 0 to 0.2 s a block"
    packages = ("s3backer",)

    def serve(self, stack: ExitStack) -> str:
        directory = self.bench.directory(self.key)
        bucket, self._mount = directory / "bucket", directory / "mount"
        bucket.mkdir()
        self._mount.mkdir()
        self.bench.unmount_at_end(stack, self._mount)
        options = [f"--size={self.size_bytes}", "--blockSize=1m", "--directIO", "--quiet"]
        options.append(f"--blockCacheSize={-(-self.size_bytes // MIB) + _SPARE_BLOCKS}")
        options.append("--readAhead=0")  # it would load blocks beyond the end in place of others
        options += ["--minWriteDelay=0", "--md5CacheSize=0", "--md5CacheTime=0"]  # for buckets that show old content
        words: list[str | Path] = ["s3backer", "-f", "--test", *options, bucket, self._mount]
        self._process = self.bench.start(stack, words, lambda: is_mounted(self._mount))
        return self.bench.attach(stack, self._mount / "file")

    def settle(self) -> None:
        wait_until(lambda: self._dirty_share() == 0.0, "the storing of s3backer's cache", _SETTLE_SECONDS_MAX)

    def processes(self) -> dict[str, int]:
        return {"server": self._process.pid}

    def _dirty_share(self) -> float:
        for line in (self._mount / "stats").read_text().splitlines():
            if line.startswith("block_cache_dirty_ratio"):
                return float(line.split()[1])
        raise LabError("s3backer does not say how much of its cache is dirty")
