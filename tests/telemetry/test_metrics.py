"""Instruments count with and without an exporter, under the manual's names, within bounds."""

import re
from pathlib import Path

import pytest

from hypha.telemetry import metrics
from hypha.telemetry.instruments import LABEL_SETS_MAX, Counter, Gauge, Histogram, ProbedGauge, Registry

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
# Taken from the operations manual's queries and alerts.
MANUAL = {
    "hypha_lease_renewals_total",
    "hypha_training_samples_total",
    "hypha_data_fetch_duration",
    "hypha_active_workers",
    "hypha_network_bytes_sent_total",
    "hypha_network_bytes_received_total",
}


@pytest.fixture
def registry():
    return Registry()


def test_every_metric_of_the_manuals_queries_exists():
    assert set(metrics.names()) >= MANUAL


def test_names_follow_prometheus_habits():
    for name in metrics.names():
        assert re.fullmatch(r"hypha_[a-z]+(_[a-z]+)*", name)
    counters = [name for name, value in vars(metrics).items() if isinstance(value, Counter)]
    assert len(counters) > 10
    assert all(getattr(metrics, name).name.endswith("_total") for name in counters)


def test_the_reference_page_lists_every_metric_and_no_other():
    listed = re.findall(r"^\| `(hypha_\w+)`", REFERENCE.read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(metrics.names())


def test_a_snapshot_has_sums_and_label_sets(registry):
    renewals = registry.add(Counter("renewals_total", ""))
    renewals.add(2, status="success")
    renewals.add(1, status="failure")
    fetch = registry.add(Histogram("fetch", "", (1, 10)))
    fetch.record(1.5, dataset="d")
    fetch.record(2.5, dataset="d")
    assert registry.snapshot() == {
        "renewals_total": 3,
        'renewals_total{status="success"}': 2,
        'renewals_total{status="failure"}': 1,
        "fetch_count": 2,
        'fetch_count{dataset="d"}': 2,
        "fetch_sum": 4,
        'fetch_sum{dataset="d"}': 4,
    }
    assert renewals.total() == 3


def test_the_order_of_labels_does_not_matter(registry):
    counter = registry.add(Counter("c_total", ""))
    counter.add(1, a="1", b="2")
    counter.add(1, b="2", a="1")
    assert registry.snapshot()['c_total{a="1",b="2"}'] == 2


def test_a_gauge_is_set_and_moved(registry):
    gauge = registry.add(Gauge("g", ""))
    gauge.set(5)
    gauge.add(-2)
    assert registry.snapshot() == {"g": 3}


def test_a_counter_never_goes_back(registry):
    counter = registry.add(Counter("c_total", ""))
    with pytest.raises(AssertionError, match="only grows"):
        counter.add(-1)


def test_label_sets_are_bounded_and_nothing_is_lost(registry):
    counter = registry.add(Counter("c_total", ""))
    for i in range(LABEL_SETS_MAX + 50):
        counter.add(1, peer=str(i))
    values = registry.snapshot()
    assert values["c_total"] == LABEL_SETS_MAX + 50
    assert values['c_total{otel_metric_overflow="true"}'] == 50


def test_a_name_exists_once(registry):
    registry.add(Counter("c_total", ""))
    with pytest.raises(AssertionError, match="twice"):
        registry.add(Gauge("c_total", ""))


def test_a_probe_runs_when_somebody_asks(registry):
    levels = iter([0.25, 0.75])
    registry.add(ProbedGauge("p", "", lambda: [({"resource": "cpu"}, next(levels))]))
    assert registry.snapshot()["p"] == 0.25
    assert registry.snapshot()["p"] == 0.75


def test_the_machine_reports_itself():
    values = metrics.snapshot()
    assert 0 < values['hypha_resource_utilization{resource="memory"}'] <= 1
    assert 0 <= values['hypha_resource_utilization{resource="cpu"}'] <= 1
    assert values["hypha_process_memory"] > 1e6
    assert values["hypha_process_cpu"] > 0
