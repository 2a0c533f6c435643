"""What the agent is told of a disk server that is away: that it is, and nothing that counts as a failure."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio

from asrfs.daemon.disk_server_client import DiskServerClient
from asrfs.errors import TemporaryError


@pytest.mark.parametrize("dies", ["before it listens", "before it answers"])
async def test_a_disk_server_that_is_being_replaced_is_no_failure(dies: str, tmp_path: Path) -> None:
    """`Resyncer` waits a second for who raises TemporaryError itself, and a minute after anything else."""
    path = str(tmp_path / "disk_server.sock")
    client = DiskServerClient(path)

    async def die(listening: trio.socket.SocketType) -> None:
        stream, _ = await listening.accept()
        await stream.recv(1)
        stream.close()

    with trio.fail_after(10), trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        async with trio.open_nursery() as nursery:
            if dies == "before it answers":
                await listening.bind(path)
                listening.listen()
                nursery.start_soon(die, listening)
            with pytest.raises(TemporaryError, match="disk server") as raised:
                await client.fill(0, 0, 4096)
    assert raised.type is TemporaryError
    client.close()
