"""Starting and stopping telemetry in one process.

    start("hypha-worker", config) ──▶ Telemetry: logs on stderr, spans, metrics, and OTLP if there is an endpoint
    executor_start("hypha-executor", post)       the same, but OTLP requests go to the worker's bridge,
        └─ post("/telemetry?kind=traces", body) ─▶ worker: telemetry.forward("traces", body) ─▶ collector

OpenTelemetry is imported here, not before. Its global providers are left alone: ours are held by `Telemetry`, so that
a process can start and stop telemetry more than once, as tests do.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO

import hypha
from hypha.errors import LocalProtocolError, RemoteProtocolError
from hypha.telemetry import logoutput, metrics, tracing
from hypha.telemetry.loglevels import VARIABLE, parse_filter
from hypha.telemetry.settings import KINDS, Kind, Settings, TelemetryConfig, resolve
from hypha.telemetry.transport import PostTransport, Transport, connect

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import Sampler

    from hypha.telemetry.export import Forwarder, Uplink

# How long a node that is asked to stop waits for its last telemetry.
SHUTDOWN_TIMEOUT_S = 2.0
# Sends end this much sooner, so that what they could not deliver is still counted and threads end by themselves.
SENDING_SHARE = 0.75
# Fresh enough for a dashboard, rare enough to cost nothing; OTEL_METRIC_EXPORT_INTERVAL (ms) overrides it.
METRIC_INTERVAL_S = 15.0

_current: "Telemetry | None" = None


class Telemetry:
    """Telemetry of a running process. `flush` and `shutdown` block, bounded: call them from a thread."""

    def __init__(
        self,
        *,
        uplink: "Uplink | None",
        forwarder: "Forwarder | None",
        spans: "TracerProvider",
        meters: "MeterProvider | None",
        logs: "LoggerProvider | None",
        put_logs_back: Callable[[], None],
    ) -> None:
        self._uplink = uplink
        self._forwarder = forwarder
        self._spans = spans
        self._meters = meters
        self._logs = logs
        self._put_logs_back = put_logs_back
        self._stopped = False

    @property
    def exports(self) -> bool:
        """Whether anything leaves this process."""
        return self._uplink is not None

    def snapshot(self) -> dict[str, float]:
        """All metrics of this process now; see `metrics.snapshot`."""
        return metrics.snapshot()

    def forward(self, kind: Kind, body: bytes) -> bool:
        """Pass an executor's OTLP request on, unchanged; never blocks. False: dropped, and counted.

        Raises RemoteProtocolError for a kind that does not exist.
        """
        if kind not in KINDS:
            raise RemoteProtocolError(f"telemetry of unknown kind {kind!r}; known: {KINDS}")
        uplink, forwarder = self._uplink, self._forwarder
        if self._stopped or uplink is None or forwarder is None or not uplink.carries(kind):
            metrics.TELEMETRY_DROPPED.add(1, kind=kind, reason="no_endpoint")
            return False
        return forwarder.forward(kind, body)

    def flush(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> bool:
        """Export all that is pending; False if it took longer. A dead collector loses it, counted."""
        return self._stopped or _within(timeout_s, lambda: self._flush_all(timeout_s))

    def shutdown(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> bool:
        """Export what is pending and stop; False if time ran out, and what was left is lost."""
        global _current
        if self._stopped:
            return True
        tracing.deactivate()
        if self._uplink is not None:
            self._uplink.hurry(timeout_s * SENDING_SHARE)
        done = _within(timeout_s, lambda: self._shutdown_all(timeout_s))
        self._stopped = True
        metrics.unbind()
        self._put_logs_back()
        if self._uplink is not None:
            self._uplink.close()
        _current = None
        return done

    def _flush_all(self, timeout_s: float) -> None:
        millis = int(timeout_s * 1000)
        if self._forwarder is not None:
            self._forwarder.drain(timeout_s)
        self._spans.force_flush(millis)
        if self._meters is not None:
            self._meters.force_flush(millis)
        if self._logs is not None:
            self._logs.force_flush(millis)

    def _shutdown_all(self, timeout_s: float) -> None:
        if self._forwarder is not None:
            self._forwarder.close(timeout_s)
        self._spans.shutdown()
        if self._meters is not None:
            self._meters.shutdown(timeout_s * 1000)
        if self._logs is not None:
            self._logs.shutdown()


def start(
    component: str,
    config: TelemetryConfig,
    *,
    instance: str | None = None,
    environ: Mapping[str, str] | None = None,
    stream: TextIO | None = None,
) -> Telemetry:
    """Start logs, spans and metrics for a role, `hypha-worker` say.

    Raises ConfigError for a bad key, `OTEL_*` or `HYPHA_LOG`; LocalProtocolError if telemetry runs already.
    `instance`, a peer id say, tells processes of one role apart; it is random unless given. The environment is this
    process's unless given; log lines go to standard error unless a stream is given.
    """
    env = os.environ if environ is None else environ
    settings = resolve(component, config, env)
    if instance is not None:
        settings = replace(settings, attributes={"service.instance.id": instance, **settings.attributes})
    transports = {kind: connect(kind, target) for kind, target in settings.targets.items()}
    return _start(component, settings, transports, env, stream)


def check(config: TelemetryConfig, environ: Mapping[str, str] | None = None) -> None:
    """Raise the ConfigError that `start` would raise; starts nothing."""
    env = os.environ if environ is None else environ
    resolve("hypha", config, env)
    parse_filter(env.get(VARIABLE, ""))


def executor_start(
    component: str,
    post: Callable[[str, bytes], None],
    *,
    environ: Mapping[str, str] | None = None,
    stream: TextIO | None = None,
) -> Telemetry:
    """Start telemetry in a process without a network: `post(path, body)` hands requests to the worker's bridge.

    `path` is `/telemetry?kind=traces` or `…=metrics`, the body OTLP protobuf; `post` is called from
    background threads, should give up within seconds, and may raise OSError or HyphaError. Logs are JSON lines on
    standard error, which the worker reads. The worker's trace decides what is sampled.
    """
    env = os.environ if environ is None else environ
    settings = Settings(sampler="parentbased_always_on", sample_ratio=1.0, attributes={}, targets={})
    kinds: tuple[Kind, ...] = ("traces", "metrics")
    transports: dict[Kind, Transport] = {kind: PostTransport(kind, post) for kind in kinds}
    return _start(component, settings, transports, env, stream)


def forward(kind: Kind, body: bytes) -> bool:
    """`Telemetry.forward` of whatever telemetry runs in this process; False if none does."""
    return _current is not None and _current.forward(kind, body)


def flush(timeout_s: float = SHUTDOWN_TIMEOUT_S) -> bool:
    """`Telemetry.flush` of whatever telemetry runs in this process; True if none does."""
    return _current is None or _current.flush(timeout_s)


def _start(
    component: str,
    settings: Settings,
    transports: Mapping[Kind, Transport],
    environ: Mapping[str, str],
    stream: TextIO | None,
) -> Telemetry:
    global _current
    if _current is not None:
        raise LocalProtocolError("telemetry is already running in this process")
    log_filter = parse_filter(environ.get(VARIABLE, ""))
    resource = _resource(component, settings, environ)
    uplink = _uplink(transports)
    logs = _log_provider(resource, uplink)
    spans = _span_provider(resource, settings, uplink)
    meters = _meter_provider(resource, uplink, environ)
    forwarder = None
    if uplink is not None:
        from hypha.telemetry.export import Forwarder

        forwarder = Forwarder(uplink.deliver)
    if meters is not None:
        metrics.bind(meters.get_meter("hypha", hypha.__version__))
    tracing.activate(spans.get_tracer("hypha", hypha.__version__))
    _current = Telemetry(
        uplink=uplink,
        forwarder=forwarder,
        spans=spans,
        meters=meters,
        logs=logs,
        put_logs_back=logoutput.install(component, log_filter, logs, stream),
    )
    return _current


def _uplink(transports: Mapping[Kind, Transport]) -> "Uplink | None":
    if not transports:
        return None
    from hypha.telemetry.export import Uplink

    return Uplink(transports)


def _resource(component: str, settings: Settings, environ: Mapping[str, str]) -> "Resource":
    """Who speaks: our defaults, then the file, then OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME."""
    from opentelemetry.sdk.resources import Resource

    attributes: dict[str, str | int] = {
        "service.name": component,
        "service.version": hypha.__version__,
        # Without it the series of two workers on one machine would be one series.
        "service.instance.id": uuid.uuid4().hex,
        "process.pid": os.getpid(),
    }
    attributes.update(settings.attributes)
    attributes.update(_environ_attributes(environ))
    return Resource.create(attributes)


def _environ_attributes(environ: Mapping[str, str]) -> dict[str, str]:
    from urllib.parse import unquote

    pairs = (pair.partition("=") for pair in environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","))
    attributes = {key.strip(): unquote(value.strip()) for key, equals, value in pairs if equals}
    if environ.get("OTEL_SERVICE_NAME"):
        attributes["service.name"] = environ["OTEL_SERVICE_NAME"]
    return attributes


def _span_provider(resource: "Resource", settings: Settings, uplink: "Uplink | None") -> "TracerProvider":
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(sampler=_sampler(settings), resource=resource, shutdown_on_exit=False)
    if uplink is not None and uplink.carries("traces"):
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from hypha.telemetry.export import SpanSink

        provider.add_span_processor(BatchSpanProcessor(SpanSink(uplink)))
    return provider


def _sampler(settings: Settings) -> "Sampler":
    """The sampler, made to follow its parent: a trace is recorded by everyone or by no one.

    Followed literally, `traceidratio` with another ratio, or `always_on` below a parent that is not recorded, would
    export spans whose parents do not exist. Only `always_off` is literal; it can leave no orphans, since what it
    passes on is unsampled.
    """
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, TraceIdRatioBased

    if settings.sampler == "always_off":
        return ALWAYS_OFF
    roots: dict[str, Sampler] = {
        "always_on": ALWAYS_ON,
        "always_off": ALWAYS_OFF,
        "traceidratio": TraceIdRatioBased(settings.sample_ratio),
    }
    return ParentBased(roots[settings.sampler.removeprefix("parentbased_")])


def _meter_provider(
    resource: "Resource", uplink: "Uplink | None", environ: Mapping[str, str]
) -> "MeterProvider | None":
    """None where nothing is exported: local values need no SDK."""
    if uplink is None or not uplink.carries("metrics"):
        return None
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    from hypha.telemetry.export import MetricSink

    # The SDK itself reads the variable when the interval is left out.
    millis = None if environ.get("OTEL_METRIC_EXPORT_INTERVAL") else METRIC_INTERVAL_S * 1000
    reader = PeriodicExportingMetricReader(MetricSink(uplink), export_interval_millis=millis)
    return MeterProvider([reader], resource=resource, shutdown_on_exit=False)


def _log_provider(resource: "Resource", uplink: "Uplink | None") -> "LoggerProvider | None":
    if uplink is None or not uplink.carries("logs"):
        return None
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

    from hypha.telemetry.export import LogSink

    provider = LoggerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_log_record_processor(BatchLogRecordProcessor(LogSink(uplink)))
    return provider


def _within(timeout_s: float, work: Callable[[], None]) -> bool:
    """Run in a daemon thread; False if it is not done in time, and then it may run on, harmlessly."""
    thread = threading.Thread(target=work, name="hypha-telemetry-flush", daemon=True)
    give_up_at = time.monotonic() + timeout_s
    thread.start()
    thread.join(max(0.0, give_up_at - time.monotonic()))
    return not thread.is_alive()
