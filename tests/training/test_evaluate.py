"""Held-out loss: the mean over predictions of rows spread over the split, in a thread that nobody waits for."""

import threading

import msgspec
import pytest
import torch

from hypha.protocol.bridge import EvaluationDone, FileRef, HeldOutFetched
from hypha.protocol.job import Rounds
from hypha.training import evaluate, models, tensors
from hypha.training.batches import Rows
from tests.training.tiny_network import job_spec, write_slice

JOIN_S = 30


class Worker:
    """The calls an Evaluator makes; a closed gate holds back its reports."""

    def __init__(self):
        self.done, self.heard = [], threading.Condition()
        self.gate = threading.Event()
        self.gate.set()

    def fetch_patiently(self, _request, *, leave):
        del leave
        return HeldOutFetched(paths=("held.safetensors",))

    def report(self, report):
        with self.heard:
            self.done.append(report)
            self.heard.notify()
        assert self.gate.wait(JOIN_S)

    def wait_for(self, count):
        with self.heard:
            assert self.heard.wait_for(lambda: len(self.done) >= count, JOIN_S)


def model(seed):
    return models.build(msgspec.structs.replace(job_spec().model, seed=seed))


def saved(directory, seed):
    written = tensors.save(directory / f"model-{seed}", models.parameters_of(model(seed)))
    return FileRef(path=written.path.name, bytes=written.bytes, digest=written.digest)


@pytest.fixture
def held_out(tmp_path):
    return write_slice(tmp_path / "held.safetensors", rows=100, seed=5)


def evaluator(worker, directory, **rounds):
    fields = {"updates": 9, "samples_between_updates": 8, "evaluate_every": 3, **rounds}
    spec = job_spec(rounds=Rounds(**fields))
    return evaluate.Evaluator(worker, spec, directory, lambda: models.build(spec.model))


def test_the_loss_is_the_mean_over_all_predictions(tmp_path, held_out):
    worker = Worker()
    with evaluator(worker, tmp_path) as evaluating:
        evaluating.submit(3, saved(tmp_path, 11))
        worker.wait_for(1)
    rows = list(evaluate.spread([Rows(held_out, job_spec().dataset.schema)], evaluate.SAMPLES_MAX))
    together = {name: torch.cat([batch[name] for batch in rows]) for name in rows[0]}
    with torch.no_grad():
        loss = float(model(11)(**together)["loss"])
    [done] = worker.done
    assert isinstance(done, EvaluationDone)
    assert (done.round, done.samples) == (3, len(together["labels"]))
    assert done.loss == pytest.approx(loss, rel=1e-5)


def test_models_that_wait_give_way_to_newer_ones_and_leave_no_file(tmp_path, held_out):
    worker = Worker()
    worker.gate.clear()
    with evaluator(worker, tmp_path) as evaluating:
        evaluating.submit(0, saved(tmp_path, 1))
        worker.wait_for(1)
        for round_ in (3, 6, 9):
            evaluating.submit(round_, saved(tmp_path, round_))
        worker.gate.set()
        worker.wait_for(2)
    assert [done.round for done in worker.done] == [0, 9]
    assert list(tmp_path.glob("evaluate-*")) == []


def test_the_initial_the_final_and_every_nth_model_are_evaluated(tmp_path, held_out):
    with evaluator(Worker(), tmp_path, updates=10) as evaluating:
        assert [round_ for round_ in range(11) if evaluating.wants(round_)] == [0, 3, 6, 9, 10]


def test_nothing_is_evaluated_where_nobody_asks(tmp_path):
    worker = Worker()
    with evaluator(worker, tmp_path, evaluate_every=0) as evaluating:
        evaluating.submit(0, saved(tmp_path, 1))
    assert worker.done == []


def test_rows_are_spread_over_all_slices(tmp_path):
    schema = job_spec().dataset.schema
    slices = [Rows(write_slice(tmp_path / f"s{n}", rows=64, seed=n), schema) for n in range(4)]
    seen = list(evaluate.spread(slices, 128))
    assert [len(batch["labels"]) for batch in seen] == [32, 32, 32, 32]
    assert all(torch.equal(batch["inputs"], slices[n].read(0, 32)["inputs"]) for n, batch in enumerate(seen))


def test_a_small_split_is_seen_whole(tmp_path):
    rows = Rows(write_slice(tmp_path / "s", rows=20), job_spec().dataset.schema)
    assert [len(batch["labels"]) for batch in evaluate.spread([rows], 256)] == [20]
