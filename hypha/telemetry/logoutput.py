"""Where log records go: one JSON line each on standard error, readable lines on a terminal, OTLP besides.

    hypha.* ────────────┐                          ┌─▶ JsonFormatter | TextFormatter ─▶ stderr
    libp2p, hypercorn … ┴─▶ StderrHandler (root) ──┤
                                                   └─▶ OtlpHandler (only with an endpoint)

Libraries are heard from `warn` upwards, and libp2p never louder than `warn` unless HYPHA_LOG names it: it logs every
failed dial as an error, while our `error` means that a human is needed. libp2p also cuts its loggers off from the root
when it is imported; `logging.lastResort` is ours too, so its records arrive whichever came first.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from hypha.telemetry import tracing
from hypha.telemetry.loglevels import LEVELS, ROOT, LogFilter, level_name
from hypha.telemetry.logs import FIELDS

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import LoggerProvider

# A line longer than this helps nobody and may be somebody else's doing: peers' texts end up in fields.
TEXT_CHARS_MAX = 4096
STACK_CHARS_MAX = 16_384

# Libraries whose errors are everyday events for us.
NOISY = ("libp2p", "opentelemetry")

# What takes part in exporting must not be exported itself, or a failing export feeds on its own log lines.
NOT_EXPORTED = ("hypha.telemetry", "opentelemetry", "httpx", "httpcore", "grpc", "urllib3")


def _is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _clip(text: str, chars_max: int = TEXT_CHARS_MAX) -> str:
    return text if len(text) <= chars_max else f"{text[:chars_max]}… ({len(text)} characters)"


def _visible(text: str) -> str:
    """Escape control characters: a peer's text must not move the cursor of whoever reads the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _plain(value: object) -> object:
    """What JSON can say as it is; everything else as clipped text."""
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _clip(value if isinstance(value, str) else str(value))


class _Shaper:
    """Turns a record into ordered fields; both formatters and the OTLP handler start from it."""

    def __init__(self, component: str, log_filter: LogFilter) -> None:
        self.component = component
        self._noisy = tuple(name for name in NOISY if not log_filter.names(name))

    def level(self, record: logging.LogRecord) -> str:
        levelno = record.levelno
        if _is_under(record.name, self._noisy):
            levelno = min(levelno, logging.WARNING)
        return level_name(levelno)

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        """The operation's own fields, the logger's name, and the exception if there is one."""
        given: dict[str, object] = getattr(record, FIELDS, {})
        fields = {key: _plain(value) for key, value in given.items()}
        fields.setdefault("logger", record.name)
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            fields["exception"] = _clip(f"{type(error).__name__}: {error}")
            # A demoted library error is an everyday event: its traceback would only look like a crash.
            if self.level(record) == "error" or record.levelno < logging.WARNING:
                stack = logging.Formatter().formatException(record.exc_info)
                fields["stack"] = _clip(stack, STACK_CHARS_MAX)
        return fields


class JsonFormatter(logging.Formatter):
    """One JSON object per line, in the order of the operations manual's example."""

    def __init__(self, component: str, log_filter: LogFilter) -> None:
        super().__init__()
        self._shaper = _Shaper(component, log_filter)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line: dict[str, object] = {
            "timestamp": _rfc3339(record.created),
            "level": self._shaper.level(record),
            "component": self._shaper.component,
            "message": _clip(record.getMessage()),
        }
        trace_id = tracing.current_trace_id()
        if trace_id is not None:
            line["trace_id"] = trace_id
        for key, value in self._shaper.fields(record).items():
            # A field may not pretend to be one of ours.
            line[key if key not in line else f"{key}_"] = value
        # ASCII only: whatever standard error's encoding does to other characters, it would not be JSON.
        return json.dumps(line, allow_nan=False)


class TextFormatter(logging.Formatter):
    """For eyes: local time, level, component's module, message, fields."""

    def __init__(self, component: str, log_filter: LogFilter) -> None:
        super().__init__()
        self._shaper = _Shaper(component, log_filter)

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, and the traceback below it where there is one."""
        fields = self._shaper.fields(record)
        stack = fields.pop("stack", None)
        name = str(fields.pop("logger")).removeprefix(ROOT + ".")
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        parts = [clock, f"{self._shaper.level(record):<5}", f"{name}:", _clip(record.getMessage())]
        parts += [f"{key}={value}" for key, value in fields.items()]
        line = _visible(" ".join(parts))
        return line if stack is None else f"{line}\n{stack}"


class OtlpHandler(logging.Handler):
    """Hands records to OpenTelemetry's batch processor, which never blocks."""

    def __init__(self, provider: "LoggerProvider", component: str, log_filter: LogFilter) -> None:
        super().__init__()
        self._provider = provider
        self._shaper = _Shaper(component, log_filter)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record with its fields as attributes; the current span's ids come with it."""
        if _is_under(record.name, NOT_EXPORTED):
            return
        from opentelemetry._logs import LogRecord, SeverityNumber

        level = self._shaper.level(record)
        severity = SeverityNumber[level.upper()]
        fields = self._shaper.fields(record)
        self._provider.get_logger(record.name).emit(
            LogRecord(
                timestamp=int(record.created * 1e9),
                severity_text=level,
                severity_number=severity,
                body=_clip(record.getMessage()),
                attributes={key: _otlp(value) for key, value in fields.items()},
            )
        )


def _otlp(value: object) -> str | bool | int | float:
    return value if isinstance(value, (str, bool, int, float)) else str(value)


def _rfc3339(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def install(
    component: str,
    log_filter: LogFilter,
    provider: "LoggerProvider | None" = None,
    stream: TextIO | None = None,
) -> Callable[[], None]:
    """Route every logger of the process; return the function that puts everything back.

    `stream` is standard error unless given; lines are JSON unless it is a terminal.
    """
    logging.addLevelName(LEVELS["trace"], "TRACE")
    out = sys.stderr if stream is None else stream
    formatter = TextFormatter if out.isatty() else JsonFormatter
    handlers: list[logging.Handler] = [logging.StreamHandler(out)]
    handlers[0].setFormatter(formatter(component, log_filter))
    if provider is not None:
        handlers.append(OtlpHandler(provider, component, log_filter))
    undo = [_levels(log_filter), _handlers(handlers)]

    def put_back() -> None:
        for step in undo:
            step()

    return put_back


def _levels(log_filter: LogFilter) -> Callable[[], None]:
    wanted = {"": logging.WARNING, ROOT: log_filter.default, **log_filter.levels}
    before = {name: logging.getLogger(name).level for name in wanted}
    for name, level in wanted.items():
        logging.getLogger(name).setLevel(level)

    def put_back() -> None:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)

    return put_back


def _handlers(handlers: list[logging.Handler]) -> Callable[[], None]:
    root = logging.getLogger()
    last_resort = logging.lastResort
    for handler in handlers:
        root.addHandler(handler)
    # Reached by loggers that are cut off from the root and have no handler of their own, as libp2p's are.
    logging.lastResort = _Fanout(handlers)
    logging.captureWarnings(capture=True)

    def put_back() -> None:
        logging.captureWarnings(capture=False)
        logging.lastResort = last_resort
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()

    return put_back


class _Fanout(logging.Handler):
    """One handler that is several."""

    def __init__(self, handlers: list[logging.Handler]) -> None:
        super().__init__()
        self._handlers = handlers

    def emit(self, record: logging.LogRecord) -> None:
        """Hand the record to each."""
        for handler in self._handlers:
            handler.handle(record)
