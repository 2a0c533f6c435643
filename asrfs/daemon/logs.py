"""Log files of the daemons: `STATE/log/ROLE.log`, rotated at 10 MiB, two old ones kept.

A daemon's stderr is its log, so that a traceback of a dying process lands there too; after a rotation it follows to
the new file. Nothing is logged for each request.
"""

from __future__ import annotations

import logging
import os
import time
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler

from asrfs.daemon.state import Role, StateDirectory

LOG_BYTES_MAX = 10 << 20
OLD_LOGS = 2
_FORMAT = "%(asctime)s.%(msecs)03dZ %(process)d %(levelname)s %(name)s: %(message)s"
_STDERR = 2


class _StderrFollowsHandler(RotatingFileHandler):
    """Takes stderr along, so that there is one log and not one before and one after the rotation."""

    def _open(self) -> TextIOWrapper:
        fd = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return open(fd, "a", encoding=self.encoding)

    def doRollover(self) -> None:
        super().doRollover()
        self.take_stderr()

    def take_stderr(self) -> None:
        if self.stream is not None:
            os.dup2(self.stream.fileno(), _STDERR)


def start_logging(state: StateDirectory, role: Role, *, owns_stderr: bool) -> None:
    """Send what is logged to the file of this role, and stderr as well if it is ours alone."""
    path = state.log_path(role)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    handler = _StderrFollowsHandler(path, maxBytes=LOG_BYTES_MAX, backupCount=OLD_LOGS, encoding="utf-8")
    formatter = logging.Formatter(_FORMAT, "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    if owns_stderr:
        handler.take_stderr()
