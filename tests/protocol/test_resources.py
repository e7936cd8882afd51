"""Resources: exact sums, honest comparisons, no impossible amounts."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypha.errors import LocalProtocolError
from hypha.protocol.resources import KINDS, NOTHING, Resources, ResourceWeights

AMOUNTS = st.integers(0, 10**9).map(lambda millionths: millionths / 1e6)
RESOURCES = st.builds(Resources, cpu=AMOUNTS, memory=AMOUNTS, storage=AMOUNTS, gpu=AMOUNTS)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, 1e10])
@pytest.mark.parametrize("kind", KINDS)
def test_impossible_amounts_are_refused_from_the_wire_and_from_code(kind, bad):
    with pytest.raises(ValueError, match=kind):
        Resources(**{kind: bad})
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({kind: bad}, Resources)


def test_ten_tenths_of_a_gpu_fill_one_gpu_exactly():
    tenth, left = Resources(gpu=0.1), Resources(gpu=1.0)
    for _ in range(10):
        assert tenth.fits_in(left)
        left = left.minus(tenth)
    assert left == NOTHING
    assert not tenth.fits_in(left)


def test_what_is_lacking_is_named():
    need = Resources(cpu=4, memory=8, gpu=1)
    assert need.lacking_in(Resources(cpu=4, memory=4)) == ("memory", "gpu")
    assert not need.fits_in(Resources(cpu=4, memory=4, gpu=1))
    assert need.fits_in(need)
    with pytest.raises(LocalProtocolError, match="too little memory, gpu"):
        Resources(cpu=4, memory=4).minus(need)


def test_zero_is_recognised_and_dust_counts_as_zero():
    assert NOTHING.is_zero
    assert Resources(storage=1e-7).is_zero
    assert not Resources(storage=1e-6).is_zero
    assert str(NOTHING) == "nothing"
    assert str(Resources(cpu=2, gpu=0.5)) == "cpu 2, gpu 0.5"


def test_units_weigh_each_kind():
    weights = ResourceWeights(cpu=1, memory=2, storage=3, gpu=4)
    assert Resources(cpu=1, memory=10, storage=100, gpu=1000).units(weights) == 1 + 20 + 300 + 4000
    assert NOTHING.units() == 0


@given(RESOURCES, RESOURCES)
def test_taking_away_what_was_added_gives_back_what_there_was(left, right):
    both = left.plus(right)
    assert both.minus(right) == left
    assert left.fits_in(both)
    assert right.fits_in(both)
    assert both.units() == pytest.approx(left.units() + right.units())


@given(RESOURCES, RESOURCES)
def test_the_join_is_the_least_in_which_both_fit(left, right):
    joined = left.join(right)
    assert left.fits_in(joined)
    assert right.fits_in(joined)
    assert all(getattr(joined, kind) in (getattr(left, kind), getattr(right, kind)) for kind in KINDS)
