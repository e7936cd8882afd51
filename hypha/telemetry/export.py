"""Between the SDK and the wire: encode, send, retry a little, give up quietly.

    SDK batch processors ─▶ SpanSink, MetricSink, LogSink ─encode─▶ Uplink.deliver ─▶ Transport
    executors' requests ──▶ Forwarder ─ bounded queue, one thread ──────┘   │
                                                                           └ on failure: count, one log line a minute

Everything here runs in threads of its own. Nothing raises into the node, nothing waits longer than a few seconds, and
`Uplink.hurry` makes all of it give up at a deadline.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from hypha.errors import RemoteProtocolError
from hypha.telemetry import metrics
from hypha.telemetry.logs import RateLimited, get_logger
from hypha.telemetry.settings import KINDS, Kind
from hypha.telemetry.transport import SEND_TIMEOUT_S, SendFailed, Transport

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk.trace import ReadableSpan

# A batch is tried this often, a second and two seconds apart: enough for a collector's restart behind a balancer.
# What a longer outage loses is telemetry, and the SDK's queues stay bounded meanwhile.
ATTEMPTS_MAX = 3
BACKOFF_S = 1.0

# A dead collector is one log line a minute for each way out.
COMPLAINT_INTERVAL_S = 60.0

# The SDK sends 512 spans or log records at a time, well under a MiB; what an executor posts must not be larger.
FORWARD_BODY_BYTES_MAX = 4 * 1024 * 1024
# Batches waiting for the collector: with a few executors posting every few seconds, a minute's worth.
FORWARD_QUEUE_MAX = 64
# And together no more memory than this.
FORWARD_QUEUE_BYTES_MAX = 16 * 1024 * 1024

_log = get_logger("telemetry")


class Uplink:
    """The way out for all kinds: sends with few retries, counts what is lost, and can be told to hurry."""

    def __init__(self, transports: Mapping[Kind, Transport]) -> None:
        self._transports = transports
        self._complaint = RateLimited(_log, COMPLAINT_INTERVAL_S)
        self._hurry = threading.Event()
        self._give_up_at = float("inf")

    def carries(self, kind: Kind) -> bool:
        """Whether this kind is exported at all."""
        return kind in self._transports

    def deliver(self, kind: Kind, body: bytes) -> bool:
        """Send one request; False if it was given up (and counted). Blocks for seconds at most."""
        transport = self._transports[kind]
        for attempt in range(1, ATTEMPTS_MAX + 1):
            left_s = self._give_up_at - time.monotonic()
            if left_s <= 0:
                metrics.TELEMETRY_DROPPED.add(1, kind=kind, reason="shutting_down")
                return False
            try:
                transport.send(body, min(SEND_TIMEOUT_S, left_s))
            except SendFailed as failure:
                if failure.retryable and attempt < ATTEMPTS_MAX and not self._hurry.is_set():
                    self._hurry.wait(BACKOFF_S * attempt)
                    continue
                self._give_up(kind, failure)
                return False
            return True
        raise AssertionError("the last attempt returns")

    def hurry(self, timeout_s: float) -> None:
        """Shutting down: no more retries, and nothing is sent that could not end within `timeout_s`."""
        self._give_up_at = time.monotonic() + timeout_s
        self._hurry.set()

    def close(self) -> None:
        """Close all transports."""
        for transport in self._transports.values():
            transport.close()

    def _give_up(self, kind: Kind, failure: SendFailed) -> None:
        metrics.TELEMETRY_DROPPED.add(1, kind=kind, reason="unreachable")
        self._complaint.log("Telemetry cannot be exported", kind=kind, reason=str(failure))


class SpanSink(SpanExporter):
    """The SDK's spans, encoded and delivered."""

    def __init__(self, uplink: Uplink) -> None:
        self._uplink = uplink

    def export(self, spans: "Sequence[ReadableSpan]") -> SpanExportResult:
        """Called by the batch processor's thread."""
        sent = self._uplink.deliver("traces", encode_spans(spans).SerializeToString())
        return SpanExportResult.SUCCESS if sent else SpanExportResult.FAILURE


class LogSink(LogRecordExporter):
    """The SDK's log records, encoded and delivered."""

    def __init__(self, uplink: Uplink) -> None:
        self._uplink = uplink

    def export(self, batch: "Sequence[ReadableLogRecord]") -> LogRecordExportResult:
        """Called by the batch processor's thread."""
        sent = self._uplink.deliver("logs", encode_logs(batch).SerializeToString())
        return LogRecordExportResult.SUCCESS if sent else LogRecordExportResult.FAILURE

    def shutdown(self) -> None:
        """The uplink is closed by its owner."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is kept here."""
        return True


class MetricSink(MetricExporter):
    """The SDK's metrics, cumulative, encoded and delivered."""

    def __init__(self, uplink: Uplink) -> None:
        super().__init__()
        self._uplink = uplink

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **_: object) -> MetricExportResult:
        """Called by the periodic reader's thread."""
        sent = self._uplink.deliver("metrics", encode_metrics(metrics_data).SerializeToString())
        return MetricExportResult.SUCCESS if sent else MetricExportResult.FAILURE

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        """Nothing is kept here."""
        return True

    def shutdown(self, timeout_millis: float = 30_000, **_: object) -> None:
        """The uplink is closed by its owner."""


class Forwarder:
    """Executors' requests on their way to the collector; a full queue drops, counted."""

    def __init__(self, deliver: Callable[[Kind, bytes], bool]) -> None:
        self._deliver = deliver
        self._queue: queue.Queue[tuple[Kind, bytes] | None] = queue.Queue(FORWARD_QUEUE_MAX)
        self._lock = threading.Lock()
        self._bytes_waiting = 0
        self._idle = threading.Event()
        self._idle.set()
        self._waiting = 0
        self._thread = threading.Thread(target=self._run, name="hypha-telemetry", daemon=True)
        self._thread.start()

    def forward(self, kind: Kind, body: bytes) -> bool:
        """Queue a request, never blocking; False if it was dropped. An unknown kind raises RemoteProtocolError."""
        if kind not in KINDS:
            raise RemoteProtocolError(f"telemetry of unknown kind {kind!r}; known: {KINDS}")
        if len(body) > FORWARD_BODY_BYTES_MAX:
            return self._drop(kind, "too_large")
        with self._lock:
            if self._bytes_waiting + len(body) > FORWARD_QUEUE_BYTES_MAX:
                return self._drop(kind, "queue_full")
            try:
                self._queue.put_nowait((kind, body))
            except queue.Full:
                return self._drop(kind, "queue_full")
            self._bytes_waiting += len(body)
            self._waiting += 1
            self._idle.clear()
        return True

    def drain(self, timeout_s: float) -> bool:
        """Wait until all that was queued is sent or given up; False if time ran out."""
        return self._idle.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Send what is queued within `timeout_s`, then stop the thread."""
        self.drain(timeout_s)
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return  # A daemon thread that is stuck in its last send ends with the process.
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            kind, body = item
            self._deliver(kind, body)
            with self._lock:
                self._bytes_waiting -= len(body)
                self._waiting -= 1
                if self._waiting == 0:
                    self._idle.set()

    @staticmethod
    def _drop(kind: Kind, reason: str) -> bool:
        metrics.TELEMETRY_DROPPED.add(1, kind=kind, reason=reason)
        return False
