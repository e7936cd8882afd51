"""Fences: strictly increasing for ever, and never ahead of what is on disk."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypha.errors import LocalProtocolError
from hypha.protocol.fence import FENCE_BLOCK, FENCE_LOW_WATER, FENCE_MAX, Fences, MustReserve


def test_a_new_identity_reserves_before_its_first_fence():
    fences = Fences(0)
    assert fences.take() == MustReserve(FENCE_BLOCK)
    fences.reserved(FENCE_BLOCK)
    assert [fences.take() for _ in range(FENCE_BLOCK)] == list(range(1, FENCE_BLOCK + 1))
    assert fences.take() == MustReserve(2 * FENCE_BLOCK)


def test_the_next_block_is_wished_for_while_some_are_left():
    fences = Fences(0)
    fences.reserved(FENCE_BLOCK)
    while fences.wish() is None:
        fences.take()
    assert fences.wish() == MustReserve(2 * FENCE_BLOCK)
    assert fences.take() == FENCE_BLOCK - FENCE_LOW_WATER + 2
    fences.reserved(2 * FENCE_BLOCK)
    fences.reserved(2 * FENCE_BLOCK)
    assert fences.wish() is None


def test_more_than_was_asked_for_or_impossible_is_refused():
    fences = Fences(0)
    with pytest.raises(LocalProtocolError, match="asked for"):
        fences.reserved(FENCE_BLOCK + 1)
    with pytest.raises(LocalProtocolError):
        Fences(-1)
    with pytest.raises(LocalProtocolError, match="new identity"):
        Fences(FENCE_MAX).take()


@given(st.lists(st.sampled_from(["take", "write", "wish", "crash"]), max_size=200), st.integers(1, 40))
def test_fences_rise_across_crashes_and_never_exceed_the_disk(steps, takes):
    disk, last = 0, 0
    fences = Fences(disk)
    for step in steps:
        if step == "crash":
            fences = Fences(disk)
        elif step == "write" and isinstance(answer := fences.take(), MustReserve):
            disk = answer.upto
            fences.reserved(disk)
        elif step == "wish" and (wish := fences.wish()) is not None:
            disk = wish.upto
        else:
            for _ in range(takes):
                fence = fences.take()
                if isinstance(fence, MustReserve):
                    break
                assert last < fence <= disk
                last = fence
    assert last <= disk


def test_the_last_block_ends_at_the_last_fence():
    assert Fences(FENCE_MAX - FENCE_BLOCK).take() == MustReserve(FENCE_MAX)
