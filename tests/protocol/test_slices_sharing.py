"""A slice that several members read, when the one it belonged to has gone."""

from hypha.protocol.messages import Member, SliceRef
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
