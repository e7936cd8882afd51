"""Codecs: the fast path against the slow one, bounds on what is lost, feedback, and bytes that lie."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hypha.errors import RemoteProtocolError
from hypha.protocol.compression import CODECS, Coding
from hypha.training import codecs
from tests.training import slow_codecs

LOSSY = [codec for codec in CODECS if codec != "none"]
PACKED = ["int8", "int4", "topk"]
# Around the edges of blocks (128) and chunks (4096), and tensors smaller than either.
SIZES = [1, 2, 3, 10, 127, 128, 129, 300, 4095, 4096, 4097, 8192 + 131]


def normal(elements, seed=0, scale=0.01):
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed)) * scale


def round_trip(values, coding, generator=None):
    return codecs.decode(codecs.encode(values, coding, generator), values.numel(), coding)


def data_of(values):
    return bytes(values.tolist())


elements = arrays.arrays(
    np.float32,
    st.integers(1, 300),
    elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-40]),
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("codec", PACKED)
def test_the_fast_path_writes_what_the_slow_one_writes(codec, size):
    values, coding = normal(size, seed=size), Coding(codec=codec)
    data = codecs.encode(values, coding)
    assert data_of(data) == slow_codecs.encode(values.tolist(), coding)
    assert codecs.decode(data, size, coding).tolist() == slow_codecs.decode(data_of(data), size, coding)


@given(elements, st.sampled_from(PACKED), st.sampled_from([0.01, 0.03, 0.2]))
@settings(max_examples=60, deadline=None)
def test_the_fast_path_writes_what_the_slow_one_writes_whatever_the_values(values, codec, density):
    coding = Coding(codec=codec, density=density)
    data = codecs.encode(torch.from_numpy(values), coding)
    assert data_of(data) == slow_codecs.encode(values.tolist(), coding)
    assert codecs.decode(data, len(values), coding).tolist() == slow_codecs.decode(data_of(data), len(values), coding)


@pytest.mark.parametrize("ties", [[1.0] * 4096, [0.0] * 4096, [2.0, -2.0] * 2048, [0.0] * 4000 + [3.0] * 5])
def test_of_equal_elements_topk_takes_the_first(ties):
    coding = Coding(codec="topk", density=0.01)
    values = torch.tensor(ties)
    assert data_of(codecs.encode(values, coding)) == slow_codecs.encode(ties, coding)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("codec", CODECS)
def test_sizes_follow_from_the_coding(codec, size):
    coding = Coding(codec=codec)
    assert codecs.encode(normal(size), coding).numel() == coding.bytes_of(size)


@pytest.mark.parametrize("codec", CODECS)
def test_no_elements_are_no_bytes(codec):
    coding = Coding(codec=codec)
    assert codecs.encode(torch.empty(0), coding).numel() == 0
    assert codecs.decode(torch.empty(0, dtype=torch.uint8), 0, coding).numel() == 0


def test_none_changes_no_bit():
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3.4e38])
    again = round_trip(odd, Coding(codec="none"))
    assert torch.equal(again.view(torch.int32), odd.view(torch.int32))


@pytest.mark.parametrize(("codec", "bits"), [("fp16", 10), ("bf16", 7)])
def test_floats_are_right_to_their_last_bit(codec, bits):
    values = normal(5000, scale=1.0)
    again = round_trip(values, Coding(codec=codec))
    assert bool(((again - values).abs() <= values.abs() * 2.0 ** -(bits + 1) + 2.0**-25).all())


def test_what_exceeds_fp16_becomes_its_largest_number():
    again = round_trip(torch.tensor([1e9, -1e9]), Coding(codec="fp16"))
    assert again.tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize(("codec", "levels"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("size", [128, 1000])
def test_integers_are_right_to_half_a_step_of_their_block(codec, levels, size):
    values = normal(size) * torch.logspace(-6, 6, size)
    again = round_trip(values, Coding(codec=codec))
    for start in range(0, size, 128):
        block = values[start : start + 128]
        step = float(block.abs().amax()) / levels
        assert float((again[start : start + 128] - block).abs().amax()) <= step / 2 * (1 + 1e-5)


def test_the_largest_element_of_a_block_survives():
    values = normal(128)
    at = int(values.abs().argmax())
    for codec in ("int8", "int4"):
        assert float(round_trip(values, Coding(codec=codec))[at]) == pytest.approx(float(values[at]), rel=1e-6)


def test_topk_sends_the_largest_with_their_signs_and_nothing_else():
    values = normal(4096)
    again = round_trip(values, Coding(codec="topk", density=0.02))
    kept = values.abs().argsort(descending=True)[:82]
    assert set(again.nonzero().flatten().tolist()) == set(kept.tolist())
    assert bool((again[kept].sign() == values[kept].sign()).all())
    assert len(again.abs().unique()) == 3
    assert float(again.abs().sum()) == pytest.approx(float(values[kept].abs().sum()), rel=1e-4)


@pytest.mark.parametrize("codec", LOSSY)
def test_coding_loses_less_than_the_update_itself(codec):
    values = normal(20_000)
    assert float((round_trip(values, Coding(codec=codec)) - values).norm()) < float(values.norm())


def test_stochastic_rounding_is_right_on_average_where_nearest_is_not():
    values = torch.full((128,), 0.2)
    values[0] = 7.0
    generator = torch.Generator().manual_seed(3)
    stochastic = Coding(codec="int4", stochastic=True)
    mean = torch.stack([round_trip(values, stochastic, generator) for _ in range(400)]).mean(0)
    assert float(mean[1:].mean()) == pytest.approx(0.2, abs=0.01)
    assert float(round_trip(values, Coding(codec="int4"))[1:].abs().sum()) == 0.0


def test_stochastic_rounding_repeats_with_its_generator_and_stays_within_a_step():
    values, coding = normal(1000), Coding(codec="int4", stochastic=True)
    first, second = (codecs.encode(values, coding, torch.Generator().manual_seed(8)) for _ in range(2))
    other = codecs.encode(values, coding, torch.Generator().manual_seed(9))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    lost = (codecs.decode(first, 1000, coding) - values).abs()
    assert float(lost.amax()) <= float(values.abs().amax()) / 7 * (1 + 1e-5)


def test_the_largest_random_number_carries_no_element_into_its_neighbours_bits(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.full(shape, 1 - 2.0**-24))
    values = torch.tensor([0.3, 7.0, 7.0, 0.0]) / 3
    again = round_trip(values, Coding(codec="int4", stochastic=True))
    assert again.tolist() == pytest.approx([1 / 3, 7 / 3, 7 / 3, 0.0])


@pytest.mark.parametrize("codec", CODECS)
def test_whole_rows_alone_code_as_they_do_together(codec):
    coding, values = Coding(codec=codec), normal(3 * 4096 + 77)
    together, cut = codecs.encode(values, coding), coding.bytes_of(4096)
    apart = [codecs.encode(values[:4096], coding), codecs.encode(values[4096:], coding)]
    assert torch.equal(torch.cat(apart), together)
    assert torch.equal(
        codecs.decode(together[cut:].clone(), values.numel() - 4096, coding), round_trip(values, coding)[4096:]
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("codec", LOSSY)
def test_the_number_of_threads_changes_no_bit(codec, threads):
    values, before = normal(1 << 16), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        data = codecs.encode(values, Coding(codec=codec))
    finally:
        torch.set_num_threads(before)
    torch.set_num_threads(1)
    try:
        assert torch.equal(data, codecs.encode(values.clone(), Coding(codec=codec)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("codec", ["int4", "topk"])
def test_with_feedback_what_was_sent_adds_up_to_the_truth(codec):
    coding, rounds = Coding(codec=codec, density=0.03), 60
    assert coding.feedback
    truth, sent, residual = torch.zeros(6000), torch.zeros(6000), torch.zeros(6000)
    for number in range(rounds):
        update = normal(6000, seed=number) + 0.001
        wanted = update + residual
        decoded = round_trip(wanted, coding)
        residual = wanted - decoded
        truth, sent = truth + update, sent + decoded
    assert torch.allclose(sent + residual, truth, atol=1e-5)
    # The residual does not grow with the rounds: what is owed is paid within a few of them.
    assert float(residual.norm()) < float(truth.norm())


def test_feedback_is_for_what_would_otherwise_never_be_sent():
    wanted = {"none": False, "fp16": False, "bf16": False, "int8": False, "int4": True, "topk": True}
    assert {codec: Coding(codec=codec).feedback for codec in CODECS} == wanted
    assert not Coding(codec="int4", stochastic=True).feedback


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_not_finite_or_too_large_is_not_coded(codec, bad):
    values = normal(300)
    values[170] = bad
    with pytest.raises(RemoteProtocolError, match="not finite, or too large"):
        codecs.encode(values, Coding(codec=codec))


@pytest.mark.parametrize("codec", PACKED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 2e30])
def test_a_scale_that_is_not_a_magnitude_is_refused(codec, bad):
    coding = Coding(codec=codec)
    data = codecs.encode(normal(9000), coding)
    at = coding.row_bytes(coding.row_elements)  # the second row's
    data[at : at + 4] = torch.tensor([bad]).view(torch.uint8)
    with pytest.raises(RemoteProtocolError, match="a scale is negative, not finite or above"):
        codecs.decode(data, 9000, coding)


@pytest.mark.parametrize(("codec", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_floats_that_are_not_finite_are_refused(codec, dtype, bad):
    data = torch.tensor([1.0, bad, 2.0], dtype=dtype).view(torch.uint8)
    with pytest.raises(RemoteProtocolError, match="not finite"):
        codecs.decode(data, 3, Coding(codec=codec))


def test_topk_refuses_indices_that_repeat_descend_or_leave_their_chunk():
    coding = Coding(codec="topk", density=0.02)
    good = codecs.encode(normal(100), coding)  # two of a chunk of 100
    for first, second, fault in ((5, 5, "ascend"), (9, 3, "ascend"), (3, 100, "exceeds"), (3, 4095, "exceeds")):
        data = good.clone()
        data[8:11] = torch.tensor(list((first | second << 12).to_bytes(3, "little")), dtype=torch.uint8)
        with pytest.raises(RemoteProtocolError, match=fault):
            codecs.decode(data, 100, coding)


@given(st.sampled_from(LOSSY), st.integers(1, 700), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_any_bytes_decode_to_finite_elements_or_are_refused(codec, size, random):
    coding = Coding(codec=codec)
    data = torch.tensor(list(random.randbytes(coding.bytes_of(size))), dtype=torch.uint8)
    try:
        values = codecs.decode(data, size, coding)
    except RemoteProtocolError:
        return
    assert values.shape == (size,)
    assert bool(torch.isfinite(values).all())
