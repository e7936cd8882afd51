"""A model synchronised in fragments of int4, beside the inner steps, by two parameter servers: real processes."""

import json

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from hypha.protocol.fragments import Fragments
from hypha.protocol.job import Streaming
from hypha.protocol.shards import split
from tests.e2e.programs import stage
from tests.e2e.test_recovery import JOB, ROUNDS, Town, rounds_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FRAGMENTS, SHARDS, UPDATES = 2, 2, 5
CHANGES = {
    "num_hidden_layers = 1\n": f"num_hidden_layers = {FRAGMENTS}\n",
    f"updates = {ROUNDS}\n": f"updates = {UPDATES}\n",
    "samples_between_updates = 640\n": "samples_between_updates = 160\n",
    f"evaluate_every = {ROUNDS}\n": f"evaluate_every = {UPDATES}\n",
    "workers = 2\n": f"workers = 2\nparameter_servers = {SHARDS}\n",
}
STREAMED = f"""
[scheduler.job.streaming]
fragments = {FRAGMENTS}
overlap_steps = 2
mixing = 0.5
[scheduler.job.compression]
pseudo_gradients = "int4"
outer_updates = "int4"
"""


def job() -> str:
    """The small job, changed."""
    text = JOB
    for before, after in CHANGES.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    return text + STREAMED


def test_fragments_travel_beside_the_inner_steps_and_end_in_one_model(tmp_path, pki):
    with stage(tmp_path) as opened:
        town = Town(opened, pki)
        town.begin()
        town.node("scheduler", "scheduler", job())
        scheduler = town.scheduler()
        assert scheduler.wait(150) == 0, "\n".join(scheduler.lines[-30:])
        assert scheduler.errors() == []
        assert [line for name in ("train-1", "train-2") for line in opened.programs[name].errors()] == []
        finished = next(record for record in scheduler.records() if record["message"] == "Job finished")
        rounds = rounds_of(town.chain())
    assert [entry.merged.round for entry in rounds] == list(range(1, UPDATES + 1))
    assert {len(entry.contributions) for entry in rounds} == {2}, "nobody was lost on the way"
    model = tmp_path / finished["model_file"]
    assert blake3(model.read_bytes()).hexdigest() == finished["model_digest"]
    whole = load_file(model)
    assert all(torch.isfinite(tensor).all() for tensor in whole.values())
    assert finished["held_out"] is not None
    assert json.loads((tmp_path / finished["job_file"]).read_text())["streaming"]["fragments"] == FRAGMENTS
    sizes = {name: 4 * tensor.numel() for name, tensor in whole.items()}
    fragments = Fragments(sizes, Streaming(fragments=FRAGMENTS))
    for entry in rounds:
        moved = fragments.of(entry.merged.round)
        for shard, names in zip(entry.shards, split(sizes, SHARDS, fragments.parts), strict=True):
            size = sum(sizes[name] for name in moved.intersection(names))
            assert size <= shard.record_bytes < size + 4096, "its fragment's tensors and a header"
