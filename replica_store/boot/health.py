"""Seeing that a recovered machine runs: a text on its console, a port that answers, a command that ends well.

Each is looked at again and again until it holds; what has held once is not asked again. The last one ends the clock of
the RTO.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from asrfs.errors import AsrfsError, TemporaryError
from asrfs.model.boot import Health

LOOK_INTERVAL_S = 0.1
_PORT_S_MAX = 2.0
_COMMAND_S_MAX = 60.0
_ANSWER_BYTES_MAX = 64 << 10
_CONSOLE_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where to look. `console`: the log of the serial console. `address`: of the port, where it is forwarded."""

    console: str | None = None
    address: tuple[str, int] | None = None
    variables: Mapping[str, str] | None = None
    """Environment of the command."""


class HealthCheck:
    """One start that is watched."""

    def __init__(self, health: Health, place: Place) -> None:
        self._missing: dict[str, Callable[[], bool]] = {}
        if health.console is not None:
            assert place.console is not None, "a machine without a console was checked: check_boot refuses that"
            self._missing[f"{health.console!r} on the console"] = _ConsoleText(place.console, health.console)
        if health.port is not None:
            address = place.address or (health.address, health.port)
            what = f"an answer on port {health.port}"
            self._missing[what] = lambda: port_answers(address, health.say, health.expect)
        if health.command is not None:
            words, variables = health.command, place.variables
            self._missing[f"a good end of {words[0]}"] = lambda: _ends_well(words, variables)

    def look(self) -> str | None:
        """What is still missing; None once it runs."""
        for what, holds in list(self._missing.items()):
            if not holds():
                return what
            del self._missing[what]
        return None


def wait_until_healthy(health: Health, place: Place, dead: Callable[[], str | None]) -> float:
    """Seconds until it ran. `dead` says how the machine ended, None while it goes on. Raises TemporaryError after
    `timeout`, AsrfsError when the machine ends."""
    begin = time.monotonic()
    check = HealthCheck(health, place)
    while (missing := check.look()) is not None:
        if (how := dead()) is not None:
            raise AsrfsError(f"the machine ended before it ran: {how}")
        if time.monotonic() - begin > health.timeout_s:
            raise TemporaryError(f"after {health.timeout} there was not {missing}")
        time.sleep(LOOK_INTERVAL_S)
    return time.monotonic() - begin


def port_answers(address: tuple[str, int], say: str, expect: str | None) -> bool:
    """Whether somebody takes the connection and, where that is asked for, says what is expected."""
    deadline = time.monotonic() + _PORT_S_MAX
    try:
        with socket.create_connection(address, timeout=_PORT_S_MAX) as connection:
            if say:
                connection.sendall(say.encode())
            if expect is None:
                return True
            heard = b""
            while expect.encode() not in heard:
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                piece = connection.recv(4096)
                heard += piece
                if not piece or len(heard) > _ANSWER_BYTES_MAX:
                    return False
            return True
    except OSError:
        return False


class _ConsoleText:
    """Whether a text has come; reads on from where it was."""

    def __init__(self, path: str, text: str) -> None:
        self._path = path
        self._text = text.encode()
        self._at = 0
        self._tail = b""

    def __call__(self) -> bool:
        try:
            with open(self._path, "rb") as log:
                log.seek(self._at)
                while piece := log.read(_CONSOLE_PIECE_BYTES):
                    self._at += len(piece)
                    seen = self._tail + piece
                    if self._text in seen:
                        return True
                    self._tail = seen[-(len(self._text) - 1) :] if len(self._text) > 1 else b""
        except FileNotFoundError:
            pass
        return False


def _ends_well(words: tuple[str, ...], variables: Mapping[str, str] | None) -> bool:
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_COMMAND_S_MAX,
            env=variables,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    except OSError as error:
        raise AsrfsError(f"{words[0]}: {error.strerror}") from None
    return done.returncode == 0
