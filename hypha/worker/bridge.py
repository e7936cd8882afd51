"""The job bridge: HTTP/1.1 on a Unix socket of mode 0600, one per job, spoken by its executor alone.

    POST /resources/fetch      ┐
    POST /resources/send       ├─▶ JobSession, one JSON object in, one out     (hypha.protocol.bridge)
    POST /status/send          ┘
    POST /resources/receive    ──▶ Server-Sent Events until the job ends
    POST /telemetry?kind=…     ──▶ OTLP protobuf, exported by this process

The app only translates; every rule lives in the session. Errors come back as a BridgeError with a reason.
"""

import logging
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from hypha.errors import HyphaError, PeerUnreachable, StoreError
from hypha.protocol.bridge import (
    BridgeError,
    BridgeMessage,
    Event,
    Fetch,
    Fetched,
    Instruction,
    Report,
    Send,
    Sent,
)

# Requests are metadata; an update of many intervals is the largest, telemetry batches come next.
BODY_BYTES_MAX = 4 << 20
# Linux refuses longer socket paths (sun_path is 108 bytes with its terminator).
SOCKET_PATH_BYTES_MAX = 100

_HTTP_STATUS = {PeerUnreachable: 503, StoreError: 507}


class JobSession(Protocol):
    """What one job's executor may ask of its worker. Implementations: training, aggregating, simulated."""

    async def fetch(self, request: Fetch) -> Fetched:
        """Bring what is asked for into the work directory."""

    async def send(self, request: Send) -> Sent:
        """Deliver an update to the parameter servers and return their answer."""

    async def report(self, report: Report) -> Instruction:
        """Take note of a report; answers at once with the newest instruction."""

    def events(self) -> AsyncIterator[Event]:
        """Yield events until the job ends; there is one reader."""

    async def telemetry(self, kind: str, body: bytes) -> None:
        """Export an OTLP batch of the executor's: kind is traces, metrics or logs."""


async def _body(request: HttpRequest) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > BODY_BYTES_MAX:
            raise msgspec.ValidationError(f"body exceeds {BODY_BYTES_MAX} bytes")
        parts.append(part)
    return b"".join(parts)


def _json(message: BridgeMessage, status: int = 200) -> Response:
    return Response(msgspec.json.encode(message), status, media_type="application/json")


def _failure(error: HyphaError) -> Response:
    retry = isinstance(error, PeerUnreachable)
    return _json(BridgeError(reason=str(error)[:8000], retry=retry), _HTTP_STATUS.get(type(error), 409))


def _endpoint(
    kind: Any,  # noqa: ANN401 - a Struct or a union of them
    call: Callable[[Any], Awaitable[BridgeMessage]],
) -> Callable[[HttpRequest], Awaitable[Response]]:
    decoder = msgspec.json.Decoder(kind)

    async def answer(request: HttpRequest) -> Response:
        try:
            message = decoder.decode(await _body(request))
        except (msgspec.DecodeError, RecursionError) as error:
            return _json(BridgeError(reason=f"{request.url.path}: {error}"), 400)
        try:
            return _json(await call(message))
        except HyphaError as error:
            return _failure(error)

    return answer


async def _event_lines(session: JobSession) -> AsyncIterator[bytes]:
    # A comment line at once: the executor knows that it is subscribed before the first event exists.
    yield b": subscribed\n\n"
    async with aclosing(session.events()) as events:  # type: ignore[type-var]  # generators have aclose
        async for event in events:
            yield b"data: " + msgspec.json.encode(event) + b"\n\n"


def build_app(session: JobSession) -> Starlette:
    """Return the bridge of one job as an ASGI application."""

    async def receive(_request: HttpRequest) -> Response:
        return StreamingResponse(_event_lines(session), media_type="text/event-stream")

    async def telemetry(request: HttpRequest) -> Response:
        try:
            await session.telemetry(request.query_params.get("kind", ""), await _body(request))
        except HyphaError as error:
            return _failure(error)
        except msgspec.ValidationError as error:
            return _json(BridgeError(reason=str(error)), 413)
        return Response(status_code=204)

    return Starlette(
        routes=[
            Route("/resources/fetch", _endpoint(Fetch, session.fetch), methods=["POST"]),
            Route("/resources/send", _endpoint(Send, session.send), methods=["POST"]),
            Route("/resources/receive", receive, methods=["POST", "GET"]),
            Route("/status/send", _endpoint(Report, session.report), methods=["POST"]),
            Route("/telemetry", telemetry, methods=["POST"]),
        ]
    )


@contextmanager
def _socket_path(directory: Path) -> Any:  # noqa: ANN401 - a generator for contextmanager
    """Yield a path for the socket: in the job's directory, or in a private one where that path is too long."""
    path = directory / "bridge.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="hypha-") as short:
        yield Path(short) / "bridge.sock"


async def serve_bridge(
    session: JobSession, directory: Path, *, task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve the bridge until cancelled; reports the socket's path once it accepts connections."""
    with _socket_path(directory) as path:
        config = HypercornConfig()
        config.bind = [f"unix:{path}"]
        config.umask = 0o177
        config.accesslog = None
        config.errorlog = logging.getLogger("hypercorn.error")
        config.keep_alive_timeout = 3600.0
        config.graceful_timeout = 0.2
        async with trio.open_nursery() as nursery:
            await nursery.start(
                partial(serve, cast(Any, build_app(session)), config, shutdown_trigger=trio.sleep_forever, mode="asgi")
            )
            task_status.started(path)
        with suppress(FileNotFoundError):
            path.unlink()
