"""Spans, and the one string that ties them together across processes: the W3C traceparent.

    scheduler                      worker                             executor
    with span("round"):
      msg.traceparent = inject() ─▶ with span_from(msg.traceparent, …):
                                      job.traceparent = inject() ────▶ with extracted(job.traceparent):
                                                                         with span("inner_steps"): …

    round = start_span("outer_round", root=True)       a flow longer than any block of code
    with round.current(): …                            spans opened here are its children
    round.end()

The current span lives in a context variable: trio tasks inherit it from whoever starts them, threads do not.
Before `start` every function here is a no-op and `inject` returns None, so simulations stay free of random ids.
The sampled flag is decided where a trace begins and travels in the traceparent (https://www.w3.org/TR/trace-context-2/);
its flags read `03`: sampled, and a random trace id.
"""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import Tracer

AttributeValue = str | bool | int | float

# A valid traceparent has 55 characters; future versions may add some. Longer ones are not even parsed.
TRACEPARENT_CHARS_MAX = 256

_tracer: "Tracer | None" = None
# Handles from start_span that nobody ended: shutdown ends them, so that their children find their parent.
_open: "weakref.WeakSet[Span]" = weakref.WeakSet()


def _clean(attributes: Mapping[str, object]) -> dict[str, AttributeValue]:
    """Keep what OpenTelemetry accepts, drop None, write everything else as text."""
    return {
        key: value if isinstance(value, (str, bool, int, float)) else str(value)
        for key, value in attributes.items()
        if value is not None
    }


class Span:
    """One timed operation. All methods are safe on a span that is not recorded, and after its end."""

    def __init__(self, otel: "OtelSpan | None") -> None:
        self._otel = otel

    @property
    def traceparent(self) -> str | None:
        """What a child elsewhere needs to name this span as its parent; None when tracing is off."""
        return None if self._otel is None else _traceparent_of(self._otel)

    def set(self, **attributes: object) -> None:
        """Add attributes; values that are not text, numbers or flags are written as text."""
        if self._otel is not None:
            self._otel.set_attributes(_clean(attributes))

    def event(self, name: str, **attributes: object) -> None:
        """Note that something happened at this moment of the span."""
        if self._otel is not None:
            self._otel.add_event(name, _clean(attributes))

    def fail(self, reason: str | BaseException) -> None:
        """Mark the span as failed, with the reason; an exception is recorded with its traceback."""
        if self._otel is None:
            return
        from opentelemetry.trace import Status, StatusCode

        if isinstance(reason, BaseException):
            self._otel.record_exception(reason)
            reason = f"{type(reason).__name__}: {reason}"
        self._otel.set_status(Status(StatusCode.ERROR, reason))

    def end(self) -> None:
        """Stop the clock and hand the span to the exporter; later calls do nothing."""
        _open.discard(self)
        if self._otel is not None and self._otel.is_recording():
            self._otel.end()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this the parent of spans opened inside; does not end it."""
        if self._otel is None:
            yield
            return
        from opentelemetry.trace import set_span_in_context

        with _attached(set_span_in_context(self._otel)):
            yield


_NO_SPAN = Span(None)


def start_span(name: str, *, parent: str | None = None, root: bool = False, **attributes: object) -> Span:
    """Begin a span that outlives the block it begins in; the caller ends it.

    Its parent is `parent` (a traceparent) where that parses, else the current span; with `root` it begins a trace.
    """
    span = _begin(name, _context_for(parent, root=root), attributes)
    if span is not _NO_SPAN:
        _open.add(span)
    return span


@contextmanager
def span(name: str, **attributes: object) -> Iterator[Span]:
    """Time a block as a child of the current span. An exception marks it failed and passes through."""
    with _entered(_begin(name, None, attributes)) as handle:
        yield handle


@contextmanager
def span_from(traceparent: str | None, name: str, **attributes: object) -> Iterator[Span]:
    """Time a block as a child of a remote span; without a usable traceparent it begins a trace of its own.

    For handlers of messages: they run in tasks whose inherited current span has nothing to do with the sender.
    """
    with _entered(_begin(name, _context_for(traceparent, root=True), attributes)) as handle:
        yield handle


@contextmanager
def span_afterwards(parent: Callable[[], str | None], name: str, **attributes: object) -> Iterator[None]:
    """Time a block whose parent is not known before it ends: only then `parent` is asked for its traceparent.

    What is begun inside is no child of it.
    """
    began_ns, failure = time.time_ns(), None
    try:
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        handle = _begin(name, _context_for(parent(), root=True), attributes, start_ns=began_ns)
        if failure is not None:
            _say(handle, failure)
        handle.end()


@contextmanager
def extracted(traceparent: str | None) -> Iterator[None]:
    """Make a remote span the current one; None or malformed text changes nothing."""
    context = None if _tracer is None else _parse(traceparent)
    if context is None:
        yield
        return
    with _attached(context):
        yield


def inject() -> str | None:
    """Return the current span's traceparent, or None where there is none."""
    if _tracer is None:
        return None
    from opentelemetry.trace import get_current_span

    return _traceparent_of(get_current_span())


def current_trace_id() -> str | None:
    """Return the current trace's id, 32 hexadecimal digits, or None."""
    traceparent = inject()
    return None if traceparent is None else traceparent[3:35]


def activate(tracer: "Tracer") -> None:
    """Record spans with this tracer from now on; `start` calls it."""
    global _tracer
    _tracer = tracer


def deactivate() -> None:
    """End the flows that are still open, marked `unfinished`, and record nothing from now on."""
    global _tracer
    for handle in list(_open):
        handle.set(unfinished=True)
        handle.end()
    _tracer = None


def _begin(
    name: str, context: "Context | None", attributes: Mapping[str, object], *, start_ns: int | None = None
) -> Span:
    if _tracer is None:
        return _NO_SPAN
    return Span(_tracer.start_span(name, context=context, attributes=_clean(attributes), start_time=start_ns))


@contextmanager
def _entered(handle: Span) -> Iterator[Span]:
    try:
        with handle.current():
            yield handle
    except BaseException as error:
        _say(handle, error)
        raise
    finally:
        handle.end()


def _say(handle: Span, error: BaseException) -> None:
    """Mark what ended with an error."""
    if isinstance(error, Exception):
        handle.fail(error)
    else:
        # trio.Cancelled and KeyboardInterrupt: nobody wants the result any more; nothing failed here.
        handle.set(cancelled=True)


@contextmanager
def _attached(context: "Context") -> Iterator[None]:
    from opentelemetry.context import attach, detach

    token = attach(context)
    try:
        yield
    finally:
        detach(token)


def _context_for(traceparent: str | None, *, root: bool) -> "Context | None":
    """The context to start a span in: the remote parent's, an empty one (a new trace), or None (current)."""
    if _tracer is None:
        return None
    remote = _parse(traceparent)
    if remote is not None or not root:
        return remote
    from opentelemetry.context import Context

    return Context()


def _parse(traceparent: str | None) -> "Context | None":
    if traceparent is None or len(traceparent) > TRACEPARENT_CHARS_MAX:
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace import get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {"traceparent": traceparent}
    context = TraceContextTextMapPropagator().extract(carrier, context=Context())
    return context if get_current_span(context).get_span_context().is_valid else None


def _traceparent_of(otel: "OtelSpan") -> str | None:
    context = otel.get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
