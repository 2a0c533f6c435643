"""The agent's connections to the disk server's control socket.

One is kept for the short verbs, one for `fill`, so that initial replication never delays a look at the positions. A
connection is made when it is needed and made again after any error of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asrfs.consistency.group_share import Held
from asrfs.daemon.control import CALL_SECONDS_MAX, Fields, UnreachableError, encode_message
from asrfs.daemon.control_trio import AsyncControlClient, PromptControlClient
from asrfs.daemon.hardening import AGENT_URGENCY, hurry, take_time
from asrfs.errors import AsrfsError, FormatError, TemporaryError
from asrfs.model.positions import Cursor
from asrfs.replication.disk_server import HostPositions

PATIENCE_S = 0.1
"""For so long at the most the whole agent waits for a hold to begin, and for its end to be told: others hold meanwhile,
and every switch of tasks is theirs."""
RELEASE_PATIENCE_S = 0.005


class _Line:
    """One connection, made anew when it broke."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._client: AsyncControlClient | None = None

    async def call(self, verb: str, *, seconds_max: float = CALL_SECONDS_MAX, **fields: Any) -> Fields:
        try:
            client = self._client
            if client is None:
                client = self._client = await AsyncControlClient.open(self._path)
            return await client.call(verb, seconds_max=seconds_max, **fields)
        except UnreachableError as error:
            self.close()
            raise TemporaryError(str(error)) from None  # that alone means that it is away and will be back
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
        self._hold = PromptControlClient(path)
        self._armed = ("", b"")
        """Of which point, and the message that has it held."""
        self._let_go = ""
        """Of which point the release was asked for and is not answered."""

    async def positions(self) -> HostPositions:
        return host_positions(await self._short.call("positions"))

    async def sync(self) -> HostPositions:
        return host_positions(await self._long.call("sync"))

    async def marker(self, payload: bytes) -> tuple[int, int]:
        reply = await self._long.call("marker", payload=payload)
        return int(reply["lsn"]), int(reply["time_ns"])

    async def arm(self, hold_id: str, marker: bytes, seconds_max: float, not_after: float | None) -> None:
        fields = {"id": hold_id, "payload": marker, "seconds": seconds_max, "not_after": not_after}
        message = encode_message({"verb": "arm", **fields})
        try:
            await self._hold.call(message)
        except UnreachableError:  # what the line was to is gone: the next one is asked the same, once
            await self._hold.call(message)
        self._armed = hold_id, encode_message({"verb": "hold", "id": hold_id})
        if not_after is None:  # else others may freeze for long before anybody holds
            hurry(AGENT_URGENCY)

    async def hold(self, hold_id: str) -> Held:
        armed, message = self._armed
        if armed != hold_id:
            message = encode_message({"verb": "hold", "id": hold_id})
        reply = await self._hold.call(message, PATIENCE_S)
        return Held(int(reply["lsn"]), int(reply["time_ns"]), int(reply["epoch"]))

    def let_go(self, hold_id: str, quiet_s: float) -> None:
        try:
            self._hold.send(_release(hold_id, quiet_s))
            self._let_go = hold_id
        except AsrfsError:
            pass  # `release` tries again

    async def release(self, hold_id: str, quiet_s: float) -> tuple[bool, float]:
        is_asked, self._let_go = self._let_go == hold_id, ""
        message = _release(hold_id, quiet_s)
        patience_s = min(quiet_s + RELEASE_PATIENCE_S, PATIENCE_S)
        try:
            try:
                if not is_asked:
                    self._hold.send(message)
                reply = await self._hold.receive(patience_s)
            except UnreachableError:  # as above
                reply = await self._hold.call(message, patience_s)
        finally:
            take_time()
        return reply["holding"] is True, float(reply["hold_ms"])

    async def make_durable(self) -> None:
        await self._long.call("sync")

    async def applied(self, lsn: int, segment: int) -> None:
        await self._short.call("applied", lsn=lsn, segment=segment)

    async def fill(self, slot: int, offset: int, length: int) -> int:
        reply = await self._fill.call("fill", slot=slot, offset=offset, length=length)
        return int(reply["lsn"])

    async def rewrite(
        self, slot: int, extents: Sequence[tuple[int, int]], content: bytes, zeros: Sequence[tuple[int, int]]
    ) -> int:
        extents, zeros = list(extents), list(zeros)
        reply = await self._fill.call("rewrite", slot=slot, extents=extents, content=content, zeros=zeros)
        return int(reply["appended"])

    async def hydrating(self, slot: int, extents: Sequence[tuple[int, int]], applied_lsn: int) -> None:
        await self._long.call("hydrating", slot=slot, extents=list(extents), applied_lsn=applied_lsn)

    async def new_epoch(self, epoch: int, after_lsn: int) -> HostPositions:
        return host_positions(await self._long.call("new_epoch", epoch=epoch, after_lsn=after_lsn))

    async def reread_fence(self) -> None:
        await self._long.call("fence")

    async def reread_disks(self) -> None:
        await self._fill.call("disks")

    def close(self) -> None:
        for line in (self._short, self._long, self._fill, self._hold):
            line.close()


def _release(hold_id: str, quiet_s: float) -> bytes:
    return encode_message({"verb": "release", "id": hold_id, "quiet_s": quiet_s})


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
        said = str(failed) if failed else None
        served_s = float(reply.get("served_s", 0.0))  # an older one that was adopted does not say
        return HostPositions(int(reply["appended"]), durable, int(reply["epoch"]), said, served_s)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"the disk server's positions cannot be understood: {error}") from None
