"""A small Linux guest on a disk image of 48 MiB: Debian's kernel, busybox, a shell on the serial console.

It starts as machines do: the firmware runs the boot sector, that the boot loader, that the kernel; the kernel's first
program mounts the disk's filesystem on /disk, says `asrfs guest ready` and gives a shell there. The kernel's package is
downloaded once and taken apart; nothing of it is installed. Needs root, for a loop device and a mount.
"""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab import LabError, run

IMAGE_BYTES = 48 << 20
READY = "asrfs guest ready"
PROMPT = "guest# "
_PARTITION_AT = 1 << 20
_LINUX_PARTITION = 0x83
_TOOL_S_MAX = 60.0
_MBR = Path("/usr/lib/EXTLINUX/mbr.bin")
_BUSYBOX = Path("/bin/busybox")
_MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
"""In the order in which they can be loaded."""
_INIT = f"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /disk /bin /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in {" ".join(_MODULES)}; do insmod /modules/$module.ko; done
until [ -b /dev/vda1 ]; do sleep 0.1; done
mount -t ext4 /dev/vda1 /disk || echo "asrfs guest: the disk cannot be mounted"
cd /disk
export PS1='{PROMPT}'
echo "{READY}"
while true; do setsid cttyhack sh -i; done
"""
_LOADER = "DEFAULT linux\nPROMPT 0\nTIMEOUT 0\nLABEL linux\n  KERNEL /boot/vmlinuz\n  INITRD /boot/initrd\n"
_KERNEL_WORDS = "console=ttyS0 quiet panic=-1 random.trust_cpu=on tsc=reliable"


def cache_directory() -> Path:
    """Where the kernel is kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "asrfs-guest"


def fetch_kernel(cache: Path) -> Path:
    """The directory with `vmlinuz` and `modules/`, downloaded if it is not there. Raises LabError."""
    kernel = cache / "kernel"
    if kernel.is_dir():
        return kernel
    cache.mkdir(parents=True, exist_ok=True)
    if not any(Path("/var/lib/apt/lists").glob("*Packages*")):
        run(["apt-get", "-qq", "update"])
    with tempfile.TemporaryDirectory(dir=cache) as name:
        work = Path(name)
        (package,) = [
            line.split()[1]
            for line in run(["apt-cache", "depends", "linux-image-cloud-amd64"]).splitlines()
            if line.strip().startswith("Depends: linux-image-")
        ]
        done = subprocess.run(
            ["apt-get", "-qq", "download", package], cwd=work, capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            raise LabError(f"the kernel {package} cannot be downloaded: {done.stderr.strip()[-300:]}")
        (archive,) = work.glob("*.deb")
        run(["dpkg-deb", "-x", str(archive), str(work / "unpacked")])
        made = work / "kernel"
        (made / "modules").mkdir(parents=True)
        (image,) = (work / "unpacked/boot").glob("vmlinuz-*")
        shutil.copyfile(image, made / "vmlinuz")
        for module in _MODULES:
            (found,) = (work / "unpacked").rglob(f"{module}.ko")
            shutil.copyfile(found, made / "modules" / found.name)
        made.rename(kernel)
    return kernel


def make_image(path: Path, scratch: Path, cache: Path | None = None) -> None:
    """Write the guest's disk to `path`, a file of that name or one that is there and large enough. Raises LabError."""
    kernel = fetch_kernel(cache or cache_directory())
    raw, mounted = scratch / "guest.raw", scratch / "guest-root"
    with raw.open("wb") as image:
        image.truncate(IMAGE_BYTES)
        image.write(_MBR.read_bytes()[:440])
        image.seek(440)
        image.write(_partition_table())
    device = run(["losetup", "--find", "--show", "--offset", str(_PARTITION_AT), str(raw)], timeout=_TOOL_S_MAX).strip()
    try:
        # The boot loader reads the filesystem itself, and knows less of ext4 than the kernel does.
        run(["mkfs.ext4", "-q", "-O", "^64bit,^metadata_csum", "-m", "0", device], timeout=_TOOL_S_MAX)
        mounted.mkdir(exist_ok=True)
        run(["mount", device, str(mounted)], timeout=_TOOL_S_MAX)
        try:
            boot = mounted / "boot"
            boot.mkdir()
            shutil.copyfile(kernel / "vmlinuz", boot / "vmlinuz")
            (boot / "initrd").write_bytes(gzip.compress(_first_files(kernel), 1))
            (boot / "extlinux.conf").write_text(f"{_LOADER}  APPEND {_KERNEL_WORDS}\n")
            run(["extlinux", "--install", str(boot)], timeout=_TOOL_S_MAX)
        finally:
            run(["umount", str(mounted)], timeout=_TOOL_S_MAX)
    finally:
        run(["losetup", "--detach", device], timeout=_TOOL_S_MAX)
    with raw.open("rb") as source, path.open("r+b" if path.exists() else "wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())
    raw.unlink()


def _partition_table() -> bytes:
    """Bytes 440 to 512 of the first sector: one active partition to the end."""
    first, count = _PARTITION_AT // 512, (IMAGE_BYTES - _PARTITION_AT) // 512
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", _LINUX_PARTITION, b"\xfe\xff\xff", first, count)
    return b"ASRF\0\0" + entry + bytes(48) + b"\x55\xaa"


def _first_files(kernel: Path) -> bytes:
    """The kernel's first filesystem: a cpio archive ("newc") with busybox, modules and `init`."""
    archive = bytearray()

    def add(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
        archive.extend(b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0")
        archive.extend(bytes(-len(archive) % 4) + content)
        archive.extend(bytes(-len(archive) % 4))

    for directory in ("bin", "modules", "dev"):
        add(directory, 0o040755)
    add("dev/console", 0o020600, device=(5, 1))
    add("bin/busybox", 0o100755, _BUSYBOX.read_bytes())
    for module in _MODULES:
        add(f"modules/{module}.ko", 0o100644, (kernel / f"modules/{module}.ko").read_bytes())
    add("init", 0o100755, _INIT.encode())
    add("TRAILER!!!", 0)
    return bytes(archive)


class GuestConsole:
    """The shell on a guest's serial console, by the socket it is on."""

    def __init__(self, path: Path, seconds_max: float = 60.0) -> None:
        self._seconds_max = seconds_max
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(1.0)
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            self._socket.connect(f"/proc/self/fd/{directory}/{path.name}")  # paths of sockets must be short
        finally:
            os.close(directory)
        self._heard = b""
        self._commands = 0

    def ask(self, command: str) -> str:
        """Run a command; what it printed. Raises LabError if it fails or does not end in time."""
        self._commands += 1
        mark = f"done-{self._commands}"
        # The shell's echo of this line has quotes within the marks, so that it is not taken for the answer.
        self._socket.sendall(f"echo begin''-{mark}; {command}; echo end''-{mark} $?\n".encode())
        text = self._wait_for(f"end-{mark} ".encode())
        said, _, rest = text.rpartition(f"end-{mark} ")
        while "\n" not in rest:
            rest += self._more()
        code = rest.split()[0]
        if code != "0":
            raise LabError(f"in the guest {command!r} ended with {code}: {said[-300:]}")
        return said.rpartition(f"begin-{mark}")[2].replace("\r", "").strip("\n")

    def close(self) -> None:
        self._socket.close()

    def _wait_for(self, text: bytes) -> str:
        deadline = time.monotonic() + self._seconds_max
        while text not in self._heard:
            if time.monotonic() > deadline:
                raise LabError(f"the guest did not say {text!r}: {self._heard[-300:]!r}")
            self._heard += self._more().encode(errors="replace")
        heard, self._heard = self._heard, b""
        return heard.decode(errors="replace")

    def _more(self) -> str:
        try:
            piece = self._socket.recv(4096)
        except TimeoutError:
            return ""
        if not piece:
            raise LabError("the guest's console is closed")
        return piece.decode(errors="replace")


if __name__ == "__main__":
    fetch_kernel(cache_directory())
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as directory:
            make_image(Path(sys.argv[1]), Path(directory))
