"""An OTLP collector inside the test's process: HTTP (protobuf and JSON, gzip) and gRPC on ports of their own.

with otlp_receiver() as collector:
    telemetry.start(…endpoint = collector.http_url or collector.grpc_url…)
    collector.spans()   collector.metrics()   collector.logs()   collector.requests
    collector.wait_until(lambda: …)      for exports that other processes make when they like
"""

import base64
import gzip
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PATHS: dict[str, type[Message]] = {
    "/v1/traces": ExportTraceServiceRequest,
    "/v1/metrics": ExportMetricsServiceRequest,
    "/v1/logs": ExportLogsServiceRequest,
}
SERVICES: dict[str, type[Message]] = {
    "opentelemetry.proto.collector.trace.v1.TraceService": ExportTraceServiceRequest,
    "opentelemetry.proto.collector.metrics.v1.MetricsService": ExportMetricsServiceRequest,
    "opentelemetry.proto.collector.logs.v1.LogsService": ExportLogsServiceRequest,
}
HEX_FIELDS = ("traceId", "spanId", "parentSpanId")
# How soon the HTTP server notices that its test is over.
POLL_S = 0.02
BODY_BYTES_MAX = 16 * 1024 * 1024


@dataclass(frozen=True)
class Request:
    """One export as it arrived: decoded message, lower-case headers, and the body before decoding."""

    message: Any
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class Span:
    """A span with hexadecimal ids; `parent_id` is empty at the root."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: Mapping[str, object]
    failed: bool


@dataclass
class Collector:
    """Everything received so far, in order of arrival."""

    http_url: str
    grpc_url: str
    requests: list[Request] = field(default_factory=list)
    _arrived: threading.Condition = field(default_factory=threading.Condition)

    def take(self, request: Request) -> None:
        """Keep a request and wake whoever waits."""
        with self._arrived:
            self.requests.append(request)
            self._arrived.notify_all()

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
        """Check the condition after every arrival; False if it never held."""
        with self._arrived:
            return self._arrived.wait_for(condition, timeout_s)

    def _of(self, kind: type[Message]) -> list[Any]:
        return [request.message for request in list(self.requests) if isinstance(request.message, kind)]

    def spans(self) -> list[Span]:
        """All spans of all services."""
        return [
            _span(span, _service(group))
            for message in self._of(ExportTraceServiceRequest)
            for group in message.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]

    def metrics(self) -> dict[str, Any]:
        """The newest report of every metric by name."""
        return {
            metric.name: metric
            for message in self._of(ExportMetricsServiceRequest)
            for group in message.resource_metrics
            for scope in group.scope_metrics
            for metric in scope.metrics
        }

    def logs(self) -> list[Any]:
        """All log records."""
        return [
            record
            for message in self._of(ExportLogsServiceRequest)
            for group in message.resource_logs
            for scope in group.scope_logs
            for record in scope.log_records
        ]

    def resources(self) -> list[dict[str, object]]:
        """Attributes of every resource that sent spans."""
        return [
            _attributes(group.resource.attributes)
            for message in self._of(ExportTraceServiceRequest)
            for group in message.resource_spans
        ]


def _attributes(pairs: Any) -> dict[str, object]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def _service(group: Any) -> str:
    return str(_attributes(group.resource.attributes).get("service.name", ""))


def _span(span: Any, service: str) -> Span:
    return Span(
        name=span.name,
        service=service,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes=_attributes(span.attributes),
        failed=span.status.code == span.status.STATUS_CODE_ERROR,
    )


def _from_json(body: bytes, kind: type[Message]) -> Message:
    """OTLP's JSON writes ids in hexadecimal; protobuf's parser expects base64."""

    def restore(node: dict[str, Any]) -> dict[str, Any]:
        for key in HEX_FIELDS:
            if key in node:
                node[key] = base64.b64encode(bytes.fromhex(node[key])).decode()
        return node

    return ParseDict(json.loads(body, object_hook=restore), kind())


def _http_server(take: Callable[[Request], None]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = min(int(self.headers["content-length"]), BODY_BYTES_MAX)
            body = self.rfile.read(length)
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            kind = PATHS[self.path]
            as_json = self.headers["content-type"] == "application/json"
            message = _from_json(body, kind) if as_json else kind.FromString(body)
            headers = {key.lower(): value for key, value in self.headers.items()}
            take(Request(message, headers, body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Stay silent: standard error belongs to the test."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server


def _grpc_server(take: Callable[[Request], None]) -> tuple[Any, int]:
    def export(message: Message, context: Any) -> bytes:
        take(Request(message, dict(context.invocation_metadata())))
        return b""

    server = grpc.server(futures.ThreadPoolExecutor(2))
    for service, kind in SERVICES.items():
        method = grpc.unary_unary_rpc_method_handler(export, request_deserializer=kind.FromString)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": method}),))
    return server, server.add_insecure_port("127.0.0.1:0")


@contextmanager
def otlp_receiver() -> Iterator[Collector]:
    """Run a collector on free ports of 127.0.0.1 until the block ends."""
    collector = Collector("", "")
    http = _http_server(collector.take)
    rpc, rpc_port = _grpc_server(collector.take)
    collector.http_url = f"http://127.0.0.1:{http.server_address[1]}"
    collector.grpc_url = f"http://127.0.0.1:{rpc_port}"
    thread = threading.Thread(target=http.serve_forever, args=(POLL_S,), name="otlp-receiver", daemon=True)
    thread.start()
    rpc.start()
    try:
        yield collector
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
        rpc.stop(grace=None).wait()
