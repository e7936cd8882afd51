"""What must hold of a cluster at every instant (L5, L6), and what it must reach once the network heals (L7)."""

from collections import Counter

from hypha.protocol.manifest import RoundCommitted, from_bytes, replay
from hypha.protocol.tally import Exclude
from tests.protocol.round_cluster import SLICES, TOTAL, digest_of, model_after

# A fair turn of everybody takes at most one deadline; a dozen must be enough for two rounds after any history.
FAIR_TURNS_MAX = 12


def check_steps(cluster):
    """L5: each outer step has one committed successor, made from the contributions that its manifest names."""
    rounds = [entry for entry in map(from_bytes, cluster.entries) if isinstance(entry, RoundCommitted)]
    assert [entry.merged.round for entry in rounds] == list(range(1, len(rounds) + 1))
    model = digest_of("model 0")
    for entry in rounds:
        assert entry.merged.base_digest == model
        model = model_after(model, entry.contributions)
        assert entry.merged.model_digest == model


def check_samples(cluster):
    """L6: each sample is in at most one committed contribution per epoch, and in exactly one by its end."""
    rounds = [entry for entry in map(from_bytes, cluster.entries) if isinstance(entry, RoundCommitted)]
    intervals = [i for entry in rounds for c in entry.contributions for i in c.intervals]
    uses = Counter((i.epoch, i.slice, at) for i in intervals for at in range(i.start, i.stop))
    assert all(count == 1 for count in uses.values())
    per_epoch = Counter(epoch for epoch, _, _ in uses)
    assert all(per_epoch[epoch] == TOTAL for epoch in range(max(per_epoch, default=0)))


def check_named(cluster):
    """An excluded contribution is never named in a Close again; nothing is named that is not assigned to its lease."""
    excluded = {(e.peer_id, e.fence, e.round) for e in cluster.journal if isinstance(e, Exclude)}
    pending = cluster.book.pending
    if pending is not None:
        named = {(peer, fence, pending.round) for peer, fence, _ in pending.requests[0][1].contributors}
        assert not named & excluded


def check_progress(cluster):
    """L7: nothing is lost any more, so two more rounds must commit within a bounded time."""
    chain = [(digest_of(data), from_bytes(data)) for data in cluster.entries]
    assert replay("job", SLICES, chain) == cluster.chain.state
    wanted = cluster.book.committed_round + 2
    for at in reversed(cluster.lossy()):
        cluster.flight.pop(at)
    cluster.zombies.clear()
    for _ in range(FAIR_TURNS_MAX):
        cluster.heal()
        if cluster.book.committed_round >= wanted:
            return
    raise AssertionError(f"no progress: {cluster.book.decide(cluster.now)} {cluster.book!r}")
