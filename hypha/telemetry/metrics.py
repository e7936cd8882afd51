"""Every metric Hypha exports, under the names that the operations manual's queries use.

    from hypha.telemetry import metrics
    metrics.LEASE_RENEWALS.add(1, status="success")
    metrics.snapshot()["hypha_lease_renewals_total"]

No instrument carries an OpenTelemetry unit: exporters turn units into suffixes, and the manual's queries would then
return nothing. Units stand in the descriptions. Peer ids and lease ids are never labels: they are unbounded and belong
in logs and spans. docs/reference/metrics.md lists the same table for operators; a test compares the two.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hypha.telemetry import machine
from hypha.telemetry.instruments import (
    JOB_BUCKETS_S,
    LATENCY_BUCKETS_S,
    Counter,
    Gauge,
    Histogram,
    ProbedGauge,
    Reading,
    Registry,
)

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

_REGISTRY = Registry()


def _counter(name: str, description: str) -> Counter:
    return _REGISTRY.add(Counter(name, description))


def _gauge(name: str, description: str) -> Gauge:
    return _REGISTRY.add(Gauge(name, description))


def _probed(name: str, description: str, probe: Callable[[], Sequence[Reading]]) -> ProbedGauge:
    return _REGISTRY.add(ProbedGauge(name, description, probe))


def _latency(name: str, description: str) -> Histogram:
    return _REGISTRY.add(Histogram(name, description, LATENCY_BUCKETS_S))


def _job_time(name: str, description: str) -> Histogram:
    return _REGISTRY.add(Histogram(name, description, JOB_BUCKETS_S))


# Network, every role
CONNECTIONS_ACTIVE = _gauge("hypha_connections_active", "Open connections to peers")
CONNECTIONS_ESTABLISHED = _counter(
    "hypha_connections_established_total", "Connections that completed their handshake, by direction"
)
CONNECTIONS_FAILED = _counter("hypha_connections_failed_total", "Dials and handshakes that failed, by reason")
NETWORK_BYTES_SENT = _counter("hypha_network_bytes_sent_total", "Bytes sent to peers")
NETWORK_BYTES_RECEIVED = _counter("hypha_network_bytes_received_total", "Bytes received from peers")
DHT_TABLE_PEERS = _gauge("hypha_dht_routing_table_peers", "Peers in the DHT routing table")
DHT_QUERIES = _counter("hypha_dht_queries_total", "DHT queries ended, by status success or failure")
GOSSIP_MESH_PEERS = _gauge("hypha_gossip_mesh_peers", "Peers in the gossip mesh, by topic")
MESSAGES_REFUSED = _counter("hypha_messages_refused_total", "Messages and effects refused, by reason")

# Gateway
RELAY_CIRCUITS_ACTIVE = _gauge("hypha_relay_circuits_active", "Relayed connections open now")
RELAY_CIRCUITS = _counter("hypha_relay_circuits_total", "Relayed connections opened")
RELAY_BYTES = _counter("hypha_relay_bytes_total", "Bytes carried for others")

# Scheduler
ACTIVE_WORKERS = _gauge("hypha_active_workers", "Workers under a live lease of this scheduler")
LEASE_RENEWALS = _counter("hypha_lease_renewals_total", "Lease renewals ended, by status success or failure")
SLICES_ALLOCATED = _counter("hypha_slices_allocated_total", "Intervals of slices granted to workers, by dataset")
SLICES_RETURNED = _counter("hypha_slices_returned_total", "Intervals that came back unused, by dataset")
SYNC_EVENTS = _counter("hypha_sync_events_total", "Outer steps committed")
TRAINING_SAMPLES = _counter(
    "hypha_training_samples_total", "Samples trained on, counted by the scheduler from progress"
)
JOB_COMPLETION_TIME = _job_time("hypha_job_completion_time", "Seconds from a job's submission to its end, by status")

# Worker
ACTIVE_JOBS = _gauge("hypha_active_jobs", "Jobs running under a lease, by class of executor")
JOB_DURATION = _job_time("hypha_job_duration", "Seconds an executor ran for a job, by class and status")
RESOURCE_UTILISATION = _probed(
    "hypha_resource_utilization",
    "Fraction 0 to 1 of the machine in use, by resource: cpu, memory, gpu, gpu_memory",
    machine.utilisation,
)
DATA_FETCH_DURATION = _latency("hypha_data_fetch_duration", "Seconds from asking for a slice to holding it verified")
GRADIENT_TRANSMISSION_TIME = _latency(
    "hypha_gradient_transmission_time", "Seconds from opening a push to the server's answer"
)

# Data node
STREAMS_ACTIVE = _gauge("hypha_streams_active", "Tensor streams open now, by direction")
BYTES_SERVED = _counter("hypha_bytes_served_total", "Slice bytes served, by dataset")
SLICE_REQUESTS = _counter("hypha_slice_requests_total", "Slice requests, by dataset and status")
SLICE_SERVING_LATENCY = _latency(
    "hypha_slice_serving_latency", "Seconds from a slice request to its last byte, by dataset"
)

# The process and telemetry itself
PROCESS_MEMORY = _probed("hypha_process_memory", "Resident memory of this process, bytes", machine.process_memory)
PROCESS_CPU = _probed("hypha_process_cpu", "Processor seconds this process has used", machine.process_cpu)
TELEMETRY_DROPPED = _counter("hypha_telemetry_dropped_total", "Telemetry batches given up, by kind and reason")


def snapshot() -> dict[str, float]:
    """All local values now: `name` sums over labels, `name{key="value"}` is each label set."""
    return _REGISTRY.snapshot()


def names() -> dict[str, str]:
    """Description of every metric by name, in the order of definition."""
    return {instrument.name: instrument.description for instrument in _REGISTRY.instruments()}


def reset() -> None:
    """Forget all local values: for tests that start from zero."""
    _REGISTRY.clear()


def bind(meter: "Meter") -> None:
    """Export through this meter from now on; `start` calls it."""
    _REGISTRY.bind(meter)


def unbind() -> None:
    """Export nowhere; counting goes on."""
    _REGISTRY.unbind()
