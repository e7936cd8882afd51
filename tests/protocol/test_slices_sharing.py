"""A slice that several have read, or are said to have used: when its reader has gone, and when it is named twice."""

import pytest

from hypha.errors import LocalProtocolError
from hypha.protocol.messages import Interval, Member, SliceRef
from hypha.protocol.slices import SliceTable

A, B, C = (Member(peer_id=p, fence=1, lease_id=f"lease-{p}") for p in "abc")


def test_a_slice_left_by_its_reader_and_read_to_its_end_by_another_is_granted_to_nobody():
    table = SliceTable([SliceRef(name="s0", samples=12, bytes=1, digest="0" * 64)])
    table.grant(A, round=1, request=0, wanted=4)
    table.grant(B, round=1, request=0, wanted=4)
    table.forget(A)
    rest = table.grant(B, round=1, request=1, wanted=12)
    assert (rest.start, rest.stop) == (8, 12)
    assert table.grant(C, round=1, request=0, wanted=4) is None


def test_a_whole_slice_that_is_said_to_be_used_twice_is_refused_in_words():
    whole = Interval(epoch=0, slice=0, start=0, stop=12)
    slices = [SliceRef(name=name, samples=12, bytes=1, digest="0" * 64) for name in ("s0", "s1")]
    with pytest.raises(LocalProtocolError, match="is used twice or not in the dataset"):
        SliceTable.restore(slices, epoch=0, used=(whole, whole))
