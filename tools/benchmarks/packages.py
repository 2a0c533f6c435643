"""Debian packages that peers need: installed when missing and allowed, named with a reason when they cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

_APT_SECONDS_MAX = 600.0


class Packages:
    """`may_install`: whether apt-get may be asked. Its list is brought up to date once, when it is first needed."""

    def __init__(self, *, may_install: bool) -> None:
        self._may_install = may_install
        self._is_updated = False

    def missing(self, wanted: Sequence[str]) -> str:
        """Have these installed; empty, or why they are not."""
        absent = [package for package in wanted if not version_of(package)]
        if not absent or shutil.which("dpkg-query") is None:  # elsewhere the programs are looked for themselves
            return ""
        names = " ".join(absent)
        if not self._may_install:
            return f"not installed: {names}"
        if not self._is_updated:
            self._is_updated = True
            _apt("update")
        said = _apt("install", "--no-install-recommends", *absent)
        return "" if all(map(version_of, absent)) else f"apt-get cannot install {names}: {said}"


def version_of(package: str) -> str:
    """The version that is installed; empty if none is or this is not Debian."""
    try:
        done = subprocess.run(
            ["dpkg-query", "-W", "-f=${db:Status-Status} ${Version}\\n", package],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except OSError:
        return ""
    lines = [line.split() for line in done.stdout.splitlines()]
    return next((line[1] for line in lines if len(line) == 2 and line[0] == "installed"), "")


def _apt(*words: str) -> str:
    """Run apt-get; its last word if it failed."""
    command = ["apt-get", "-qq", "-y", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=1", *words]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_APT_SECONDS_MAX,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if done.returncode and lines else ""
