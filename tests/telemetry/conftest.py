"""Fixtures: a configuration, a collector, and telemetry that is always stopped again."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from hypha.telemetry import Telemetry, metrics, start
from tests.otlp_receiver import Collector, otlp_receiver


@dataclass(frozen=True)
class Config:
    """The keys that telemetry reads, as a node's configuration has them."""

    telemetry_endpoint: str | None = None
    telemetry_protocol: str = "http/protobuf"
    telemetry_sampler: str = "parentbased_always_on"
    telemetry_sample_ratio: float = 1.0
    telemetry_attributes: dict[str, str] = field(default_factory=dict)
    telemetry_headers: dict[str, str] = field(default_factory=dict)


class Starter:
    """Starts telemetry with an empty environment and keeps the lines it writes."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.running: Telemetry | None = None

    def __call__(self, config: Config, component: str = "hypha-worker", **environ: str) -> Telemetry:
        self.running = start(component, config, environ=environ, stream=self.stream)
        return self.running

    def lines(self) -> list[dict[str, object]]:
        """Everything logged so far."""
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@pytest.fixture
def config():
    """Make configurations: config(telemetry_endpoint=…)."""
    return Config


@pytest.fixture
def started() -> Iterator[Starter]:
    """Start telemetry: started(config(), "hypha-worker", OTEL_…="…"); it is shut down after the test."""
    metrics.reset()
    starter = Starter()
    yield starter
    if starter.running is not None:
        starter.running.shutdown()


@pytest.fixture
def collector_off(started, config):
    """Telemetry without an endpoint; call the result for the lines logged."""
    started(config())
    return started.lines


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector of this test's own."""
    with otlp_receiver() as running:
        yield running
