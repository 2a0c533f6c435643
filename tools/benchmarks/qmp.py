"""QEMU's machine protocol on a Unix socket: commands in, answers out, events passed over."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from lab import LabError

_ANSWER_SECONDS_MAX = 60.0


class Qmp:
    """One connection, its capabilities negotiated."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_ANSWER_SECONDS_MAX)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r")
        self._read()
        self.execute("qmp_capabilities")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """The answer to a command; underscores in names of arguments stand for hyphens. Raises LabError."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        while "event" in (answer := self._read()):
            pass
        if "error" in answer:
            raise LabError(f"QEMU refuses {command}: {answer['error'].get('desc', answer['error'])}")
        return answer["return"]

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise LabError("QEMU closed its control socket")
        found: dict[str, Any] = json.loads(line)
        return found
