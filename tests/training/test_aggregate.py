"""The parameter server's executor: merges in any order, closes again, forgets only what is committed."""

import pytest
import torch

from hypha.protocol.bridge import (
    Merge,
    MergeDone,
    MergeFailed,
    MergeInput,
    RoundCommitted,
    Screen,
    Screened,
    StateReady,
    UpdateMade,
)
from hypha.training import aggregate, outer, tensors
from tests.training.tiny_network import job_spec

SHAPES = {"a": (6,), "b": (2, 2)}


class Reports(list):
    """A session that only listens."""

    def report(self, report):
        self.append(report)


class NoEvaluation:
    def submit(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    theta = tensors.save(tmp_path / "model-0-0.safetensors", values(0))
    momentum = outer.zeros(tmp_path / "momentum-0-0.safetensors", SHAPES)
    state = aggregate.State(0, theta.ref(tmp_path), momentum.ref(tmp_path))
    return aggregate.Aggregator(Reports(), job_spec(), tmp_path, state, NoEvaluation())


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def spool(server, number, *, round_=1):
    """A contribution, screened."""
    file = tensors.save(server.work_dir / f"spool-{round_}-{number}", values(10 * round_ + number)).ref(server.work_dir)
    server.take(Screen(ticket=number, round=round_, file=file))
    return MergeInput(peer_id=f"peer-{number}", fence=1, samples=10 + 7 * number, file=file)


def merge(server, inputs, *, close=1, round_=1, base=None):
    digest = base or server.state.model.digest
    server.take(Merge(round=round_, close=close, base_digest=digest, inputs=tuple(inputs)))
    return server.session[-1]


def test_contributions_merge_to_the_same_bits_in_any_order(server):
    inputs = [spool(server, number) for number in range(4)]
    first = merge(server, inputs, close=1)
    again = merge(server, inputs[::-1], close=2)
    assert isinstance(first, MergeDone)
    assert (first.model.digest, first.record.digest) == (again.model.digest, again.record.digest)


def test_what_is_not_sound_is_refused_by_name(server):
    bad = {**values(1), "a": torch.full((6,), float("nan"))}
    file = tensors.save(server.work_dir / "bad", bad).ref(server.work_dir)
    server.take(Screen(ticket=9, round=1, file=file))
    assert server.session == [Screened(ticket=9, refusal="tensor 'a' is not finite")]


def test_what_the_workers_wait_for_is_told_before_what_makes_it_durable(server):
    done = merge(server, [spool(server, number) for number in range(2)])
    said = [one for one in server.session if isinstance(one, UpdateMade | MergeDone)]
    assert said == [UpdateMade(round=1, close=1, model_digest=done.model.digest, update=done.update), done]


def test_the_same_close_is_answered_the_same_and_a_higher_one_starts_again(server):
    inputs = [spool(server, number) for number in range(3)]
    first = merge(server, inputs, close=1)
    assert merge(server, inputs[:1], close=1) == first
    second = merge(server, inputs[:2], close=2)
    expected = outer.Step(
        {part: server.work_dir / f"expected-{part}" for part in outer.PARTS},
        model=server.work_dir / server.state.model.path,
        momentum=server.work_dir / server.state.momentum.path,
        shares=[outer.Share(server.work_dir / one.file.path, one.samples, one.peer_id) for one in inputs[:2]],
        outer=server.job.outer,
    ).take()
    assert second.model.digest == expected.model.digest != first.model.digest
    assert not (server.work_dir / first.model.path).exists()


def test_the_state_before_a_round_stays_until_the_round_is_committed(server):
    before = server.work_dir / server.state.model.path
    done = merge(server, [spool(server, 1)])
    assert before.exists()
    server.take(RoundCommitted(round=1, digest=done.model.digest))
    assert not before.exists()
    assert server.state == aggregate.State(1, done.model, done.momentum)
    # Late workers may still ask for the update of the round just committed.
    assert (server.work_dir / done.update.path).exists()
    after = merge(server, [spool(server, 1, round_=2)], round_=2)
    server.take(RoundCommitted(round=2, digest=after.model.digest))
    assert not (server.work_dir / done.update.path).exists()


def test_another_close_than_ours_being_committed_changes_nothing(server):
    before = server.state
    merge(server, [spool(server, 1)])
    server.take(RoundCommitted(round=1, digest="0" * 64))
    assert server.state == before


def test_the_next_rounds_merge_says_that_ours_was_committed(server):
    done = merge(server, [spool(server, 1)])
    after = merge(server, [spool(server, 2, round_=2)], round_=2, base=done.model.digest)
    assert isinstance(after, MergeDone)
    assert server.state.round == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"base": "1" * 64}, "is not ours"),
        ({"round_": 3}, "round 3 cannot follow the state after round 0"),
        ({"inputs": []}, "a total weight of zero is not a step"),
    ],
)
def test_a_merge_that_cannot_be_done_is_answered_with_the_reason(server, fields, reason):
    inputs = fields.pop("inputs", [spool(server, 1)])
    failed = merge(server, inputs, **fields)
    assert isinstance(failed, MergeFailed)
    assert reason in failed.reason
    assert isinstance(merge(server, [spool(server, 2)], close=5), MergeDone)


def test_what_it_begins_with_is_announced(server):
    server.over = True
    server.run()
    state = server.state
    assert server.session == [StateReady(round=0, model=state.model, momentum=state.momentum)]
