"""The book of rounds after a restart: where the chain ends, with the leases that answer and what was excluded."""

from hypha.protocol.manifest import ChainState
from hypha.protocol.messages import Interval
from hypha.protocol.slices import Grant, SliceTable
from hypha.protocol.tally import Exclude
from tests.protocol.round_book import SLICES, ZERO, A, B, C, book, contribution, report


def restarted(awaited, excluded=()):
    grants = [Grant(member=m, round=2, request=0, interval=Interval(epoch=0, slice=0, start=s, stop=s + 4))
              for m, s in ((A, 4), (B, 8), (C, 12))]  # fmt: skip
    used = [Interval(epoch=0, slice=0, start=0, stop=4)]
    table = SliceTable.restore(SLICES, epoch=0, used=used, grants=grants, committed=1)
    chain = ChainState(job_id="job", round=1, models=(ZERO,), model_digest=ZERO, used=tuple(used), samples=4)
    return book(chain=chain, table=table, awaited=awaited, excluded=excluded)


def test_a_restart_goes_on_where_the_chain_ends_with_the_leases_that_answer():
    rounds = restarted([A, B])
    assert (rounds.round, rounds.samples) == (2, 4)
    assert [e.member for e in rounds.orphans()] == [C]
    before = rounds.view(0.0).view
    rounds.lease_adopted(A)
    assert (rounds.view(0.0).members, rounds.view(0.0).view) == ((A,), before + 1)
    assert [e.member for e in rounds.lease_died(B)] == [B]
    assert rounds.view(0.0).members == (A,)
    assert rounds.grant(A, request=0, wanted=9) == Interval(epoch=0, slice=0, start=4, stop=8)


def test_what_was_excluded_before_a_restart_stays_excluded():
    exclude = Exclude(peer_id="a", fence=1, lease_id="lease-a", round=2, reason="its lease is gone")
    rounds = restarted([A, B, C], [exclude])
    rounds.lease_adopted(A)
    late = contribution(rounds, A, Interval(epoch=0, slice=0, start=4, stop=8))
    assert report(rounds, late) == ()
    assert rounds.accepted() == {}
    assert rounds.table.held(A, 2) == ()


def test_a_finished_job_stays_finished_after_a_restart():
    rounds = book(chain=ChainState(job_id="job", round=3, models=(ZERO,), model_digest=ZERO), servers=())
    assert rounds.view(0.0).final
