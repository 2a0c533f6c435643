"""A TCP relay that counts what passes: bytes on the wire, TLS and all, as a link would carry them."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path

_PIECE_BYTES = 1 << 20


class Relay:
    """Listens on loopback at `port` and passes everything on to `target`, `HOST:PORT`. `sent`, `received`: by hosts."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self.sent = 0
        self.received = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def passed(self) -> int:
        """In both directions."""
        return self.sent + self.received

    def stand_between(self, state: Path) -> None:
        """Have the machine in this state directory, which is enrolled and not served, connect to the relay."""
        self._point(state, self.port)

    def stand_aside(self, state: Path) -> None:
        """Have it connect to the store itself again, from its next start on."""
        self._point(state, self._target[1])

    def _point(self, state: Path, port: int) -> None:
        path = state / "keys" / "store.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data_port": port}))

    def close(self) -> None:
        self._listening.close()
        for end in self._open:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open += [near, far]
            threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_host: bool) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(_PIECE_BYTES):
                if is_host:
                    self.sent += len(content)
                else:
                    self.received += len(content)
                sink.sendall(content)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
