"""Matching offers to asks: as many as possible, the best of them, and nobody placed is displaced."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypha.errors import LocalProtocolError
from hypha.protocol.auction_matching import Matching

WISHES = st.lists(st.sampled_from([(0,), (1,), (0, 1), (1, 0), (2, 0), (0, 1, 2)]), max_size=6)
PLACES = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))


def can_all_be_placed(wishes, places):
    return any(
        all(chosen.count(ask) <= places[ask] for ask in range(len(places))) for chosen in itertools.product(*wishes)
    )


def test_two_trainers_and_an_aggregator_come_from_three_equal_workers():
    matching = Matching([2, 1])
    assert all(matching.add(name, (0, 1)) for name in "abc")
    assert matching.is_full
    assert matching.placed() == {"a": 0, "b": 0, "c": 1}
    assert not matching.add("d", (0, 1))


def test_an_offer_moves_over_for_one_that_has_no_choice():
    matching = Matching([1, 1])
    assert matching.add("both", (0, 1))
    assert matching.add("only", (0,))
    assert matching.placed() == {"only": 0, "both": 1}
    assert matching.filled() == (1, 1)
    with pytest.raises(LocalProtocolError):
        matching.add("only", (0,))


def test_widening_keeps_who_is_placed():
    matching = Matching([0, 1])
    assert not matching.add("a", (0,))
    assert matching.add("b", (0, 1))
    matching.widen([2, 1])
    assert matching.add("a", (0,))
    assert matching.placed() == {"a": 0, "b": 1}


@given(WISHES, PLACES)
def test_greedy_placing_keeps_exactly_the_offers_that_brute_force_would(wishes, places):
    matching, kept = Matching(places), []
    for number, wish in enumerate(wishes):
        possible = can_all_be_placed([wishes[each] for each in kept] + [wish], places)
        assert matching.add(str(number), wish) == possible
        if possible:
            kept.append(number)
    placed = matching.placed()
    assert set(placed) == {str(number) for number in kept}
    assert all(ask in wishes[int(offer)] for offer, ask in placed.items())
    assert all(have <= room for have, room in zip(matching.filled(), places, strict=True))
