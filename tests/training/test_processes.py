"""The executors as processes: exit codes, reasons, telemetry, and an end with the bridge."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from hypha.protocol.bridge import ExecutorFailed, TrainProgress
from hypha.protocol.job import DatasetRef, HeldOutSlice, InnerOptimizer, ModelSpec, OuterOptimizer, Rounds
from hypha.training import aggregate, executor, export, train
from tests.training.running import JOIN_S, start_server, wait
from tests.training.test_models import LLAMA
from tests.training.tiny_network import Job, job_spec

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HYPHA_LOG": "info"}


def arguments(job, machine, kind):
    return ["--socket", machine.socket, "--work-dir", machine.dir, "--job", job.write_job(machine, kind)]


def start(job, machine, kind):
    command = [sys.executable, "-m", f"hypha.training.{kind}", *arguments(job, machine, kind)]
    with (machine.dir / "executor.log").open("w") as log:
        return subprocess.Popen(command, env=ENVIRONMENT, stderr=log)


def log_of(machine):
    return (machine.dir / "executor.log").read_text()


def run_here(job, machine, kind):
    """`main` in this process, without the watchdog that would end it."""
    work = {"train": train.work, "aggregate": aggregate.work}[kind]
    words = [str(word) for word in arguments(job, machine, kind)]
    return executor.run(work, kind, words, on_lost=lambda: None)


def bytes_job():
    """A Llama of bytes on a text that repeats: learnable in a few dozen steps."""
    return job_spec(
        model=ModelSpec(type="causal-lm", config=LLAMA, seed=1),
        dataset=DatasetRef(
            name="text",
            manifest_digest="0" * 64,
            schema={"input_ids": "U8[32]"},
            held_out=(HeldOutSlice(name="held", samples=64, bytes=1, digest="0" * 64),),
        ),
        inner=InnerOptimizer(learning_rate=1e-2),
        outer=OuterOptimizer(learning_rate=0.7, momentum=0.5),
        rounds=Rounds(updates=2, samples_between_updates=512, max_batch_size=16),
    )


def write_text(path, rows, seed):
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 400, dtype=np.uint8)
    starts = np.random.default_rng(seed).integers(0, len(text) - 32, size=rows)
    save_file({"input_ids": np.stack([text[at : at + 32] for at in starts])}, str(path))


@pytest.mark.slow
def test_processes_train_a_llama_that_transformers_loads_and_that_writes_text(tmp_path):
    with Job(tmp_path, bytes_job(), workers=2, sync_after=8) as job:
        write_text(job.slice, 512, seed=0)
        write_text(job.held_out, 64, seed=1)
        processes = [start(job, machine, "train") for machine in job.workers]
        server = start(job, job.server, "aggregate")
        for process, machine in zip(processes, job.workers, strict=True):
            assert process.wait(JOIN_S) == 0, log_of(machine)
        wait(job, lambda: {0, 2} <= job.evaluations.keys())
        job.stop_server()
        assert server.wait(JOIN_S) == 0
        assert job.evaluations[2].loss < job.evaluations[0].loss - 1
        lines = [json.loads(line) for one in [job.server, *job.workers] for line in log_of(one).splitlines()]
        assert {line["level"] for line in lines} == {"info"}

        model_file = job.server.dir / job.rounds[-1].model.path
        words = ["--job", job.server.dir / "job.json", "--model-file", model_file, "--out", tmp_path / "out"]
        command = [sys.executable, "-m", "hypha.training.export", *words, "--sample", "40"]
        said = json.loads(subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=True, text=True).stdout)
        assert said["model_dir"] == str(tmp_path / "out")
        assert 0 < len(said["sample_after"]) <= 40
        assert said["sample_after"] != said["sample_before"]

        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
        assert sum(parameter.numel() for parameter in loaded.parameters()) == said["parameters"]


@pytest.mark.slow
def test_a_process_ends_by_itself_when_the_bridge_closes(tmp_path):
    with Job(tmp_path, workers=1) as job:
        server = start_server(job)
        process = start(job, job.workers[0], "train")
        wait(job, lambda: any(isinstance(one, TrainProgress) for one in job.workers[0].reports) or job.round > 3)
        job.workers[0].bridge.hang_up()
        assert process.wait(10) in (0, 1)
        job.stop_server()
        server.join(JOIN_S)
        assert not server.is_alive()


def failed(machine):
    return [report.reason for report in machine.reports if isinstance(report, ExecutorFailed)]


def test_a_slice_with_the_wrong_tensors_fails_the_job_by_name(tmp_path, capfd):
    with Job(tmp_path, workers=1) as job:
        server = start_server(job)
        save_file({"pixels": np.zeros((512, 3), np.uint8)}, str(job.slice))
        assert run_here(job, job.workers[0], "train") == 1
        assert failed(job.workers[0]) == [
            "slice train.safetensors: its tensors are ['pixels'], the dataset has ['inputs', 'labels']"
        ]
        assert json.loads(capfd.readouterr().err.splitlines()[-1])["level"] == "error"
        job.stop_server()
        server.join(JOIN_S)


def test_a_loss_that_is_not_finite_fails_the_job_by_step(tmp_path):
    with Job(tmp_path, workers=1) as job:
        server = start_server(job)
        inputs = np.full((512, 8), np.nan, np.float32)
        save_file({"inputs": inputs, "labels": np.zeros(512, np.uint8)}, str(job.slice))
        assert run_here(job, job.workers[0], "train") == 1
        assert failed(job.workers[0]) == ["loss is nan at inner step 0 of this worker, in round 1"]
        job.stop_server()
        server.join(JOIN_S)


def test_a_model_nobody_knows_fails_the_job_by_key(tmp_path):
    unknown = job_spec(model=ModelSpec(type="causal-ml", config=LLAMA))
    with Job(tmp_path, unknown, workers=1) as job:
        assert run_here(job, job.server, "aggregate") == 1
        assert failed(job.server)[0].startswith("model.type: unknown 'causal-ml'; known: base, ")


def test_a_full_disk_fails_the_job_by_path(tmp_path):
    with Job(tmp_path, workers=1) as job:
        shutil.rmtree(job.server.dir)
        job.server.dir.mkdir()
        (job.server.dir / "model-0-0.safetensors.part").symlink_to("/dev/full")
        assert run_here(job, job.server, "aggregate") == 1
        assert failed(job.server) == [f"{job.server.dir}/model-0-0.safetensors: No space left on device"]


def test_a_job_that_cannot_be_read_is_named(tmp_path):
    with Job(tmp_path, workers=1) as job:
        words = [str(word) for word in arguments(job, job.server, "aggregate")]
        (job.server.dir / "job.json").write_text('{"job_id": 3}')
        assert executor.run(aggregate.work, "aggregate", words, on_lost=lambda: None) == 1
        assert "job.json: Expected `str`, got `int` - at `$.job_id`" in failed(job.server)[0]


def test_a_number_of_threads_that_is_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HYPHA_THREADS", "many")
    with Job(tmp_path, workers=1) as job:
        assert run_here(job, job.server, "aggregate") == 1
        assert failed(job.server) == ["HYPHA_THREADS: 'many' is not a number of threads"]


def test_an_executor_without_a_bridge_ends_with_a_failure(tmp_path):
    words = ["--socket", str(tmp_path / "nothing"), "--work-dir", str(tmp_path), "--job", str(tmp_path / "job.json")]
    assert train.main(words) == 1
    assert aggregate.main(words) == 1


def test_exporting_what_is_no_model_is_a_clear_error(tmp_path, capsys):
    with Job(tmp_path, workers=1) as job:
        path = job.write_job(job.server, "aggregate")
        words = ["--job", str(path), "--model-file", str(job.slice), "--out", str(tmp_path / "out")]
        assert export.main(words) == 1
        assert "error: train.safetensors: tensor 'layers.0.bias' is missing" in capsys.readouterr().err
        assert export.main([*words[:1], str(tmp_path / "no.json"), *words[2:]]) == 2
        assert "no.json: No such file" in capsys.readouterr().err
