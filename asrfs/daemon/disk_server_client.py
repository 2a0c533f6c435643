"""The agent's connections to the disk server's control socket.

One is kept for the short verbs, one for `fill`, so that initial replication never delays a look at the positions. A
connection is made when it is needed and made again after any error of it.
"""

from __future__ import annotations

from typing import Any

from asrfs.daemon.control import CALL_SECONDS_MAX, Fields
from asrfs.daemon.control_trio import AsyncControlClient
from asrfs.errors import FormatError, TemporaryError
from asrfs.model.positions import Cursor
from asrfs.replication.disk_server import HostPositions


class _Line:
    """One connection, made anew when it broke."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._client: AsyncControlClient | None = None

    async def call(self, verb: str, *, seconds_max: float = CALL_SECONDS_MAX, **fields: Any) -> Fields:
        client = self._client
        if client is None:
            client = self._client = await AsyncControlClient.open(self._path)
        try:
            return await client.call(verb, seconds_max=seconds_max, **fields)
        except BaseException as error:
            if not _was_answered(error):
                self.close()
            raise

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def _was_answered(error: BaseException) -> bool:
    """Whether the connection is still good: the other side refused, it did not vanish."""
    return isinstance(error, Exception) and not isinstance(error, TemporaryError)


class DiskServerClient:
    """`replication.disk_server.DiskServer` over the control socket at `path`."""

    def __init__(self, path: str) -> None:
        self._short = _Line(path)
        self._long = _Line(path)
        self._fill = _Line(path)

    async def positions(self) -> HostPositions:
        return host_positions(await self._short.call("positions"))

    async def sync(self) -> HostPositions:
        return host_positions(await self._long.call("sync"))

    async def marker(self, payload: bytes) -> tuple[int, int]:
        reply = await self._long.call("marker", payload=payload)
        return int(reply["lsn"]), int(reply["time_ns"])

    async def applied(self, lsn: int, segment: int) -> None:
        await self._short.call("applied", lsn=lsn, segment=segment)

    async def fill(self, slot: int, offset: int, length: int) -> int:
        reply = await self._fill.call("fill", slot=slot, offset=offset, length=length)
        return int(reply["lsn"])

    async def reread_disks(self) -> None:
        await self._fill.call("disks")

    def close(self) -> None:
        for line in (self._short, self._long, self._fill):
            line.close()


def host_positions(reply: Fields) -> HostPositions:
    """A reply of the verbs `positions` and `sync`. Raises FormatError."""
    try:
        durable = Cursor(
            lsn=int(reply["durable"]),
            segment=int(reply["segment"]),
            offset=int(reply["offset"]),
            time_ns=int(reply["time_ns"]),
        )
        failed = reply["failed"]
        return HostPositions(int(reply["appended"]), durable, int(reply["epoch"]), str(failed) if failed else None)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"the disk server's positions cannot be understood: {error}") from None
