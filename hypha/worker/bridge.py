"""The job bridge: HTTP/1.1 on a Unix socket of mode 0600, one per job, spoken by its executor alone.

    POST /resources/fetch      ┐
    POST /resources/send       ├─▶ JobSession, one JSON object in, one out     (hypha.protocol.bridge)
    POST /status/send          ┘
    POST /resources/receive    ──▶ Server-Sent Events until the job ends
    POST /telemetry?kind=…     ──▶ OTLP protobuf, exported by this process

The app only translates; every rule lives in the session. Errors come back as a BridgeError with a reason:
400 not understood · 404 no such path · 409 refused · 413 too large · 500 a bug here · 503 later · 507 disk
"""

import logging
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from hypha.errors import HyphaError, JobFailed, PeerUnreachable, Refused, RemoteProtocolError, StoreError
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

# `protocol.messages.Reason` allows no more than 8192.
REASON_CHARS_MAX = 8000


class TooLarge(RemoteProtocolError):
    """A body beyond BODY_BYTES_MAX."""


_HTTP_STATUS = {PeerUnreachable: 503, StoreError: 507, TooLarge: 413}


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

    def fail(self, reason: str) -> None:
        """Note why the job fails, which whoever runs it ends then."""


async def _body(request: HttpRequest) -> bytes:
    parts: list[bytes] = []
    size = 0
    async with aclosing(request.stream()) as stream:
        async for part in stream:
            size += len(part)
            if size > BODY_BYTES_MAX:
                raise TooLarge(f"{request.url.path}: body exceeds {BODY_BYTES_MAX} bytes")
            parts.append(part)
    return b"".join(parts)


def _json(message: BridgeMessage, status: int = 200) -> Response:
    return Response(msgspec.json.encode(message), status, media_type="application/json")


def may_pass(error: HyphaError) -> bool:
    """Whether the same request may succeed later: nobody answered, or whoever did said so."""
    return isinstance(error, PeerUnreachable) or (isinstance(error, Refused) and error.code in ("retry", "busy"))


def _failure(error: HyphaError) -> Response:
    answer = BridgeError(reason=str(error)[:REASON_CHARS_MAX], retry=may_pass(error))
    return _json(answer, _HTTP_STATUS.get(type(error), 409))


def _endpoint(
    kind: Any,  # noqa: ANN401 - a Struct or a union of them
    call: Callable[[Any], Awaitable[BridgeMessage]],
) -> Callable[[HttpRequest], Awaitable[Response]]:
    decoder = msgspec.json.Decoder(kind)

    async def answer(request: HttpRequest) -> Response:
        try:
            message = decoder.decode(await _body(request))
            return _json(await call(message))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _json(BridgeError(reason=f"{request.url.path}: {error}"[:REASON_CHARS_MAX]), 400)
        except HyphaError as error:
            return _failure(error)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it

    return answer


async def _event_lines(session: JobSession) -> AsyncIterator[bytes]:
    # A comment line at once: the executor knows that it is subscribed before the first event exists.
    yield b": subscribed\n\n"
    async with aclosing(session.events()) as events:  # type: ignore[type-var]  # generators have aclose
        async for event in events:
            yield b"data: " + msgspec.json.encode(event) + b"\n\n"


def build_app(session: JobSession) -> Starlette:
    """Return the bridge of one job as an ASGI application."""
    readers = 0

    async def receive(request: HttpRequest) -> Response:
        nonlocal readers
        readers += 1
        if readers > 1:
            # Two would each get half of the events, and one that comes back has lost some.
            return _json(BridgeError(reason=f"{request.url.path}: there was a reader before"), 409)
        return StreamingResponse(_event_lines(session), media_type="text/event-stream")

    async def telemetry(request: HttpRequest) -> Response:
        try:
            await session.telemetry(request.query_params.get("kind", ""), await _body(request))
        except HyphaError as error:
            return _failure(error)
        except ClientDisconnect:
            return Response(status_code=499)
        return Response(status_code=204)

    async def no_route(request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _json(BridgeError(reason=f"{request.method} {request.url.path}: {error.detail}"), error.status_code)

    async def bug(request: HttpRequest, error: Exception) -> Response:
        # Starlette raises it again, and hypercorn logs it with its traceback: here it only becomes the job's end.
        reason = f"internal error at {request.url.path}: {type(error).__name__}: {error}"[:REASON_CHARS_MAX]
        session.fail(reason)
        return _json(BridgeError(reason=reason), 500)

    return Starlette(
        routes=[
            Route("/resources/fetch", _endpoint(Fetch, session.fetch), methods=["POST"]),
            Route("/resources/send", _endpoint(Send, session.send), methods=["POST"]),
            Route("/resources/receive", receive, methods=["POST", "GET"]),
            Route("/status/send", _endpoint(Report, session.report), methods=["POST"]),
            Route("/telemetry", telemetry, methods=["POST"]),
        ],
        exception_handlers={HTTPException: no_route, Exception: bug},
    )


@contextmanager
def _socket_path(directory: Path) -> Iterator[Path]:
    """Yield a path for the socket: in the job's directory, or in a private one where that path is too long."""
    path = directory / "bridge.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="hypha-") as short:
        yield Path(short) / "bridge.sock"


def _listener(path: Path) -> socket.socket:
    """Return a socket bound to `path`, for this user alone. Raises JobFailed."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fsencode(path))
        path.chmod(0o600)  # until then the directory's mode keeps others out
    except OSError as error:
        listener.close()
        raise JobFailed(f"no bridge at {path}: {error.strerror or error}") from error
    return listener


async def serve_bridge(
    session: JobSession, directory: Path, *, task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve the bridge until cancelled; reports the socket's path once it accepts connections.

    Raises JobFailed when there can be no socket.
    """
    with _socket_path(directory) as path:
        config = HypercornConfig()
        config.bind = [f"fd://{_listener(path).detach()}"]
        config.accesslog = None
        config.errorlog = logging.getLogger("hypercorn.error")
        config.keep_alive_timeout = 3600.0
        config.graceful_timeout = 0.2
        app = cast(Any, build_app(session))
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve, app, config, shutdown_trigger=trio.sleep_forever, mode="asgi"))
            task_status.started(path)
