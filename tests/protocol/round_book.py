"""A book of rounds in a few words: leases a, b, c train, s and t serve, one slice of 40 samples."""

from hashlib import sha256

from hypha.protocol.closing import Close, Outcome
from hypha.protocol.manifest import ChainState
from hypha.protocol.messages import Collected, Contribution, Member, Merged, SliceRef
from hypha.protocol.rounds import RoundBook, Terms
from hypha.protocol.slices import SliceTable

A, B, C = (Member(peer_id=p, fence=1, lease_id=f"lease-{p}") for p in "abc")
S, T = (Member(peer_id=p, fence=1, lease_id=f"lease-{p}") for p in "st")
SLICES = [SliceRef(name="s0", samples=40, bytes=1, digest="0" * 64)]
ZERO = "0" * 64


def book(*members, quorum=1, updates=3, table=None, chain=None, servers=(S,), **known):
    made = RoundBook(
        Terms(job_id="job", updates=updates, quorum=quorum, deadline_s=10.0, shards=max(1, len(servers))),
        job_epoch=1,
        chain=chain or ChainState(job_id="job"),
        table=table or SliceTable(SLICES),
        now=0.0,
        sha256=sha256,
        **known,
    )
    for shard, server in enumerate(servers):
        round = chain.round if chain else 0
        held = {"round": round, "digest": ZERO, "momentum_digest": None, "now": 0.0}
        assert made.server_ready(server, b"addr", shard=shard, **held) is None
    for member in members:
        made.lease_added(member)
        assert made.worker_ready(member, round=made.round - 1, digest=made.base_digest) is None
    return made


def contribution(rounds, member, *intervals, loss=1.0):
    return Contribution(
        peer_id=member.peer_id, fence=member.fence, lease_id=member.lease_id, round=rounds.round,
        base_digest=rounds.base_digest, digest=f"{ord(member.peer_id):064x}", bytes=1,
        samples=sum(i.samples for i in intervals), intervals=intervals, loss=loss,
    )  # fmt: skip


def report(rounds, *contributions, server=S, view=None, round=None):
    message = Collected(
        job_id="job", job_epoch=1, round=round or rounds.round, lease_id=server.lease_id, fence=server.fence,
        view=view or rounds.view(0.0).view, contributions=contributions,
    )  # fmt: skip
    return rounds.collected(message, server.peer_id)


def train(rounds, *members, samples=4):
    made = [contribution(rounds, m, rounds.grant(m, request=0, wanted=samples)) for m in members]
    assert report(rounds, *made) == ()
    return made


def merged(close, model="1", shard=0):
    digest = model * 64
    return Merged(
        round=close.round, close=close.close, base_digest=close.requests[shard][1].base_digest, model_digest=digest,
        momentum_digest=digest, record_digest=digest, update_digest=digest,
        model_bytes=1, momentum_bytes=1, record_bytes=1, update_bytes=1,
    )  # fmt: skip


def close_round(rounds, *members, model="1"):
    train(rounds, *members)
    close = rounds.decide(0.0)
    assert isinstance(close, Close)
    outcome = rounds.merged(S, merged(close, model), 0.0)
    assert isinstance(outcome, Outcome)
    return outcome
