"""`hypha demo` for real: what it prints and leaves, what a trace of it shows, how it ends when it is disturbed."""

import json
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest

from tests.e2e.programs import Stage, inhabitants, run, stage, wait_until_deserted
from tests.otlp_receiver import Span

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

DEMO = ["hypha", "demo", "--json"]
LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(tuple(model(input_ids=torch.tensor([[65, 66]])).logits.shape))
"""


def test_a_run_prints_one_object_and_ends_well(demo_run):
    assert demo_run.code == 0, demo_run.output
    said = demo_run.summary
    assert (said["rounds"], said["workers"], said["error_lines"], said["error"]) == (2, 3, 0, None)
    assert said["final_loss"] < said["initial_loss"] - 1
    assert said["samples"] >= 1000
    # Two updates of 0.9 million fp32 numbers each way and round, and the model for two workers.
    assert min(said["bytes_sent"], said["bytes_received"]) > 20_000_000
    assert said["report"] == str(demo_run.directory / "report.md")


def test_a_run_leaves_what_it_promises_and_no_process(demo_run):
    made = {path.name for path in demo_run.directory.iterdir()}
    assert made >= {
        "certs",
        "configs",
        "dataset",
        "logs",
        "model",
        "commands.sh",
        "report.json",
        "report.md",
        "loss.png",
    }
    assert json.loads((demo_run.directory / "report.json").read_bytes())["phases"].keys() >= {
        *("setup", "certificates", "dataset", "network start", "leasing", "executors start"),
        *("training", "merging", "committing", "export"),
    }
    assert inhabitants(demo_run.directory) == []


def test_the_model_is_one_that_transformers_loads(demo_run):
    code, output = run(["python", "-c", LOADS, demo_run.summary["model_dir"]], demo_run.directory)
    assert (code, output.splitlines()[-1]) == (0, "(1, 2, 256)"), output


def test_the_same_commands_can_be_given_by_hand(demo_run):
    code, output = run(["sh", "commands.sh"], demo_run.directory)
    assert (code, '"message": "Job finished"' in output, "model_dir" in output.splitlines()[-1]) == (0, True, True), (
        output
    )
    assert inhabitants(demo_run.directory) == []


# --- one outer round is one trace ---


def traces(spans: Iterable[Span]) -> dict[str, list[Span]]:
    found: dict[str, list[Span]] = {}
    for span in spans:
        found.setdefault(span.trace_id, []).append(span)
    return found


def test_an_outer_round_is_one_trace_across_all_roles(demo_run):
    every = traces(demo_run.collector.spans())
    rounds = {
        span.attributes["round"]: every[span.trace_id]
        for spans in every.values()
        for span in spans
        if span.name == "outer_round"
    }
    assert rounds.keys() >= {1, 2}
    for number in (1, 2):
        spans = rounds[number]
        services = {span.service for span in spans}
        assert services >= {"hypha-scheduler", "hypha-worker", "hypha-train", "hypha-aggregate"}, number
        names = {span.name for span in spans}
        assert names >= {"outer_round", "inner_steps", "push", "screen", "aggregate", "outer_update", "commit"}, number
        assert [span.name for span in spans if span.parent_id == ""] == ["outer_round"], number
        assert {span.name for span in orphans(spans)} == set(), number
    # Slices are fetched when they are needed: in the first round surely.
    assert "hypha-data" in {span.service for span in rounds[1]}


def orphans(spans: list[Span]) -> list[Span]:
    """Return the spans that do not reach a root through parents that exist."""
    by_id = {span.span_id: span for span in spans}

    def reaches_root(span: Span) -> bool:
        seen = set()
        while span.parent_id and span.span_id not in seen:
            seen.add(span.span_id)
            if span.parent_id not in by_id:
                return False
            span = by_id[span.parent_id]
        return span.parent_id == ""

    return [span for span in spans if not reaches_root(span)]


def test_an_accepted_offer_is_one_trace_from_its_advertisement(demo_run):
    leased = [spans for spans in traces(demo_run.collector.spans()).values() if "advertise" in {s.name for s in spans}]
    assert any({"advertise", "offer", "accept"} <= {span.name for span in spans} for spans in leased)
    assert [span.name for spans in leased for span in orphans(spans)] == []


# --- disturbances ---


@pytest.fixture
def on_stage(tmp_path):
    with stage(tmp_path) as opened:
        yield opened
        # Whatever a failed test left.
        for process in inhabitants(tmp_path):
            process.kill()


def started(on_stage: Stage, rounds: int) -> tuple:
    directory = on_stage.directory / "run"
    command = [*DEMO, "--rounds", str(rounds), "--dir", str(directory)]
    return on_stage.start("demo", command), directory


def test_ctrl_c_while_it_trains_leaves_no_process(on_stage):
    demo, directory = started(on_stage, 50)
    demo.wait_for("held-out loss after round 0")
    assert len(inhabitants(directory)) >= 9  # six nodes, three executors
    assert demo.stop(signal.SIGINT) == 128 + signal.SIGINT
    assert inhabitants(directory) == []
    said = json.loads(demo.lines[-1])
    assert (said["error"], said["error_lines"], said["model_dir"]) == ("interrupted", 0, None)


def test_a_killed_demo_leaves_no_process(on_stage):
    demo, directory = started(on_stage, 50)
    demo.wait_for("network: ")
    demo.process.kill()
    demo.wait()
    assert wait_until_deserted(directory) == []


def test_a_killed_worker_is_started_again_and_the_run_goes_on(on_stage):
    demo, directory = started(on_stage, 3)
    demo.wait_for("round 1/3")
    node_of(directory, "worker-1").kill()
    demo.wait_for("worker-1 is lost: SIGKILL")
    assert demo.wait(200) == 0, demo.lines
    said = json.loads(demo.lines[-1])
    assert (said["rounds"], said["error"]) == (3, None)
    assert said["error_lines"] >= 1
    assert inhabitants(directory) == []


def node_of(directory: Path, name: str) -> psutil.Process:
    (found,) = [each for each in inhabitants(directory) if f"configs/{name}.toml" in each.cmdline()]
    return found
