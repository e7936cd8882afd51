"""Spans and the traceparent, within a process and across pretended ones."""

import re

import pytest
import trio

from hypha import telemetry

REMOTE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03"
UNSAMPLED = REMOTE[:-2] + "02"


def trace_of(traceparent):
    return traceparent.split("-")[1]


@pytest.fixture
def on(started, config):
    return started(config())


def test_before_start_nothing_is_traced_and_no_id_is_made():
    with telemetry.span("a") as span, telemetry.extracted(REMOTE):
        assert (span.traceparent, telemetry.inject(), telemetry.current_trace_id()) == (None, None, None)
    flow = telemetry.start_span("b", parent=REMOTE)
    flow.fail("still harmless")
    flow.end()
    assert flow.traceparent is None


def test_inject_names_the_current_span_and_nothing_outside_one(on):
    assert telemetry.inject() is None
    with telemetry.span("outer") as outer:
        assert telemetry.inject() == outer.traceparent
        assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-03", outer.traceparent)
        with telemetry.span("inner") as inner:
            assert trace_of(inner.traceparent) == trace_of(outer.traceparent)
            assert inner.traceparent != outer.traceparent
    assert telemetry.inject() is None


def test_a_remote_parent_is_continued(on):
    with telemetry.extracted(REMOTE):
        assert telemetry.inject() == REMOTE
        with telemetry.span("here") as here:
            assert trace_of(here.traceparent) == trace_of(REMOTE)
    with telemetry.span_from(REMOTE, "there") as there:
        assert trace_of(there.traceparent) == trace_of(REMOTE)


@pytest.mark.parametrize("text", ["", "nonsense", REMOTE[:-1], "00-" + "0" * 32 + REMOTE[35:], "x" * 100_000, None])
def test_a_malformed_traceparent_is_ignored(on, text):
    with telemetry.span("current") as current, telemetry.extracted(text):
        assert telemetry.inject() == current.traceparent


def test_a_handler_without_a_senders_trace_begins_its_own(on):
    with telemetry.span("unrelated task") as unrelated, telemetry.span_from(None, "handle") as handled:
        assert trace_of(handled.traceparent) != trace_of(unrelated.traceparent)


def test_a_long_flow_is_a_parent_while_it_is_current(on):
    flow = telemetry.start_span("outer_round", root=True)
    with flow.current(), telemetry.span("close") as child:
        assert trace_of(child.traceparent) == trace_of(flow.traceparent)
    with telemetry.span("elsewhere") as stranger:
        assert trace_of(stranger.traceparent) != trace_of(flow.traceparent)
    continued = telemetry.start_span("push", parent=flow.traceparent)
    assert trace_of(continued.traceparent) == trace_of(flow.traceparent)
    continued.end()
    flow.end()
    flow.end()


async def test_tasks_inherit_the_span_they_were_started_in(on):
    seen = []

    async def child(expected: str | None) -> None:
        await trio.lowlevel.checkpoint()
        seen.append(telemetry.inject() == expected)
        with telemetry.span("own"):
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(child, None)
        with telemetry.span("a") as a:
            nursery.start_soon(child, a.traceparent)
        with telemetry.span("b") as b:
            nursery.start_soon(child, b.traceparent)
    assert seen == [True, True, True]


@pytest.mark.parametrize("sampler", ["always_on", "traceidratio", "parentbased_always_on", "parentbased_traceidratio"])
def test_what_the_root_decided_holds_for_everyone(started, config, sampler):
    started(config(telemetry_sampler=sampler, telemetry_sample_ratio=0.0))
    with telemetry.span_from(REMOTE, "sampled") as sampled, telemetry.span_from(UNSAMPLED, "not") as unsampled:
        assert (sampled.traceparent[-2:], unsampled.traceparent[-2:]) == ("03", "02")


def test_a_ratio_of_traces_is_sampled_and_each_of_them_whole(started, config):
    started(config(telemetry_sampler="traceidratio", telemetry_sample_ratio=0.5))
    kept = 0
    for _ in range(400):
        with telemetry.span("root") as root, telemetry.span("child") as child:
            assert root.traceparent[-1] == child.traceparent[-1]
            kept += root.traceparent.endswith("03")
    assert 120 < kept < 280  # 8 standard deviations


def test_always_off_records_nothing_even_below_a_recorded_parent(started, config):
    started(config(telemetry_sampler="always_off"))
    with telemetry.span_from(REMOTE, "x") as span:
        assert span.traceparent.endswith("02")


def test_the_environments_sampler_wins(started, config):
    started(config(telemetry_sampler="always_on"), OTEL_TRACES_SAMPLER="traceidratio", OTEL_TRACES_SAMPLER_ARG="0")
    with telemetry.span("x") as span:
        assert span.traceparent.endswith("02")


def test_a_parent_may_become_known_while_its_child_is_under_way(exported):
    known = [None]
    with telemetry.span_afterwards(lambda: known[0], "inner_steps", round=2), telemetry.span("within"):
        known[0] = REMOTE
    within, late = exported()
    assert f"{late.context.trace_id:032x}" == trace_of(REMOTE)
    assert (late.name, late.attributes["round"]) == ("inner_steps", 2)
    assert late.start_time <= within.start_time
    assert late.end_time >= within.end_time
    assert within.parent is None


@pytest.mark.parametrize(("error", "ok"), [(ValueError("why"), False), (KeyboardInterrupt(), True)])
def test_what_ends_a_block_early_is_said_of_it_and_passes_through(exported, error, ok):
    with pytest.raises(type(error)), telemetry.span_afterwards(lambda: REMOTE, "inner_steps"):
        raise error
    (late,) = exported()
    assert late.status.is_ok == ok
    assert late.attributes.get("cancelled") == (True if ok else None)
