"""The management port's HTTP API, version 1. Two doors are open to who has no certificate:

    POST /api/v1/enroll    a one-time token becomes a certificate and keys
    GET  /api/v1/health    whether the store serves

Every reply that is not 2xx is `transport.enrolment.ApiFailure`: one line for people, and the exit code of its class.
"""

from __future__ import annotations

from contextlib import aclosing

import msgspec
import structlog
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from asrfs import __version__
from asrfs.errors import AsrfsError, BadInputError, NoSpaceError
from asrfs.model.clock import Clock
from asrfs.transport.enrolment import ENROL_PATH, HEALTH_PATH, ApiFailure, EnrolRequest
from replica_store.vault.enrolment import enrol
from replica_store.vault.vault import Vault

BODY_BYTES_MAX = 64 << 10
HEARD_BYTES_MAX = 1 << 20  # who is refused before all is said may find a broken connection, and no reason
BODY_S_MAX = 15.0
_STATUS = {2: 400, 3: 404, 4: 409, 5: 500, 6: 401}
_log = structlog.get_logger("replica_store.api")


def make_app(vault: Vault, clock: Clock, data_port: int, threads: trio.CapacityLimiter) -> Starlette:
    """The ASGI application. `data_port` is told to who enrols."""

    async def post_enroll(request: Request) -> Response:
        wanted = decode_request(await _body(request))
        reply = await trio.to_thread.run_sync(enrol, vault, wanted, clock, data_port, limiter=threads)
        _log.info("machine enrolled", machine=wanted.machine, id=wanted.machine_id)
        return _json(reply, 200)

    async def get_health(request: Request) -> Response:
        await trio.to_thread.run_sync(vault.catalog.machine_by_id, "", limiter=threads)  # the catalog answers
        return _json({"status": "ok", "store_id": vault.id, "version": __version__}, 200)

    return Starlette(
        routes=[
            Route(ENROL_PATH, post_enroll, methods=["POST"]),
            Route(HEALTH_PATH, get_health, methods=["GET"]),
        ],
        exception_handlers={AsrfsError: _on_our_error, HTTPException: _on_http_error, Exception: _on_any_error},
    )


async def _body(request: Request) -> bytes:
    """The whole body, if it is of sensible size and comes in sensible time."""
    body = bytearray()
    heard = 0
    try:
        with trio.fail_after(BODY_S_MAX):
            async with aclosing(request.stream()) as chunks:
                async for chunk in chunks:
                    heard += len(chunk)
                    if heard <= BODY_BYTES_MAX:
                        body += chunk
                    elif heard > HEARD_BYTES_MAX:
                        break
    except trio.TooSlowError:
        raise BadInputError(f"the request did not come within {BODY_S_MAX:g} s") from None
    except ClientDisconnect:
        raise BadInputError("the client hung up") from None
    if heard > BODY_BYTES_MAX:
        raise BadInputError(f"the request is longer than {BODY_BYTES_MAX} bytes")
    return bytes(body)


def decode_request(body: bytes) -> EnrolRequest:
    """The body of a request to enrol. Raises BadInputError."""
    try:
        return msgspec.json.decode(body, type=EnrolRequest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadInputError(f"the request cannot be read: {error}") from None


def _json(document: object, status: int) -> Response:
    return Response(msgspec.json.encode(document), status, media_type="application/json")


async def _on_our_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AsrfsError)
    _log.warning("request refused", path=request.url.path, reason=str(error))
    status = 507 if isinstance(error, NoSpaceError) else _STATUS.get(error.exit_code, 503)
    return _json(ApiFailure(error=" ".join(str(error).split()), exit_code=error.exit_code), status)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    failure = ApiFailure(error=f"{request.method} {request.url.path[:100]}: {error.detail}", exit_code=3)
    return Response(msgspec.json.encode(failure), error.status_code, error.headers, media_type="application/json")


async def _on_any_error(request: Request, error: Exception) -> Response:
    return _json(ApiFailure(error="the store met a fault of its own: see its log", exit_code=1), 500)
