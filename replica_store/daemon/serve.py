"""`replica-store serve`: one trio process for all connections of one vault, and the composition of its parts.

    data port    TLS, mutual ─▶ ingest.listener ─▶ vault          hosts
    manage port  HTTPS ─▶ api.app ─▶ vault                        enrolling, health
    now and then          map_keeper ─▶ map_worker (a process)    map checkpoints
    when one is due       failover_keeper ─▶ failover_worker (a process)   the end of test failovers
    when a host asks      digest_keeper ─▶ digest_workers         comparing disks

It holds the vault's lock for its whole life. SIGTERM and SIGINT end it: what is being stored is stored to its end,
then the connections are closed; nothing that was acknowledged depends on that.
"""

from __future__ import annotations

import logging
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import hypercorn
import hypercorn.trio
import structlog
import trio

from asrfs.model.clock import Clock
from asrfs.storage.priority import stand_back
from asrfs.storage.system_clock import SystemClock
from asrfs.transport import stream, tls
from replica_store.api.app import make_app
from replica_store.daemon.digest_keeper import DigestKeeper
from replica_store.daemon.failover_keeper import FailoverKeeper
from replica_store.daemon.fetch_keeper import FetchKeeper
from replica_store.daemon.group_keeper import GroupKeeper
from replica_store.daemon.map_keeper import MapKeeper
from replica_store.daemon.seed_keeper import SeedKeeper
from replica_store.ingest.listener import Listener
from replica_store.vault.vault import Vault, describe, lock, open_objects

DATA_PORT = 9443
MANAGE_PORT = 443
NICE = 10
"""Of the whole process: disks that are served on the same machine come first (I8)."""
_GRACE_S = 0.5
_READ_S = 15


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the two ports are, `HOST:PORT`."""

    data: str
    manage: str


class _ManageConfig(hypercorn.Config):
    """HTTPS with our own TLS settings on a socket that listens already."""

    def __init__(self, vault: Vault, listening: socket.socket) -> None:
        super().__init__()
        self.certfile = vault.keys.path("server.crt")
        self.keyfile = vault.keys.path("server.key")
        self.alpn_protocols = ["http/1.1"]
        self.bind = [f"fd://{listening.detach()}"]
        self.errorlog = logging.getLogger("replica_store.manage")
        self.graceful_timeout = _GRACE_S
        self.ssl_handshake_timeout = stream.HANDSHAKE_S
        self.read_timeout = _READ_S
        self.include_server_header = False

    def create_ssl_context(self) -> ssl.SSLContext:
        assert self.certfile is not None and self.keyfile is not None
        context = tls.manage_context(self.certfile, self.keyfile)
        context.set_alpn_protocols(self.alpn_protocols)
        return context


def run(root: str, host: str, data_port: int, manage_port: int, announce: Callable[[Addresses], None]) -> None:
    """Serve until SIGTERM or SIGINT. Raises RefusedError if the vault is served or an address is taken,
    IntegrityError for a damaged catalog."""
    describe(root)
    with lock(root), Vault.open(root, writable=True) as vault:
        vault.catalog.check_whole()
        vault.keys.check()
        open_objects(root).sweep()
        data = stream.listen(host, data_port)
        try:
            manage = stream.listen(host, manage_port)
        except BaseException:
            data.close()
            raise
        _start_logging()
        allow_descriptors()
        stand_back(NICE)
        trio.run(_serve, vault, SystemClock(), data, manage, announce)


async def _serve(
    vault: Vault, clock: Clock, data: socket.socket, manage: socket.socket, announce: Callable[[Addresses], None]
) -> None:
    addresses = Addresses(stream.address_of(data), stream.address_of(manage))
    keys = vault.keys
    context = tls.server_context(keys.path("server.crt"), keys.path("server.key"), keys.path("ca.crt"))
    comparing = DigestKeeper(vault.root)
    listener = Listener(vault, clock, comparing, FetchKeeper(vault))
    app = make_app(vault, clock, data.getsockname()[1], listener.threads)

    async def handle(connection: stream.SecureStream) -> None:
        await listener.handle(
            connection, connection.peer_certificate(), connection.peer_address(), connection.peer_host()
        )

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            config = _ManageConfig(vault, manage)
            asgi: Any = app
            await nursery.start(partial(hypercorn.trio.serve, asgi, config, shutdown_trigger=trio.sleep_forever))
            nursery.start_soon(
                partial(stream.serve, [stream.listener_of(data)], context, handle, refused=listener.refused)
            )
            nursery.start_soon(listener.save_links)
            nursery.start_soon(listener.configurations.run)
            nursery.start_soon(listener.handovers.run)
            nursery.start_soon(listener.promotions.run)
            nursery.start_soon(GroupKeeper(vault, lambda: listener.connected, clock, listener.threads).run)
            nursery.start_soon(comparing.run)
            nursery.start_soon(SeedKeeper(vault, listener.threads).run)
            nursery.start_soon(MapKeeper(vault, listener.threads).run)
            nursery.start_soon(FailoverKeeper(vault, clock, listener.threads).run)
            announce(addresses)
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()


def allow_descriptors() -> None:
    """As many open files as the system lets us have: a connection is one, an object being stored another. It refuses a
    limit above its own, `fs.nr_open`, which may have been lowered since we got ours: then that stays as it is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _printable(_logger: object, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Hosts say part of what is logged, and people read it on terminals. Line breaks are the renderer's concern."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = "".join(each if each.isprintable() or each == "\n" else "?" for each in value)
    return event


def _start_logging() -> None:
    """One line an event on stderr; stdout is for `ready` alone."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    structlog.configure(
        processors=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            _printable,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], drop_missing=True),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
