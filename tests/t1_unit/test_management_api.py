"""The management port's application, called as its server calls it."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from asrfs.storage.system_clock import SystemClock
from asrfs.transport.enrolment import ENROL_PATH, ApiFailure
from replica_store.api.app import BODY_BYTES_MAX, HEARD_BYTES_MAX, make_app
from replica_store.vault.vault import Vault

CHUNK_BYTES = 64 << 10


@pytest.mark.parametrize("body_bytes", [BODY_BYTES_MAX + 1, HEARD_BYTES_MAX])
async def test_who_says_too_much_is_heard_out_and_then_refused(scratch: Path, body_bytes: int) -> None:
    """A client that says all before it listens would otherwise find its connection broken, and no reason."""
    status, reason, heard = await post(scratch, body_bytes)
    assert (status, heard) == (400, body_bytes)
    assert reason == f"the request is longer than {BODY_BYTES_MAX} bytes"


async def test_who_does_not_stop_is_not_heard_out(scratch: Path) -> None:
    status, _, heard = await post(scratch, 1 << 40)
    assert status == 400
    assert HEARD_BYTES_MAX < heard <= HEARD_BYTES_MAX + CHUNK_BYTES


async def post(scratch: Path, body_bytes: int) -> tuple[int, str, int]:
    """Ask for an enrolment with so long a body: status and reason of the answer, and the bytes taken before it."""
    heard = status = 0
    said = b""

    async def receive() -> dict[str, Any]:
        nonlocal heard
        await trio.lowlevel.checkpoint()
        part = min(CHUNK_BYTES, body_bytes - heard)
        heard += part
        return {"type": "http.request", "body": b"x" * part, "more_body": heard < body_bytes}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status, said
        status = message.get("status", status)
        said += message.get("body", b"")

    scope = {"type": "http", "method": "POST", "path": ENROL_PATH, "headers": [], "query_string": b""}
    with Vault.create(str(scratch / "vault"), "site-b", SystemClock()) as vault:
        await make_app(vault, SystemClock(), 0, trio.CapacityLimiter(1))(scope, receive, send)
    return status, msgspec.json.decode(said, type=ApiFailure).error, heard
