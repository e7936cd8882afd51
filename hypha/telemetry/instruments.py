"""Counters, gauges and histograms that always work and are exported once somebody starts telemetry.

    COUNTER.add(1, status="success")          any thread, any time, no SDK loaded
        └─▶ local cells {labels: value} ──▶ snapshot()                       read in the process
                                       └──▶ observed by the SDK's reader     after Registry.bind(meter)

Counters and gauges are aggregated here and *observed* by OpenTelemetry, so what was counted before `bind` is exported
too, and counting costs one dictionary update whether or not anybody listens. Histograms keep count and sum here and
hand each value to the bound OpenTelemetry histogram, which owns the buckets.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from opentelemetry.metrics import Histogram as OtelHistogram

Labels = tuple[tuple[str, str], ...]
Reading = tuple[dict[str, str], float]

# Distinct label sets per instrument. A dataset or a reason per label fits; a peer id per label does not, and must not
# grow memory without end: what comes later is added up under one label set that says so (OpenTelemetry's name for it).
LABEL_SETS_MAX = 256
OVERFLOW: Labels = (("otel_metric_overflow", "true"),)

# Upper bounds in seconds; the manual's alert on fetches lies at 60, so the buckets must go well beyond it.
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
JOB_BUCKETS_S = (1, 10, 30, 60, 300, 900, 1800, 3600, 4 * 3600, 12 * 3600, 86_400, 7 * 86_400)


class _Cells:
    """Values by label set, bounded; the lock is held for one dictionary operation at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[Labels, float] = {}

    def put(self, labels: dict[str, str], value: float, *, add: bool) -> None:
        key = tuple(sorted(labels.items()))
        with self._lock:
            if key not in self._values and len(self._values) >= LABEL_SETS_MAX:
                key = OVERFLOW
            self._values[key] = self._values.get(key, 0.0) + value if add else value

    def items(self) -> list[tuple[Labels, float]]:
        with self._lock:
            return sorted(self._values.items())

    def clear(self) -> None:
        with self._lock:
            self._values.clear()


class Instrument(Protocol):
    """What the registry needs of every kind of instrument."""

    name: str
    description: str

    def bind(self, meter: "Meter") -> None:
        """Export through this meter from now on."""

    def unbind(self) -> None:
        """Export nowhere; local values stay."""

    def readings(self) -> Iterator[tuple[str, Labels, float]]:
        """Yield (series name, labels, value)."""

    def clear(self) -> None:
        """Forget all local values."""


class _Observed:
    """Shared by what is aggregated here and read by the SDK through a callback."""

    def __init__(self, name: str, description: str) -> None:
        self.name = name
        self.description = description
        self._cells = _Cells()

    def unbind(self) -> None:
        """Nothing to do: the callback dies with the meter that holds it."""

    def readings(self) -> Iterator[tuple[str, Labels, float]]:
        """Yield (name, labels, value) for every label set seen."""
        for labels, value in self._cells.items():
            yield self.name, labels, value

    def clear(self) -> None:
        """Forget all values."""
        self._cells.clear()

    def _observe(self, _options: "CallbackOptions") -> "Iterable[Observation]":
        from opentelemetry.metrics import Observation

        return [Observation(value, dict(labels)) for _, labels, value in self.readings()]


class Counter(_Observed):
    """A sum that only grows; the name ends in `_total`, as Prometheus has it."""

    def add(self, value: float, **labels: str) -> None:
        """Add a non-negative amount."""
        assert value >= 0, f"{self.name} only grows; got {value}"
        self._cells.put(labels, value, add=True)

    def total(self) -> float:
        """The sum over all label sets."""
        return sum(value for _, value in self._cells.items())

    def bind(self, meter: "Meter") -> None:
        """Export as a monotonic, cumulative sum without a unit."""
        meter.create_observable_counter(self.name, [self._observe], description=self.description)


class Gauge(_Observed):
    """A level: set it, or move it up and down."""

    def set(self, value: float, **labels: str) -> None:
        """Replace the level."""
        self._cells.put(labels, value, add=False)

    def add(self, delta: float, **labels: str) -> None:
        """Move the level; the delta may be negative."""
        self._cells.put(labels, delta, add=True)

    def bind(self, meter: "Meter") -> None:
        """Export as a gauge without a unit."""
        meter.create_observable_gauge(self.name, [self._observe], description=self.description)


class ProbedGauge(Gauge):
    """A level read from the machine each time somebody asks, and only then."""

    def __init__(self, name: str, description: str, probe: Callable[[], Sequence[Reading]]) -> None:
        super().__init__(name, description)
        self._probe = probe

    def readings(self) -> Iterator[tuple[str, Labels, float]]:
        """Probe, then yield what the probe found besides anything set by hand."""
        for labels, value in self._probe():
            self.set(value, **labels)
        yield from super().readings()


class Histogram:
    """A distribution; here only its count and sum, the buckets are the SDK's."""

    def __init__(self, name: str, description: str, buckets: Sequence[float]) -> None:
        self.name = name
        self.description = description
        self.buckets = tuple(buckets)
        self._counts = _Cells()
        self._sums = _Cells()
        self._bound: OtelHistogram | None = None

    def record(self, value: float, **labels: str) -> None:
        """Record one value, in the unit its description names."""
        self._counts.put(labels, 1, add=True)
        self._sums.put(labels, value, add=True)
        if self._bound is not None:
            self._bound.record(value, labels)

    def bind(self, meter: "Meter") -> None:
        """Export values recorded from now on, with our buckets and without a unit."""
        self._bound = meter.create_histogram(
            self.name,
            description=self.description,
            explicit_bucket_boundaries_advisory=self.buckets,
        )

    def unbind(self) -> None:
        """Export nowhere; count and sum go on."""
        self._bound = None

    def readings(self) -> Iterator[tuple[str, Labels, float]]:
        """Yield `<name>_count` and `<name>_sum` for every label set seen."""
        for suffix, cells in (("_count", self._counts), ("_sum", self._sums)):
            for labels, value in cells.items():
                yield self.name + suffix, labels, value

    def clear(self) -> None:
        """Forget count and sum."""
        self._counts.clear()
        self._sums.clear()


I = TypeVar("I", bound=Instrument)  # noqa: E741 - the one type variable here


class Registry:
    """All instruments of the process; a name exists once."""

    def __init__(self) -> None:
        self._instruments: dict[str, Instrument] = {}

    def add(self, instrument: I) -> I:
        """Register and return the instrument."""
        assert instrument.name not in self._instruments, f"{instrument.name} is defined twice"
        self._instruments[instrument.name] = instrument
        return instrument

    def instruments(self) -> list[Instrument]:
        """All instruments, in the order of definition."""
        return list(self._instruments.values())

    def bind(self, meter: "Meter") -> None:
        """Export everything through this meter."""
        for instrument in self._instruments.values():
            instrument.bind(meter)

    def unbind(self) -> None:
        """Export nothing; counting goes on."""
        for instrument in self._instruments.values():
            instrument.unbind()

    def clear(self) -> None:
        """Forget all local values: for tests that start from zero."""
        for instrument in self._instruments.values():
            instrument.clear()

    def snapshot(self) -> dict[str, float]:
        """All local values: `name` is the sum over label sets, `name{k="v"}` each label set."""
        values: dict[str, float] = {}
        for instrument in self._instruments.values():
            for name, labels, value in instrument.readings():
                values[name] = values.get(name, 0.0) + value
                if labels:
                    inside = ",".join(f'{key}="{text}"' for key, text in labels)
                    values[f"{name}{{{inside}}}"] = value
        return values
