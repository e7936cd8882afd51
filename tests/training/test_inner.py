"""Inner steps: the schedule, plain AdamW, refusal of losses that are not finite, and going back."""

import copy

import pytest
import torch

from hypha.errors import JobFailed
from hypha.protocol.job import InnerOptimizer, ModelSpec, OuterOptimizer, Schedule
from hypha.training import models, outer, tensors
from hypha.training.inner import InnerLoop, factor, loss_of, predicted
from tests.training.tiny_network import CLASSES, MLP, WIDTH

CPU = torch.device("cpu")
SPEC = ModelSpec(type="torch", config=MLP, seed=3)
ADAMW = InnerOptimizer(learning_rate=3e-3, betas=(0.9, 0.95), weight_decay=0.1)


def batch(seed, rows=8):
    generator = torch.Generator().manual_seed(seed)
    return {
        "inputs": torch.randn(rows, WIDTH, generator=generator),
        "labels": torch.randint(0, CLASSES, (rows,), generator=generator),
    }


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Schedule(), [1.0, 1.0, 1.0, 1.0]),
        (Schedule(warmup_steps=4), [0.25, 0.5, 0.75, 1.0, 1.0]),
        (Schedule(type="linear", total_steps=4), [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (Schedule(type="linear", warmup_steps=2, total_steps=4, floor=0.5), [0.5, 1.0, 1.0, 0.75, 0.5, 0.5]),
        (Schedule(type="cosine", total_steps=2), [1.0, 0.5, 0.0]),
        (Schedule(type="wsd", warmup_steps=1, total_steps=6, decay_steps=2), [1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_the_schedules_shape(schedule, factors):
    assert [factor(schedule, step) for step in range(len(factors))] == pytest.approx(factors)


def test_one_worker_one_step_a_round_and_a_plain_outer_step_are_plain_adamw(tmp_path):
    """DiLoCo with k = 1, one worker, outer learning rate 1 and no momentum is AdamW (arXiv 2311.08105, §2)."""
    reference = models.build(SPEC)
    plain = torch.optim.AdamW(reference.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    loop = InnerLoop(models.build(SPEC), ADAMW, CPU)
    mine = models.parameters_of(loop.model)
    base = tensors.save(tmp_path / "model-0", mine).path
    momentum = outer.zeros(tmp_path / "momentum-0", tensors.shapes_of(mine)).path
    for number in range(1, 21):
        plain.zero_grad()
        loss_of(reference, batch(number), CPU).backward()
        plain.step()
        loop.step(batch(number), round_=number)
        delta = outer.pseudo_gradient(tmp_path / "delta", base, mine)
        outs = {part: tmp_path / f"{part}-{number}" for part in outer.PARTS}
        stepped = outer.Step(
            outs,
            model=base,
            momentum=momentum,
            shares=[outer.Share(delta.path, 8, "only")],
            outer=OuterOptimizer(learning_rate=1.0, momentum=0.0),
        ).take()
        base, momentum = stepped.model.path, stepped.momentum.path
        tensors.load_into(base, mine)
    for name, wanted in models.parameters_of(reference).items():
        torch.testing.assert_close(mine[name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("poison", "said"), [(float("nan"), "nan"), (3e38, "inf|nan")])
def test_a_loss_that_is_not_finite_ends_the_job_and_names_the_step(poison, said):
    loop = InnerLoop(models.build(SPEC), ADAMW, CPU)
    loop.step(batch(1), round_=2)
    bad = batch(2)
    bad["inputs"][0] = poison
    loop.model.layers[1] = torch.nn.Identity()  # a saturating layer would hide the overflow
    bad["inputs"] = bad["inputs"] * 10
    with pytest.raises(JobFailed, match=f"loss is ({said}) at inner step 1 of this worker, in round 2"):
        loop.step(bad, round_=2)


def test_gradients_are_clipped_to_the_norm():
    loop = InnerLoop(models.build(SPEC), InnerOptimizer(clip_norm=0.01), CPU)
    loop.step(batch(1), round_=1)
    norm = torch.stack([parameter.grad.norm() for parameter in loop.model.parameters()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_a_kept_inner_state_is_gone_back_to_to_the_last_bit(tmp_path):
    loop = InnerLoop(models.build(SPEC), ADAMW, CPU)
    for seed in range(3):
        loop.step(batch(seed), round_=1)
    kept = loop.save(tmp_path / "inner")
    parameters = copy.deepcopy(models.parameters_of(loop.model))
    first = [loop.step(batch(seed), round_=2) for seed in range(3, 6)]
    end = copy.deepcopy(models.parameters_of(loop.model))
    for name, tensor in models.parameters_of(loop.model).items():
        tensor.copy_(parameters[name])
    loop.restore(kept)
    assert [loop.step(batch(seed), round_=2) for seed in range(3, 6)] == first
    assert loop.steps == 6
    assert all(torch.equal(tensor, end[name]) for name, tensor in models.parameters_of(loop.model).items())


def test_the_state_before_the_first_step_is_none(tmp_path):
    loop = InnerLoop(models.build(SPEC), ADAMW, CPU)
    kept = loop.save(tmp_path / "inner")
    first = loop.step(batch(1), round_=1)
    tensors_ = models.parameters_of(models.build(SPEC))
    for name, tensor in models.parameters_of(loop.model).items():
        tensor.copy_(tensors_[name])
    loop.restore(kept)
    assert kept.path is None
    assert loop.step(batch(1), round_=1) == first


def test_a_late_joiner_takes_its_place_in_the_schedule_after_its_first_round():
    decaying = InnerOptimizer(schedule=Schedule(type="linear", total_steps=100))
    loop = InnerLoop(models.build(SPEC), decaying, CPU)
    for seed in range(5):
        loop.step(batch(seed), round_=4)
    loop.finished_round(4, 5)
    assert (loop.steps, loop.offset) == (5, 15)
    loop.finished_round(5, 5)
    assert loop.offset == 15


def test_a_model_without_a_loss_is_a_clear_failure():
    inputs = {"inputs": torch.zeros(2, WIDTH)}
    with pytest.raises(JobFailed, match="computes no loss from tensors inputs; is one named 'labels'"):
        loss_of(models.build(SPEC), inputs, CPU)
    with pytest.raises(JobFailed, match="does not take tensors inputs, surprise"):
        loss_of(models.build(SPEC), {**inputs, "surprise": torch.zeros(2)}, CPU)


def test_predictions_are_counted_per_token_after_the_first_or_per_label():
    labels = torch.zeros(3, 10)
    assert predicted({"labels": labels}, shifted=True) == 27
    assert predicted({"labels": labels}, shifted=False) == 30
    labels[:, :5] = -100
    assert predicted({"labels": labels}, shifted=True) == 15
    assert predicted({"labels": torch.zeros(3)}, shifted=False) == 3
