"""Two parameter servers share a small model in real processes; one of them is killed and replaced alone."""

import json
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from hypha.protocol.shards import split
from tests.e2e.programs import stage
from tests.e2e.test_recovery import JOB, ROUNDS, SERVES, WORKER, Town, committed, rounds_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_two_servers_share_a_model_and_one_of_them_is_replaced_alone(tmp_path, pki):
    with stage(tmp_path) as opened:
        town = Town(opened, pki)
        town.begin()
        town.node("serve-3", "worker", f'work_dir = "serve-3"\n{WORKER}{SERVES}')
        town.start("serve-3", "worker").wait_for("Worker ready")
        town.node("scheduler", "scheduler", JOB.replace("workers = 2\n", "workers = 2\nparameter_servers = 2\n"))
        scheduler = town.scheduler()
        scheduler.wait_for(committed(2))
        serving = [
            name
            for name in ("serve-1", "serve-2", "serve-3")
            if any("Job started" in line for line in opened.programs[name].lines)
        ]
        assert len(serving) == 2
        opened.programs[serving[0]].kill()
        scheduler.wait_for('"message": "Worker lost"')
        assert scheduler.wait(200) == 0, "\n".join(scheduler.lines[-30:])
        assert scheduler.errors() == []
        finished = next(record for record in scheduler.records() if record["message"] == "Job finished")
        rounds = rounds_of(town.chain())
    assert [entry.merged.round for entry in rounds] == list(range(1, ROUNDS + 1))
    assert {len(entry.shards) for entry in rounds} == {2}
    lost = [record["work"] for record in scheduler.records() if record["message"] == "Worker lost"]
    assert lost == ["aggregate"]
    model = tmp_path / finished["model_file"]
    assert blake3(model.read_bytes()).hexdigest() == finished["model_digest"]
    whole = load_file(model)
    assert all(torch.isfinite(tensor).all() for tensor in whole.values())
    assert finished["held_out"] is not None, "the first server had the others' shards to evaluate"
    spec = json.loads(Path(tmp_path / finished["job_file"]).read_text())
    assert spec["shards"] == 2
    sizes = {name: 4 * tensor.numel() for name, tensor in whole.items()}
    shared = [sum(sizes[name] for name in names) for names in split(sizes, 2)]
    for shard, size in enumerate(shared):
        assert size < rounds[-1].shards[shard].model_bytes < size + 4096, "its tensors and a header"
