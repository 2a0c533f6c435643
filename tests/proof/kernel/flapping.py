"""A link that flaps: a relay on loopback that cuts its connections, or lets them hang, and counts what went through."""

from __future__ import annotations

import select
import socket
import struct
import threading
from contextlib import suppress

_PIECE_BYTES = 256 << 10
_LOOK_S = 0.02
_RESET = struct.pack("ii", 1, 0)


class Relay:
    """Listens on `port` and hands on to `target` on loopback, while it is `up`. Use as a context."""

    def __init__(self, target: int) -> None:
        self.bytes_sent = 0
        """By those who connect."""
        self.connections = 0
        """That were handed on."""
        self.cuts = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._up = threading.Event()
        self._up.set()
        self._hanging = threading.Event()
        self._stop = threading.Event()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._changing = threading.Lock()
        self._thread = threading.Thread(target=self._accept)
        self._served: list[threading.Thread] = []

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()
        self.cut()
        for thread in self._served:
            thread.join()

    def cut(self) -> None:
        """Reset all connections, and refuse others until `mend`."""
        self._up.clear()
        with self._changing:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            self.cuts += 1
            for end in pair:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    end.shutdown(socket.SHUT_RDWR)

    def hang(self) -> None:
        """Nothing goes through until `mend`, and nobody is told."""
        self._hanging.set()

    def mend(self) -> None:
        self._hanging.clear()
        self._up.set()

    def _accept(self) -> None:
        while not self._stop.is_set():
            if not select.select([self._listener], [], [], _LOOK_S)[0]:
                continue
            near, _ = self._listener.accept()
            if not self._up.is_set():
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self.connections += 1
            with self._changing:
                self._pairs.append((near, far))
            self._served.append(threading.Thread(target=self._serve, args=(near, far)))
            self._served[-1].start()

    def _serve(self, near: socket.socket, far: socket.socket) -> None:
        back = threading.Thread(target=self._hand_on, args=(far, near, False))
        with near, far:
            back.start()
            self._hand_on(near, far, True)
            back.join()

    def _hand_on(self, source: socket.socket, sink: socket.socket, is_counted: bool) -> None:
        with suppress(OSError):
            while not self._stop.is_set():
                if self._hanging.is_set() or not select.select([source], [], [], _LOOK_S)[0]:
                    self._stop.wait(_LOOK_S if self._hanging.is_set() else 0)
                    continue
                piece = source.recv(_PIECE_BYTES)
                if not piece:
                    break
                sink.sendall(piece)
                self.bytes_sent += len(piece) if is_counted else 0
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
