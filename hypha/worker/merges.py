"""What an executor is told of a merge, and what it says of it, as those who wait for that are told.

    MergePlan ─▶ Merge ─▶ executor ─┬─ UpdateMade ─▶ Outgoing ─▶ everybody who trains
                                    └─ MergeDone ─▶ Merged ─▶ scheduler

The digest of the base is what the Close named; all others are the executor's, of this server's shard.
"""

from collections.abc import Mapping

from hypha.protocol.bridge import FileRef, Merge, MergeDone, MergeInput, UpdateMade
from hypha.protocol.collect import MergePlan
from hypha.protocol.messages import Merged
from hypha.telemetry import inject
from hypha.worker.broadcast import Outgoing


def merge_of(plan: MergePlan, spooled: Mapping[tuple[str, int, str], FileRef]) -> Merge:
    """Return what the executor is asked for; `spooled` are files by peer id, fence and digest of the contribution."""
    inputs = tuple(
        MergeInput(peer_id=c.peer_id, fence=c.fence, samples=c.samples, file=spooled[c.peer_id, c.fence, c.digest])
        for c in plan.inputs
    )
    return Merge(round=plan.round, close=plan.close, base_digest=plan.base_digest, inputs=inputs, traceparent=inject())


def outgoing_of(made: UpdateMade | MergeDone, base_digest: str) -> Outgoing:
    """Return what is sent to those who train: the same of both."""
    return Outgoing(
        round=made.round,
        close=made.close,
        base_digest=base_digest,
        model_digest=made.model_digest if isinstance(made, UpdateMade) else made.model.digest,
        digest=made.update.digest,
        bytes=made.update.bytes,
    )


def merged_of(done: MergeDone, base_digest: str) -> Merged:
    """Return what the scheduler is told."""
    return Merged(
        round=done.round,
        close=done.close,
        base_digest=base_digest,
        model_digest=done.model.digest,
        momentum_digest=done.momentum.digest,
        record_digest=done.record.digest,
        update_digest=done.update.digest,
        model_bytes=done.model.bytes,
        momentum_bytes=done.momentum.bytes,
        record_bytes=done.record.bytes,
        update_bytes=done.update.bytes,
        update_norm=done.update_norm,
    )
