"""What an executor says of a merge, as those who wait for that are told.

    executor ─┬─ UpdateMade ─▶ Outgoing ─▶ everybody who trains
              └─ MergeDone ─▶ Merged ─▶ scheduler

The digest of the base is what the Close named; all others are the executor's, of this server's shard.
"""

from hypha.protocol.bridge import MergeDone, UpdateMade
from hypha.protocol.messages import Merged
from hypha.worker.broadcast import Outgoing


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
