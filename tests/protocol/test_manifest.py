"""The chain of commits accepts exactly what can follow, and says what is wrong with anything else."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from hypha.errors import LocalProtocolError, RemoteProtocolError
from hypha.protocol import manifest
from hypha.protocol.manifest import Chain, Found, from_bytes, judge_existing, replay, to_bytes
from hypha.protocol.messages import Contribution, Interval, Merged, SliceRef

SLICES = [SliceRef(name=f"s{n}", samples=4, bytes=1, digest="0" * 64) for n in range(2)]


def digest_of(data):
    return sha256(data).hexdigest()


def model(round):
    return digest_of(b"model %d" % round)


def merged(round, close=1):
    return Merged(
        round=round,
        close=close,
        base_digest=model(round - 1),
        model_digest=model(round),
        momentum_digest=digest_of(b"momentum %d" % round),
        record_digest=digest_of(b"record %d" % round),
        update_digest=digest_of(b"update %d" % round),
        model_bytes=1,
        momentum_bytes=1,
        record_bytes=1,
        update_bytes=1,
    )


def contribution(peer, round, *pieces, fence=1):
    intervals = tuple(Interval(epoch=e, slice=n, start=a, stop=b) for e, n, a, b in pieces)
    return Contribution(
        peer_id=peer,
        fence=fence,
        lease_id=f"lease-{peer}",
        round=round,
        base_digest=model(round - 1),
        digest=digest_of(f"{peer} {round}".encode()),
        bytes=1,
        samples=sum(i.samples for i in intervals),
        intervals=intervals,
    )


def add(chain, entry):
    chain.append(digest_of(to_bytes(entry)), entry)
    return entry


def begun():
    chain = Chain("job", SLICES)
    add(chain, chain.epoch_entry(scheduler="sched", nonce="n0"))
    return chain


def commit(chain, round, *contributions):
    entry = chain.round_entry(merged(round), contributions, job_epoch=chain.state.job_epoch, nonce=f"r{round}")
    return add(chain, entry)


def test_a_chain_says_where_the_job_is():
    chain = begun()
    commit(chain, 1, contribution("b", 1, (0, 0, 0, 4)), contribution("a", 1, (0, 1, 0, 1)))
    state = chain.state
    assert (state.number, state.job_epoch, state.scheduler, state.round) == (2, 1, "sched", 1)
    assert (state.model_digest, state.records) == (model(1), (merged(1).record_digest,))
    assert (state.epoch, state.samples) == (0, 5)
    assert [(i.slice, i.start, i.stop) for i in state.used] == [(0, 0, 4), (1, 0, 1)]


def test_contributions_are_written_in_peer_and_fence_order():
    entry = begun().round_entry(
        merged(1),
        [contribution("b", 1), contribution("a", 1, (0, 0, 0, 1), fence=2), contribution("a", 1)],
        job_epoch=1,
        nonce="x",
    )
    assert [(c.peer_id, c.fence) for c in entry.contributions] == [("a", 1), ("a", 2), ("b", 1)]


def test_a_new_pass_over_the_data_begins_when_every_sample_is_used():
    chain = begun()
    commit(chain, 1, contribution("a", 1, (0, 0, 0, 4), (0, 1, 0, 4)))
    commit(chain, 2, contribution("a", 2, (1, 1, 2, 3)))
    state = chain.state
    assert (state.epoch, state.samples) == (1, 9)
    assert [(i.epoch, i.slice, i.start, i.stop) for i in state.used] == [(1, 1, 2, 3)]


def test_replaying_the_bytes_gives_the_same_state():
    chain = begun()
    lines = [chain.epoch_entry(scheduler="other", nonce="n1")]
    add(chain, lines[0])
    lines.append(commit(chain, 1, contribution("a", 1, (0, 0, 0, 4))))
    first = Chain("job", SLICES).epoch_entry(scheduler="sched", nonce="n0")
    data = [to_bytes(entry) for entry in (first, *lines)]
    assert replay("job", SLICES, [(digest_of(d), from_bytes(d)) for d in data]) == chain.state


ONE = contribution("a", 1, (0, 0, 0, 2))
TWICE = (ONE, contribution("b", 1, (0, 0, 1, 3)))


def round_entry(chain, *contributions, step=1, **changes):
    entry = chain.round_entry(merged(step), contributions, job_epoch=1, nonce="x")
    return replace(entry, **changes)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda c: round_entry(c, ONE, job_id="other"), "is of job other, not job"),
        (lambda c: round_entry(c, ONE, number=2), "the chain has a gap"),
        (lambda c: round_entry(c, ONE, number=0), "the chain has a gap"),
        (lambda c: round_entry(c, ONE, previous="f" * 64), "names predecessor"),
        (lambda c: round_entry(c, ONE, previous=None), "names predecessor"),
        (lambda c: round_entry(c, ONE, job_epoch=2), "is of job epoch 2, but it is 1's turn"),
        (lambda c: round_entry(c, ONE, job_epoch=0), "is of job epoch 0, but it is 1's turn"),
        (lambda c: round_entry(c, contribution("a", 2, (0, 0, 0, 2)), step=2), "commits round 2 after round 0"),
        (lambda c: round_entry(c, *TWICE), "uses samples of slice 0 twice"),
        (lambda c: round_entry(c, contribution("a", 1, (1, 0, 0, 2))), "which epoch 0 of this dataset does not have"),
        (lambda c: round_entry(c, contribution("a", 1, (0, 0, 0, 5))), "does not have"),
        (lambda c: round_entry(c, contribution("a", 1, (0, 2, 0, 1))), "does not have"),
        (lambda c: round_entry(c, contribution("a", 1)), "says 0 samples"),
        (lambda c: round_entry(c, ONE, samples=3), "says 3 samples"),
        (lambda c: round_entry(c, contribution("a", 2, (0, 0, 0, 2))), "contradicts itself"),
        (lambda c: round_entry(c, replace(ONE, samples=3), samples=3), "contradicts itself"),
        (lambda c: round_entry(c, ONE, contribution("a", 1, (0, 1, 0, 1))), "names one lease twice"),
        (lambda c: replace(c.epoch_entry(scheduler="x", nonce="y"), job_epoch=1), "but 1 has begun"),
    ],
)
def test_what_cannot_follow_is_refused_with_the_reason_and_changes_nothing(make, reason):
    chain = begun()
    before = chain.state
    with pytest.raises(RemoteProtocolError, match=reason):
        add(chain, make(chain))
    assert chain.state == before


def test_a_round_must_be_made_from_the_committed_model():
    chain = begun()
    commit(chain, 1, ONE)
    entry = round_entry(chain, contribution("a", 2, (0, 1, 0, 1)), step=2)
    with pytest.raises(RemoteProtocolError, match="was not made from model 1"):
        add(chain, replace(entry, merged=replace(entry.merged, base_digest="f" * 64)))


def test_no_round_is_committed_before_a_job_epoch_has_started():
    chain = Chain("job", SLICES)
    with pytest.raises(RemoteProtocolError, match="turn"):
        add(chain, chain.round_entry(merged(1), [ONE], job_epoch=0, nonce="x"))


def test_a_sample_used_in_an_earlier_round_is_refused_in_a_later():
    chain = begun()
    commit(chain, 1, ONE)
    with pytest.raises(RemoteProtocolError, match="twice"):
        commit(chain, 2, contribution("a", 2, (0, 0, 1, 3)))


def test_whoever_loses_the_race_for_an_entry_knows_what_to_do():
    chain = begun()
    mine = chain.round_entry(merged(1), [ONE], job_epoch=1, nonce="mine")
    assert judge_existing(mine, from_bytes(to_bytes(mine))) is Found.OURS
    assert judge_existing(mine, replace(mine, nonce="theirs")) is Found.RELOAD
    assert judge_existing(mine, replace(mine, samples=mine.samples + 1)) is Found.RELOAD
    assert judge_existing(mine, chain.epoch_entry(scheduler="standby", nonce="s")) is Found.DEPOSED


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"not json", b'{"type":"Other"}', b"\xff"],
)
def test_what_is_no_entry_is_refused(data):
    with pytest.raises(RemoteProtocolError, match="wrong shape"):
        from_bytes(data)


def test_an_entry_may_be_as_large_as_the_bound_and_no_larger(monkeypatch):
    entry = begun().epoch_entry(scheduler="s", nonce="n")
    data = to_bytes(entry)
    monkeypatch.setattr(manifest, "ENTRY_BYTES_MAX", len(data))
    assert from_bytes(to_bytes(entry)) == entry
    monkeypatch.setattr(manifest, "ENTRY_BYTES_MAX", len(data) - 1)
    with pytest.raises(RemoteProtocolError, match="exceeds"):
        from_bytes(data)
    with pytest.raises(LocalProtocolError, match="exceeds"):
        to_bytes(entry)


def test_the_same_entry_in_other_bytes_is_refused():
    data = to_bytes(begun().epoch_entry(scheduler="s", nonce="n"))
    with pytest.raises(RemoteProtocolError, match="canonical"):
        from_bytes(data.replace(b",", b", "))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_json_cannot_hold_is_never_written(bad):
    entry = begun().round_entry(merged(1), [replace(ONE, loss=bad)], job_epoch=1, nonce="x")
    with pytest.raises(LocalProtocolError, match="not finite"):
        to_bytes(entry)


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(min_size=1, max_size=20))
def test_entries_survive_their_bytes(loss, nonce):
    entry = begun().round_entry(merged(1), [replace(ONE, loss=loss)], job_epoch=1, nonce=nonce)
    assert from_bytes(to_bytes(entry)) == entry
