"""Spans and intervals where they touch: next to one another is not on top of one another."""

import pytest

from hypha.errors import LocalProtocolError
from hypha.protocol.intervals import Spans, intervals_of, overlap
from hypha.protocol.messages import Interval


def interval(start, stop, slice=0, epoch=0):
    return Interval(epoch=epoch, slice=slice, start=start, stop=stop)


def test_intervals_that_touch_share_no_sample():
    assert overlap([interval(4, 8), interval(0, 4)]) is None
    assert overlap([interval(3, 8), interval(0, 4)]) == (interval(0, 4), interval(3, 8))


def test_samples_of_other_slices_and_epochs_are_others():
    assert overlap([interval(0, 4), interval(0, 4, slice=1), interval(0, 4, epoch=1)]) is None


def test_spans_that_touch_become_one_and_are_split_where_they_must_be():
    spans = Spans([(3, 5), (7, 8)])
    spans.add(5, 7)
    assert (list(spans), spans.samples) == ([(3, 8)], 5)
    spans.remove(4, 5)
    assert intervals_of(2, [(1, spans)]) == (interval(3, 4, 1, 2), interval(5, 8, 1, 2))
    with pytest.raises(LocalProtocolError, match="cannot be added"):
        spans.add(7, 9)
    with pytest.raises(LocalProtocolError, match="cannot be removed"):
        spans.remove(4, 6)


def test_what_is_within_is_cut_at_both_ends():
    spans = Spans([(0, 2), (4, 8)])
    assert spans.within(2, 4) == []
    assert spans.within(1, 6) == [(1, 2), (4, 6)]
    assert (spans.covers(4, 8), spans.covers(3, 5), spans.covers(7, 9)) == (True, False, False)
