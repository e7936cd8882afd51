"""Telemetry over real sockets: three protocols, executors' way through the worker, absent collectors."""

import json
import socket
import sys
import threading

import pytest

from hypha import telemetry
from hypha.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from hypha.telemetry import metrics
from hypha.telemetry.export import FORWARD_BODY_BYTES_MAX, FORWARD_QUEUE_BYTES_MAX, FORWARD_QUEUE_MAX, Forwarder
from hypha.telemetry.instruments import Counter, Gauge, Histogram
from hypha.telemetry.tracing import start_span

pytestmark = pytest.mark.slow

PROTOCOLS = ["http/protobuf", "http/json", "grpc"]


def url_for(collector, protocol):
    return collector.grpc_url if protocol == "grpc" else collector.http_url


def unreachable():
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def points(metric):
    return {
        tuple(sorted((pair.key, pair.value.string_value) for pair in point.attributes)): point.as_double
        for point in metric.sum.data_points
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_spans_metrics_and_logs_arrive(started, config, collector, protocol):
    metrics.LEASE_RENEWALS.add(2, status="success")  # before start: counted all the same
    running = started(
        config(
            telemetry_endpoint=url_for(collector, protocol),
            telemetry_protocol=protocol,
            telemetry_attributes={"deployment.environment": "test", "role": "{component}"},
            telemetry_headers={"X-Scope-OrgID": "tenant"},
        )
    )
    metrics.LEASE_RENEWALS.add(1, status="failure")
    metrics.DATA_FETCH_DURATION.record(61.0)
    with telemetry.span("round", round=3, share=0.5, peer=None) as span:
        telemetry.get_logger("network").info("Lease renewed", lease_id="550e")
        with pytest.raises(ValueError, match="invalid literal"), telemetry.span("inner"):
            int("x")
    assert running.flush(10)

    inner, outer = collector.spans()
    assert (outer.name, outer.service, outer.attributes) == ("round", "hypha-worker", {"round": 3, "share": 0.5})
    assert span.traceparent == f"00-{outer.trace_id}-{outer.span_id}-03"
    assert (inner.parent_id, inner.failed, outer.failed, outer.parent_id) == (outer.span_id, True, False, "")
    assert collector.resources()[0]["role"] == "worker"
    assert collector.resources()[0]["deployment.environment"] == "test"
    assert {request.headers["x-scope-orgid"] for request in collector.requests} == {"tenant"}

    renewals = collector.metrics()["hypha_lease_renewals_total"]
    assert (renewals.unit, renewals.sum.is_monotonic) == ("", True)
    assert points(renewals) == {(("status", "success"),): 2, (("status", "failure"),): 1}
    fetch = collector.metrics()["hypha_data_fetch_duration"]
    assert (fetch.unit, fetch.histogram.data_points[0].count, fetch.histogram.data_points[0].sum) == ("", 1, 61)
    assert fetch.histogram.data_points[0].bucket_counts[13] == 1  # above 60 s, up to 120 s

    (record,) = collector.logs()
    assert (record.body.string_value, record.trace_id.hex()) == ("Lease renewed", outer.trace_id)
    assert record.severity_text == "info"


def test_no_exported_metric_carries_a_unit(started, config, collector):
    running = started(config(telemetry_endpoint=collector.http_url))
    for instrument in vars(metrics).values():
        if isinstance(instrument, Histogram):
            instrument.record(1.0)
        elif isinstance(instrument, Counter | Gauge):
            instrument.add(1)
    assert running.flush(10)
    received = collector.metrics()
    assert set(received) == set(metrics.names())
    assert {metric.unit for metric in received.values()} == {""}


def test_json_writes_ids_in_hexadecimal_and_enums_as_numbers(started, config, collector):
    running = started(config(telemetry_endpoint=collector.http_url, telemetry_protocol="http/json"))
    with telemetry.span("a") as span:
        pass
    assert running.flush(10)
    body = next(json.loads(request.body) for request in collector.requests if b"resourceSpans" in request.body)
    sent = body["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    assert f"00-{sent['traceId']}-{sent['spanId']}-03" == span.traceparent
    assert sent["kind"] == 1


def test_the_environment_wins_over_the_file(started, config, collector):
    running = started(
        config(
            telemetry_endpoint="http://127.0.0.1:1",
            telemetry_protocol="http/json",
            telemetry_headers={"X-From": "file"},
            telemetry_attributes={"service.name": "from-file", "zone": "file"},
        ),
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.grpc_url,
        OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
        OTEL_EXPORTER_OTLP_HEADERS="x-from=the%20environment",
        OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{collector.http_url}/v1/traces",
        OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="http/protobuf",
        OTEL_RESOURCE_ATTRIBUTES="zone=environment,other=1",
        OTEL_SERVICE_NAME="hypha-special",
        OTEL_LOGS_EXPORTER="none",
    )
    with telemetry.span("a"):
        telemetry.get_logger("x").info("not exported")
    assert running.flush(10)
    assert [span.service for span in collector.spans()] == ["hypha-special"]
    assert collector.resources()[0]["zone"] == "environment"
    assert {request.headers["x-from"] for request in collector.requests} == {"the environment"}
    assert len(collector.metrics()) > 0
    assert collector.logs() == []


@pytest.mark.parametrize(
    ("keys", "environ", "named"),
    [
        ({"telemetry_protocol": "smoke", "telemetry_endpoint": "http://x:1"}, {}, "telemetry_protocol"),
        ({"telemetry_endpoint": "collector:4318"}, {}, "telemetry_endpoint"),
        ({"telemetry_endpoint": "http://x:99999"}, {}, "telemetry_endpoint"),
        ({"telemetry_sampler": "sometimes"}, {}, "telemetry_sampler"),
        ({"telemetry_sample_ratio": 1.5}, {}, "telemetry_sample_ratio"),
        ({}, {"OTEL_TRACES_SAMPLER_ARG": "many"}, "OTEL_TRACES_SAMPLER_ARG"),
        ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "x"}, "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ({"telemetry_endpoint": "http://x:1"}, {"OTEL_EXPORTER_OTLP_HEADERS": "secret"}, "OTEL_EXPORTER_OTLP_HEADERS"),
        ({"telemetry_endpoint": "http://x:1", "telemetry_headers": {"a": "\n"}}, {}, "telemetry_headers"),
        ({}, {"HYPHA_LOG": "loud"}, "HYPHA_LOG"),
    ],
)
def test_what_is_wrong_is_refused_by_name_and_nothing_is_started(started, config, keys, environ, named):
    with pytest.raises(ConfigError, match=named):
        telemetry.check(config(**keys), environ)
    with pytest.raises(ConfigError, match=named):
        started(config(**keys), **environ)
    assert telemetry.inject() is None
    started(config())


def test_without_an_endpoint_everything_works_and_nothing_leaves(started, config):
    running = started(config())
    metrics.NETWORK_BYTES_SENT.add(7)
    with telemetry.span("a"):
        telemetry.get_logger("x").info("here")
    assert running.flush()
    assert running.snapshot()["hypha_network_bytes_sent_total"] == 7
    assert (len(started.lines()), running.exports) == (1, False)
    assert telemetry.forward("traces", b"") is False


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_dead_collector_costs_one_log_line(started, config, protocol):
    running = started(config(telemetry_endpoint=unreachable(), telemetry_protocol=protocol))
    for _ in range(2000):
        with telemetry.span("a"):
            pass
    running.shutdown()
    complaints = [line for line in started.lines() if line["logger"].startswith("hypha.telemetry")]
    assert [line["level"] for line in complaints] == ["warn"]
    assert metrics.TELEMETRY_DROPPED.total() > 0


def test_a_collector_that_never_answers_does_not_hold_up_shutdown(started, config):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        running = started(config(telemetry_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}"))
        with telemetry.span("a"):
            pass
        assert running.shutdown(2.0)
        assert metrics.snapshot()['hypha_telemetry_dropped_total{kind="traces",reason="unreachable"}'] == 1
    assert [line["level"] for line in started.lines()] == ["warn"]


def test_shutdown_gives_up_on_a_bridge_that_hangs(started):
    hanging = threading.Event()

    def hang(path: str, body: bytes) -> None:
        hanging.wait(60)

    running = telemetry.executor_start("hypha-executor", hang, environ={}, stream=started.stream)
    with telemetry.span("a"):
        pass
    assert running.flush(0.1) is False
    assert running.shutdown(0.1) is False
    assert telemetry.inject() is None
    hanging.set()


def test_a_flow_still_open_at_shutdown_is_exported_so_that_its_children_have_a_parent(started, config, collector):
    running = started(config(telemetry_endpoint=collector.http_url))
    flow = start_span("outer_round", root=True)
    with flow.current(), telemetry.span("child"):
        pass
    assert running.shutdown(10)
    by_name = {span.name: span for span in collector.spans()}
    assert by_name["child"].parent_id == by_name["outer_round"].span_id
    assert by_name["outer_round"].attributes == {"unfinished": True}


def test_starting_twice_is_refused_and_starting_again_after_shutdown_is_not(started, config):
    running = started(config())
    with pytest.raises(LocalProtocolError, match="already running"):
        started(config())
    running.shutdown()
    assert running.shutdown()
    started(config())
    assert telemetry.inject() is None


EXECUTOR = """
import sys
from hypha import telemetry

def post(path, body):
    sys.stdout.write(path + " " + body.hex() + chr(10))

running = telemetry.executor_start("hypha-executor", post)
with telemetry.extracted(sys.argv[1]), telemetry.span("inner_steps"):
    telemetry.metrics.GRADIENT_TRANSMISSION_TIME.record(0.5)
    telemetry.get_logger("training").info("Round trained")
running.shutdown()
assert not {"torch", "trio", "grpc", "httpx"} & set(sys.modules), "an executor loads too much"
"""


def test_an_executors_telemetry_reaches_the_collector_through_the_worker(started, config, collector, run_python):
    running = started(config(telemetry_endpoint=collector.http_url))
    with telemetry.span("job") as job:
        done = run_python(EXECUTOR, job.traceparent)
    assert done.returncode == 0, done.stderr
    posted = [line.split(" ") for line in done.stdout.splitlines()]
    assert {path for path, _ in posted} == {"/telemetry?kind=traces", "/telemetry?kind=metrics"}
    for path, body in posted:
        assert telemetry.forward(path.partition("=")[2], bytes.fromhex(body))
    assert running.flush(10)
    by_name = {span.name: span for span in collector.spans()}
    assert by_name["inner_steps"].parent_id == by_name["job"].span_id
    assert by_name["inner_steps"].service == "hypha-executor"
    assert any(request.body.hex() == posted[0][1] for request in collector.requests), "forwarded unchanged"
    assert "hypha_gradient_transmission_time" in collector.metrics()
    (line,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert (line["component"], line["trace_id"]) == ("hypha-executor", by_name["job"].trace_id)


def test_a_bridge_that_fails_is_one_log_line(started):
    def broken(path: str, body: bytes) -> None:
        raise ConnectionRefusedError(path)

    running = telemetry.executor_start("hypha-executor", broken, environ={}, stream=started.stream)
    with telemetry.span("a"):
        pass
    assert running.shutdown(10)
    assert [line["level"] for line in started.lines()] == ["warn"]


def test_forwarding_is_bounded_and_counts_what_it_drops(started):
    taken = threading.Event()
    go_on = threading.Event()

    def stuck(kind: str, body: bytes) -> bool:
        taken.set()
        return go_on.wait(60)

    forwarder = Forwarder(stuck)
    assert forwarder.forward("traces", b"first")
    assert taken.wait(60)
    results = [forwarder.forward("metrics", b"x") for _ in range(FORWARD_QUEUE_MAX + 3)]
    assert results == [True] * FORWARD_QUEUE_MAX + [False] * 3
    assert forwarder.forward("logs", bytes(FORWARD_BODY_BYTES_MAX + 1)) is False
    dropped = metrics.snapshot()
    assert dropped['hypha_telemetry_dropped_total{kind="metrics",reason="queue_full"}'] == 3
    assert dropped['hypha_telemetry_dropped_total{kind="logs",reason="too_large"}'] == 1
    with pytest.raises(RemoteProtocolError, match="unknown kind"):
        forwarder.forward("gossip", b"")
    go_on.set()
    assert forwarder.drain(60)
    forwarder.close(60)


def test_forwarding_holds_a_bounded_number_of_bytes(started):
    go_on = threading.Event()
    forwarder = Forwarder(lambda kind, body: go_on.wait(60))
    largest = bytes(FORWARD_BODY_BYTES_MAX)
    fits = FORWARD_QUEUE_BYTES_MAX // FORWARD_BODY_BYTES_MAX
    assert [forwarder.forward("traces", largest) for _ in range(fits + 1)] == [True] * fits + [False]
    go_on.set()
    assert forwarder.drain(60)
    assert forwarder.forward("traces", largest)
    forwarder.close(60)


def test_importing_telemetry_loads_nothing_heavy(run_python):
    heavy = ["opentelemetry", "grpc", "httpx", "psutil", "pynvml", "trio", "torch", "libp2p", "requests"]
    done = run_python(f"import sys, hypha.telemetry; print([m for m in {heavy} if m in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]")


@pytest.fixture
def run_python():
    """Run a program in an interpreter of its own, with warnings as errors."""
    import subprocess

    def run(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-W", "error", "-c", program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    return run
