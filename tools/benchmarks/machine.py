"""What a machine is, as far as results depend on it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path


def description(directory: Path) -> dict[str, str]:
    """Processor, memory, kernel, system, Python, and the filesystem that `directory` lies on."""
    return {
        "processor": f"{os.cpu_count()} × {_field(Path('/proc/cpuinfo'), 'model name') or platform.machine()}",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / (1 << 30):.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "system": _release(),
        "python": f"{platform.python_version()}, {'' if sys.base_prefix == '/usr' else 'not '}the system's build",
        "filesystem": _filesystem(directory),
    }


def _field(path: Path, name: str) -> str:
    for line in path.read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _release() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _filesystem(directory: Path) -> str:
    """Type and options, and what kind of device is below."""
    words = ["findmnt", "--noheadings", "--output", "FSTYPE,SOURCE,OPTIONS", "--target", str(directory)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    return " ".join(done.stdout.split()) or "unknown"
