"""Carries an encoded OTLP request to a collector: three protocols, one verb.

    send(body)   body = Export{Trace,Metrics,Logs}ServiceRequest, protobuf, as the SDK's encoders
       │         and executors make it: what an executor posted travels on unchanged
       ├─▶ HttpTransport   POST …/v1/traces   application/x-protobuf, or JSON made from the same bytes
       ├─▶ GrpcTransport   unary call, bytes in and out, no second encoding
       └─▶ PostTransport   whatever function the caller has: an executor's bridge

The SDK's own exporters are not used because they take spans, not bytes, and sleep through retries of up to ten seconds
without a way to stop them at shutdown. `opentelemetry-exporter-otlp-json-http` (beta) is not used because its releases
conflict with the pinned SDK; JSON is derived from protobuf by https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding
"""

import base64
import gzip
import json
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import urlsplit

from hypha.errors import ConfigError, HyphaError
from hypha.telemetry.settings import Kind, Target

if TYPE_CHECKING:
    from google.protobuf.message import Message

# One attempt may take this long; exports run in threads that have nothing else to do.
SEND_TIMEOUT_S = 5.0

# What OTLP calls retryable: https://opentelemetry.io/docs/specs/otlp/#failures-1
RETRYABLE_HTTP = frozenset({429, 502, 503, 504})
RETRYABLE_GRPC = frozenset(
    {"CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS", "RESOURCE_EXHAUSTED"}
)

# Where the executor's side of the bridge takes each kind.
BRIDGE_PATH = "/telemetry"

GRPC_METHODS: dict[Kind, str] = {
    "traces": "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    "metrics": "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    "logs": "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
}

# Fields that OTLP's JSON writes in hexadecimal although protobuf's own JSON would use base64.
HEX_FIELDS = frozenset({"traceId", "spanId", "parentSpanId"})


class SendFailed(HyphaError):
    """The collector did not take the batch; `retryable` says whether trying again may help."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class Transport(Protocol):
    """One signal's way out."""

    def send(self, body: bytes, timeout_s: float) -> None:
        """Deliver one request or raise SendFailed. Blocks up to `timeout_s`."""

    def close(self) -> None:
        """Let go of connections; a send under way fails."""


def connect(kind: Kind, target: Target) -> Transport:
    """Return the transport for a target; nothing is dialled before the first send."""
    if target.protocol == "grpc":
        return GrpcTransport(kind, target)
    return HttpTransport(kind, target)


class HttpTransport:
    """OTLP over HTTP, binary or JSON, compressed."""

    def __init__(self, kind: Kind, target: Target) -> None:
        import httpx

        self._kind = kind
        self._target = target
        self._json = target.protocol == "http/json"
        content = "application/json" if self._json else "application/x-protobuf"
        headers = {**dict(target.headers), "content-type": content}
        if target.gzip:
            headers["content-encoding"] = "gzip"
        context = _tls(target) if target.url.startswith("https") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._client = httpx.Client(headers=headers, verify=context)

    def send(self, body: bytes, timeout_s: float) -> None:
        """POST it. Raises SendFailed, also for a body that is not OTLP where JSON has to be made of it."""
        import httpx

        data = as_json(self._kind, body) if self._json else body
        if self._target.gzip:
            data = gzip.compress(data, compresslevel=1)
        try:
            answer = self._client.post(self._target.url, content=data, timeout=timeout_s)
        except (httpx.HTTPError, httpx.InvalidURL, RuntimeError) as error:
            # RuntimeError: the client was closed under us at shutdown.
            raise SendFailed(f"{type(error).__name__}: {error}", retryable=True) from error
        if not answer.is_success:
            retryable = answer.status_code in RETRYABLE_HTTP
            raise SendFailed(f"HTTP status {answer.status_code}", retryable=retryable)

    def close(self) -> None:
        """Close the connection pool."""
        self._client.close()


class GrpcTransport:
    """OTLP over gRPC, with the bytes as they are."""

    def __init__(self, kind: Kind, target: Target) -> None:
        import grpc

        address = urlsplit(target.url).netloc
        compression = grpc.Compression.Gzip if target.gzip else grpc.Compression.NoCompression
        if target.url.startswith("https"):
            self._channel = grpc.secure_channel(address, _grpc_credentials(target), compression=compression)
        else:
            self._channel = grpc.insecure_channel(address, compression=compression)
        self._call: Any = self._channel.unary_unary(GRPC_METHODS[kind])
        self._metadata = tuple((key.lower(), value) for key, value in target.headers)

    def send(self, body: bytes, timeout_s: float) -> None:
        """Call Export. Raises SendFailed."""
        import grpc

        try:
            self._call(body, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            name = error.code().name
            raise SendFailed(f"gRPC status {name}", retryable=name in RETRYABLE_GRPC) from error
        except ValueError as error:
            # The channel was closed under us at shutdown.
            raise SendFailed(str(error), retryable=False) from error

    def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        self._channel.close()


class PostTransport:
    """Hands the bytes to a function of the caller's, as an executor does with its bridge."""

    def __init__(self, kind: Kind, post: Callable[[str, bytes], None]) -> None:
        self._path = bridge_path(kind)
        self._post = post

    def send(self, body: bytes, timeout_s: float) -> None:
        """Post it; the function owns its timeout. Raises SendFailed for what sockets and bridges raise."""
        del timeout_s
        try:
            self._post(self._path, body)
        except (OSError, HyphaError) as error:
            raise SendFailed(f"{type(error).__name__}: {error}", retryable=False) from error

    def close(self) -> None:
        """Nothing is held."""


def bridge_path(kind: Kind) -> str:
    """Path and query under which the worker's bridge takes this kind."""
    return f"{BRIDGE_PATH}?kind={kind}"


def as_json(kind: Kind, body: bytes) -> bytes:
    """Rewrite a protobuf request as OTLP JSON. Raises SendFailed if the bytes are no such request."""
    from google.protobuf.json_format import MessageToDict
    from google.protobuf.message import DecodeError

    try:
        message = _request(kind).FromString(body)
    except DecodeError as error:
        raise SendFailed(f"not an OTLP request: {error}", retryable=False) from error
    tree = MessageToDict(message, use_integers_for_enums=True)
    for node in _objects(tree):
        for key in HEX_FIELDS & node.keys():
            node[key] = base64.b64decode(node[key]).hex()
    return json.dumps(tree, separators=(",", ":")).encode()


def _request(kind: Kind) -> "type[Message]":
    from opentelemetry.proto.collector.logs.v1 import logs_service_pb2
    from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

    requests: dict[Kind, type[Message]] = {
        "traces": trace_service_pb2.ExportTraceServiceRequest,
        "metrics": metrics_service_pb2.ExportMetricsServiceRequest,
        "logs": logs_service_pb2.ExportLogsServiceRequest,
    }
    return requests[kind]


def _objects(tree: object) -> Iterator[dict[str, Any]]:
    """Every object in a JSON tree. AnyValues nest, so this walks a stack of its own."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield cast(dict[str, Any], node)
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


def _tls(target: Target) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=target.ca_file)
        if target.client_cert_file is not None:
            context.load_cert_chain(target.client_cert_file, target.client_key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_*CERTIFICATE: {error}") from error
    return context


def _grpc_credentials(target: Target) -> Any:  # noqa: ANN401 - grpc ships no types
    import grpc

    def read(path: str | None) -> bytes | None:
        return None if path is None else Path(path).read_bytes()

    try:
        return grpc.ssl_channel_credentials(
            root_certificates=read(target.ca_file),
            private_key=read(target.client_key_file),
            certificate_chain=read(target.client_cert_file),
        )
    except OSError as error:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_*CERTIFICATE: {error}") from error
