"""The outer step: pinned values, torch's own Nesterov SGD, and the same last bit whatever the order of arrival."""

import itertools

import numpy as np
import pytest
import torch

from hypha.errors import RemoteProtocolError
from hypha.protocol.compression import Coding
from hypha.protocol.job import OuterOptimizer
from hypha.training import arithmetic, outer, tensors
from tests.training.golden import golden

SHAPES = {"embed": (5, 3), "norm": (3,)}
OUTER = OuterOptimizer(learning_rate=0.7, momentum=0.9)


def made_up(seed):
    """Values from exact integer arithmetic and one division: the same on every machine and in every version."""
    return {
        name: ((torch.arange(int(np.prod(shape))) * 37 + seed * 11 + len(name)) % 101 - 50).float().reshape(shape) / 7
        for name, shape in SHAPES.items()
    }


def flat(values):
    return {name: tensor.flatten().tolist() for name, tensor in values.items()}


def write(path, values):
    return tensors.save(path, values).path


def outs(directory, tag):
    return {part: directory / f"{part}-{tag}" for part in outer.PARTS}


def start(directory):
    return write(directory / "model", made_up(0)), outer.zeros(directory / "momentum", SHAPES).path


def shares(directory, order=(0, 1, 2), samples=(16, 48, 7)):
    files = [write(directory / f"delta-{index}", made_up(index + 3)) for index in range(3)]
    return [outer.Share(files[index], samples[index], f"peer-{index}") for index in order]


def read(path):
    file = tensors.Reader(path)
    return {name: file.read(name) for name in file.names}


def three_steps(directory):
    model, momentum = start(directory)
    steps = []
    for number in range(3):
        samples = (16 + number, 48, 7 * number)
        steps.append(
            outer.Step(
                outs(directory, number),
                model=model,
                momentum=momentum,
                shares=shares(directory, samples=samples),
                outer=OUTER,
            ).take()
        )
        model, momentum = steps[-1].model.path, steps[-1].momentum.path
    return steps


def test_the_weighted_mean_is_the_one_on_file():
    deltas = [made_up(seed) for seed in (3, 4, 5)]
    got = {
        name: arithmetic.mean([(delta[name], n) for delta, n in zip(deltas, (16, 48, 7), strict=True)], samples=71)
        for name in SHAPES
    }
    assert flat(got) == golden("weighted_mean", flat(got))


def test_three_outer_steps_are_the_ones_on_file(tmp_path):
    steps = three_steps(tmp_path)
    got = [
        {"model": flat(read(one.model.path)), **{part: getattr(one, part).digest for part in outer.PARTS}}
        for one in steps
    ]
    assert got == golden("outer_steps", got)


def test_every_multiply_and_add_is_rounded_by_itself(tmp_path):
    model, momentum = start(tmp_path)
    stepped = outer.Step(outs(tmp_path, 1), model=model, momentum=momentum, shares=shares(tmp_path), outer=OUTER).take()
    f32 = np.float32
    for name in SHAPES:
        theta, deltas = made_up(0)[name].numpy(), [made_up(index + 3)[name].numpy() for index in range(3)]
        mean = deltas[0] * f32(16 / 71)
        for delta, count in zip(deltas[1:], (48, 7), strict=True):
            mean = mean + delta * f32(count / 71)
        velocity = np.zeros_like(theta) * f32(0.9) + mean
        update = (velocity * f32(0.9) + mean) * f32(0.7)
        assert np.array_equal(read(stepped.record.path)[name].numpy(), mean)
        assert np.array_equal(read(stepped.update.path)[name].numpy(), update)
        assert np.array_equal(read(stepped.model.path)[name].numpy(), theta - update)


def test_outer_steps_equal_torchs_nesterov_sgd(tmp_path):
    steps = three_steps(tmp_path)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in made_up(0).items()}
    reference = torch.optim.SGD(parameters.values(), lr=0.7, momentum=0.9, nesterov=True)
    for one in steps:
        for name, gradient in read(one.record.path).items():
            parameters[name].grad = gradient
        reference.step()
        for name, theta in read(one.model.path).items():
            torch.testing.assert_close(theta, parameters[name].data, rtol=2e-6, atol=2e-6)


def test_the_mean_is_right_for_any_number_of_workers():
    for count in range(1, 9):
        tensors_ = [torch.full((4,), float(index)) for index in range(count)]
        samples = [index + 1 for index in range(count)]
        want = sum(index * (index + 1) for index in range(count)) / sum(samples)
        got = arithmetic.mean(zip(tensors_, samples, strict=True), samples=sum(samples))
        torch.testing.assert_close(got, torch.full((4,), want))


def test_an_only_contribution_is_its_own_mean_to_the_last_bit():
    assert torch.equal(arithmetic.mean([(made_up(3)["embed"], 13)], samples=13), made_up(3)["embed"])


def test_replaying_records_gives_the_same_bits(tmp_path):
    steps = three_steps(tmp_path)
    model, momentum = start(tmp_path)
    for number, one in enumerate(steps):
        again = outer.replay(
            outs(tmp_path, f"again-{number}"), model=model, momentum=momentum, record=one.record.path, outer=OUTER
        )
        assert (again.model.digest, again.momentum.digest) == (one.model.digest, one.momentum.digest)
        model, momentum = again.model.path, again.momentum.path


def test_the_size_of_pieces_changes_no_bit(tmp_path, monkeypatch):
    whole = three_steps(tmp_path)[-1]
    monkeypatch.setattr(tensors, "PIECE_ELEMENTS", 4)
    assert three_steps(tmp_path)[-1].model.digest == whole.model.digest


def test_workers_subtract_the_update_and_stand_on_the_servers_bits(tmp_path):
    model, momentum = start(tmp_path)
    stepped = outer.Step(outs(tmp_path, 1), model=model, momentum=momentum, shares=shares(tmp_path), outer=OUTER).take()
    assert outer.subtract(tmp_path / "mine", model, stepped.update.path).digest == stepped.model.digest


@pytest.mark.parametrize("coding", [Coding(), Coding(codec="int8"), Coding(codec="topk")], ids=lambda one: one.codec)
@pytest.mark.parametrize("fragment", [None, {"norm"}], ids=["whole", "fragment"])
def test_what_workers_wait_for_comes_first_and_names_the_model_that_is_kept_later(tmp_path, coding, fragment):
    model, momentum = start(tmp_path)
    given = {"model": model, "momentum": momentum, "outer": OUTER, "downward": coding, "fragment": fragment}
    moved = {name: tensor for name, tensor in made_up(3).items() if fragment is None or name in fragment}
    contribution = write(tmp_path / "delta", moved)
    step = outer.Step(outs(tmp_path, 1), shares=[outer.Share(contribution, 4, "peer-1")], **given)
    made = step.make()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "momentum", "delta", "update-1", "record-1"}
    contribution.unlink()
    kept = step.keep(made)
    subtracted = outer.subtract(tmp_path / "mine", model, made.update.path, coding=coding, fragment=fragment)
    assert made.model_digest == kept.model.digest == subtracted.digest
    replayed = outer.replay(
        outs(tmp_path, 2), model=model, momentum=momentum, record=made.record.path, outer=OUTER,
        downward=coding, fragment=fragment,
    )  # fmt: skip
    assert [getattr(replayed, part).digest for part in outer.PARTS] == [getattr(kept, p).digest for p in outer.PARTS]


def test_parameters_are_given_the_servers_bits_however_they_lie_in_memory(tmp_path):
    model, momentum = start(tmp_path)
    stepped = outer.Step(outs(tmp_path, 1), model=model, momentum=momentum, shares=shares(tmp_path), outer=OUTER).take()
    parameters = {"embed": torch.zeros(3, 5).t(), "norm": torch.nn.Parameter(torch.zeros(3))}
    assert outer.load(parameters, model, stepped.update.path) == stepped.model.digest
    assert all(torch.equal(parameters[name], tensor) for name, tensor in read(stepped.model.path).items())


def test_a_contribution_without_samples_changes_nothing(tmp_path):
    model, momentum = start(tmp_path)
    given = shares(tmp_path, samples=(16, 0, 7))
    with_it = outer.Step(outs(tmp_path, 1), model=model, momentum=momentum, shares=given, outer=OUTER).take()
    without = outer.Step(
        outs(tmp_path, 2), model=model, momentum=momentum, shares=[given[0], given[2]], outer=OUTER
    ).take()
    assert with_it.model.digest == without.model.digest


def test_no_samples_at_all_are_not_a_step(tmp_path):
    model, momentum = start(tmp_path)
    with pytest.raises(RemoteProtocolError, match="a total weight of zero is not a step"):
        outer.Step(
            outs(tmp_path, 1),
            model=model,
            momentum=momentum,
            shares=shares(tmp_path, samples=(0, 0, 0)),
            outer=OUTER,
        ).take()


def test_a_step_that_overflows_is_refused_and_leaves_no_file(tmp_path):
    model, momentum = start(tmp_path)
    large = write(tmp_path / "large", {name: torch.full(shape, 3e38) for name, shape in SHAPES.items()})
    before = set(tmp_path.iterdir())
    with pytest.raises(RemoteProtocolError, match="tensor 'embed' not finite"):
        outer.Step(
            outs(tmp_path, 1),
            model=model,
            momentum=momentum,
            shares=[outer.Share(large, 1, "peer-1")],
            outer=OUTER,
        ).take()
    assert set(tmp_path.iterdir()) == before


def test_pseudo_gradients_point_from_the_end_to_the_start(tmp_path):
    base, end = write(tmp_path / "base", made_up(1)), made_up(2)
    delta = read(outer.pseudo_gradient(tmp_path / "delta", base, end).path)
    assert all(torch.equal(delta[name], made_up(1)[name] - end[name]) for name in SHAPES)


def test_merging_in_peer_order_is_what_makes_arrival_order_irrelevant(tmp_path):
    """Adding up as updates arrive would not do: fp32 addition is not associative."""
    model, momentum = start(tmp_path)
    digests = set()
    for order in itertools.permutations(range(3)):
        arrived = sorted(shares(tmp_path, order), key=lambda share: share.name)
        stepped = outer.Step(
            outs(tmp_path, "".join(map(str, order))), model=model, momentum=momentum, shares=arrived, outer=OUTER
        ).take()
        digests.add(stepped.model.digest)
    assert len(digests) == 1
    unsorted = {
        outer.Step(outs(tmp_path, "x"), model=model, momentum=momentum, shares=shares(tmp_path, order), outer=OUTER)
        .take()
        .record.digest
        for order in itertools.permutations(range(3))
    }
    assert len(unsorted) > 1
