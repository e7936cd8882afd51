"""Logs, spans and metrics for every process of Hypha, exported over OTLP where the configuration names an endpoint.

    instruments ◀ metrics     what is counted, read by `snapshot()` and by OpenTelemetry
    tracing                   spans and the traceparent that crosses processes
    loglevels ◀ logs ◀ logoutput      fields, filters, JSON lines
    settings ◀ transport ◀ export     configuration, wire, sinks
    lifecycle                 start, executor_start, forward, flush, shutdown

Importing this is cheap: OpenTelemetry, gRPC, httpx and psutil are loaded by `start` or at first use. It never blocks
or stops the node that uses it, and imports neither trio nor torch.
"""

from hypha.telemetry import metrics
from hypha.telemetry.lifecycle import Telemetry, check, executor_start, flush, forward, start
from hypha.telemetry.logs import ChangeLogger, Logger, OncePerKey, RateLimited, get_logger
from hypha.telemetry.metrics import snapshot
from hypha.telemetry.settings import Kind, TelemetryConfig
from hypha.telemetry.tracing import (
    Span,
    current_trace_id,
    extracted,
    inject,
    span,
    span_afterwards,
    span_from,
    start_span,
)
from hypha.telemetry.transport import bridge_path

__all__ = [
    "ChangeLogger",
    "Kind",
    "Logger",
    "OncePerKey",
    "RateLimited",
    "Span",
    "Telemetry",
    "TelemetryConfig",
    "bridge_path",
    "check",
    "current_trace_id",
    "executor_start",
    "extracted",
    "flush",
    "forward",
    "get_logger",
    "inject",
    "metrics",
    "snapshot",
    "span",
    "span_afterwards",
    "span_from",
    "start",
    "start_span",
]
