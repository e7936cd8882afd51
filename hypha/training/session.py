"""The executor's end of the job bridge: typed calls over the Unix socket, events through a bounded queue.

    main thread      fetch(FetchBase) send(SendUpdate) report(TrainProgress)  ─▶ one JSON object out, one in
    reader thread    /resources/receive ─▶ queue ─▶ next_event(), drain()
    telemetry        post_otlp(path, body), from its own threads

When the worker goes, the event stream ends, and every later call raises BridgeClosed: an executor never outlives it.
"""

import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import msgspec

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError
from hypha.protocol.bridge import BridgeError, BridgeMessage, Event, Fetch, Fetched, Instruction, Report, Send, Sent

# Events are few per round; a reader that is this far behind stalls the stream, not the memory.
EVENTS_BUFFERED_MAX = 1024
EVENT_BYTES_MAX = 4 << 20
# The socket is local: whoever does not accept at once is gone.
CONNECT_TIMEOUT_S = 5.0
# Answers to reports come at once; the rest may wait for the network as long as the worker likes.
REPORT_TIMEOUT_S = 30.0
TELEMETRY_TIMEOUT_S = 5.0
# While the worker says "later": first pause, then doubled up to the longest.
RETRY_S = 0.1
RETRY_S_MAX = 2.0
# Main loop, a report, samples of two rounds, send, telemetry, and what of these was given up and is not answered yet.
CONNECTIONS_MAX = 16


class BridgeClosed(PeerUnreachable):
    """The worker is gone, or has closed this job's bridge."""


class BridgeRefused(Refused):
    """The worker answered no. `retry`: the same request may succeed later."""

    def __init__(self, reason: str, *, retry: bool) -> None:
        super().__init__(reason)
        self.retry = retry


class Session:
    """One executor's connection to its worker; use as a context manager. Calls are safe from any thread."""

    def __init__(self, socket_path: Path, *, on_lost: Callable[[], None] = lambda: None) -> None:
        """`on_lost` is called from the reader thread when the event stream ends before `close`."""
        self._path = socket_path
        transport = httpx.HTTPTransport(uds=str(socket_path), limits=httpx.Limits(max_connections=CONNECTIONS_MAX))
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        self._http = httpx.Client(transport=transport, base_url="http://worker", timeout=timeout, trust_env=False)
        self._events: queue.Queue[Event] = queue.Queue(EVENTS_BUFFERED_MAX)
        self._subscribed = threading.Event()
        self._gone = threading.Event()
        self._closing = threading.Event()
        self._on_lost = on_lost
        self._stream_socket: socket.socket | None = None
        self._fault: str = "the bridge is closed"
        self._reader = threading.Thread(target=self._read_events, name="bridge-events", daemon=True)

    def __enter__(self) -> "Session":
        """Subscribe to events first, so that none is missed. Raises BridgeClosed."""
        if not self._path.is_socket():  # httpcore would leak the descriptor it could not connect
            raise BridgeClosed(f"bridge: {self._path} is not a socket")
        self._reader.start()
        self._subscribed.wait()
        if self._stream_socket is None:
            self._http.close()
            raise BridgeClosed(self._fault)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Hang up."""
        self._closing.set()
        if self._stream_socket is not None:
            with suppress(OSError):  # the worker hung up first
                self._stream_socket.shutdown(socket.SHUT_RDWR)
        self._reader.join(CONNECT_TIMEOUT_S)
        self._http.close()

    # --- requests ---

    def fetch(self, request: Fetch) -> Fetched:
        """Have the worker bring something. Raises BridgeRefused, BridgeClosed."""
        answer: Fetched = self._call("/resources/fetch", request, Fetched)
        return answer

    def fetch_patiently(self, request: Fetch, *, leave: Callable[[], bool] = lambda: False) -> Fetched:
        """`fetch`, again while the worker says "later" and `leave` is false. Raises BridgeRefused, BridgeClosed."""
        pause = RETRY_S
        while True:
            try:
                return self.fetch(request)
            except BridgeRefused as refusal:
                if not refusal.retry or leave():
                    raise
            if self._closing.wait(pause) or self._gone.is_set():
                raise BridgeClosed(self._fault)
            pause = min(2 * pause, RETRY_S_MAX)

    def send(self, request: Send) -> Sent:
        """Deliver an update; returns when every parameter server has answered. Raises BridgeRefused, BridgeClosed."""
        answer: Sent = self._call("/resources/send", request, Sent)
        return answer

    def report(self, report: Report) -> Instruction:
        """Say how it goes. Raises BridgeRefused, BridgeClosed."""
        answer: Instruction = self._call("/status/send", report, Instruction, timeout_s=REPORT_TIMEOUT_S)
        return answer

    def post_otlp(self, path: str, body: bytes) -> None:
        """Hand an OTLP request to the worker; `path` says its kind. Raises BridgeClosed, BridgeRefused."""
        response = self._post(path, body, "application/x-protobuf", TELEMETRY_TIMEOUT_S)
        if response.status_code >= 400:
            raise BridgeRefused(f"telemetry: HTTP {response.status_code}", retry=False)

    # --- events ---

    def drain(self) -> list[Event]:
        """Return what has arrived, without waiting. Raises BridgeClosed once the stream has ended and all is taken."""
        events: list[Event] = []
        while len(events) < EVENTS_BUFFERED_MAX:
            try:
                events.append(self._events.get_nowait())
            except queue.Empty:
                break
        if not events and self._gone.is_set() and self._events.empty():
            raise BridgeClosed(self._fault)
        return events

    def next_event(self, timeout_s: float) -> Event | None:
        """Wait for one event, None after `timeout_s`. Raises BridgeClosed."""
        deadline = time.monotonic() + timeout_s
        while True:
            # Wake up to notice an end of the stream, which is not an event.
            slice_s = min(0.25, max(0.0, deadline - time.monotonic()))
            try:
                return self._events.get(timeout=slice_s) if slice_s else self._events.get_nowait()
            except queue.Empty:
                if self._gone.is_set() and self._events.empty():
                    raise BridgeClosed(self._fault) from None
                if time.monotonic() >= deadline:
                    return None

    # --- plumbing ---

    def _call(self, path: str, message: BridgeMessage, kind: Any, *, timeout_s: float | None = None) -> Any:  # noqa: ANN401 - a Struct or a union of them
        response = self._post(path, msgspec.json.encode(message), "application/json", timeout_s)
        try:
            if response.status_code < 400:
                return msgspec.json.decode(response.content, type=kind)
            error = msgspec.json.decode(response.content, type=BridgeError)
        except msgspec.DecodeError as fault:
            raise RemoteProtocolError(f"worker answered {path} with HTTP {response.status_code}: {fault}") from fault
        raise BridgeRefused(error.reason, retry=error.retry)

    def _post(self, path: str, body: bytes, content_type: str, timeout_s: float | None) -> httpx.Response:
        if self._gone.is_set():
            raise BridgeClosed(self._fault)
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        try:
            return self._http.post(path, content=body, headers={"content-type": content_type}, timeout=timeout)
        except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
            raise BridgeClosed(f"bridge: {error or type(error).__name__}") from error

    def _read_events(self) -> None:
        try:
            with self._http.stream("POST", "/resources/receive") as response:
                self._stream_socket = response.extensions["network_stream"].get_extra_info("socket")
                self._subscribed.set()
                for line in response.iter_lines():
                    self._take_line(line)
        except httpx.TransportError as error:
            self._fault = f"the bridge is closed: {error or type(error).__name__}"
        except (RemoteProtocolError, BridgeClosed) as error:
            self._fault = str(error)
        finally:
            self._gone.set()
            self._subscribed.set()
            if not self._closing.is_set():
                self._on_lost()

    def _take_line(self, line: str) -> None:
        if not line.startswith("data:"):
            return  # comments keep the connection alive
        if len(line) > EVENT_BYTES_MAX:
            raise RemoteProtocolError(f"event of {len(line)} bytes exceeds the limit of {EVENT_BYTES_MAX}")
        try:
            event: Event = msgspec.json.decode(line.removeprefix("data:"), type=Event)
        except msgspec.DecodeError as error:
            raise RemoteProtocolError(f"worker sent a broken event: {error}") from error
        while not self._closing.is_set():
            with suppress(queue.Full):
                self._events.put(event, timeout=0.25)
                return
