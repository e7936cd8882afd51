"""What a worker and its executor say to each other over the job's socket (own-executors.md): metadata only, as JSON.

    executor                                worker
      POST /resources/fetch    Fetch…    ─▶  moves a file into the work directory   ─▶  …Fetched
      POST /resources/send     SendUpdate ─▶ streams it to the parameter server     ─▶  Accepted | Refused | Rebase
      POST /resources/receive             ◀─ Server-Sent Events, one Event each
      POST /status/send        reports   ─▶  answered at once                       ─▶  Instruction
      POST /telemetry?kind=…   OTLP      ─▶  exported by the worker

Every path is relative to the job's work directory and confined to it. Files named by a Fetched or an Event belong to
the executor from then on: it deletes what it no longer needs. JSON objects carry their type in "type".

A training executor:   FetchBase → BaseReady → [FetchSamples, inner steps, TrainProgress …, SendUpdate, UpdateArrived] …
An aggregate executor: StateReady → [Prepare, Screen → Screened …, Merge → UpdateMade, MergeDone, RoundCommitted] …
"""

from typing import Annotated

from msgspec import Meta, Struct

from hypha.protocol.messages import INTERVALS_PER_CONTRIBUTION_MAX, Count, Digest, Interval, Reason
from hypha.protocol.shards import SHARDS_MAX

RelativePath = Annotated[str, Meta(min_length=1, max_length=1024)]


class BridgeMessage(Struct, frozen=True, kw_only=True, tag=True):
    """Base of what crosses the bridge; `traceparent` continues the round's trace in the other process."""

    traceparent: Annotated[str, Meta(max_length=64)] | None = None


class FileRef(Struct, frozen=True, kw_only=True):
    """A file in the work directory with its size and digest (hypha.protocol.tensorfile)."""

    path: RelativePath
    bytes: Count
    digest: Digest


# One file for each shard of the model, in their order: one file where one parameter server has it all.
Parts = Annotated[tuple[FileRef, ...], Meta(min_length=1, max_length=SHARDS_MAX)]


class BridgeError(BridgeMessage, frozen=True, kw_only=True):
    """The answer no (HTTP 4xx/5xx). `retry`: the same request may succeed later."""

    reason: Reason
    retry: bool = False


# --- fetch -----------------------------------------------------------------------------------------------------------


class FetchSource(BridgeMessage, frozen=True, kw_only=True):
    """The directory of the job's model or preprocessor repository: `what` is "model" or "preprocessor"."""

    what: Annotated[str, Meta(pattern="^(model|preprocessor)$")]


class SourceFetched(BridgeMessage, frozen=True, kw_only=True):
    """An absolute directory on this machine (a cache shared by jobs, read-only) that from_pretrained loads."""

    directory: str


class FetchBase(BridgeMessage, frozen=True, kw_only=True):
    """The base model of the newest view; waits until there is a view and the file is here, digest verified."""


class BaseFetched(BridgeMessage, frozen=True, kw_only=True):
    """`files` are model `round - 1`, the base of round `round`, shard by shard; `digest` is the whole's."""

    round: Count
    digest: Digest
    files: Parts


class FetchResume(BridgeMessage, frozen=True, kw_only=True):
    """Aggregate only: the files of the job's ResumePoint, all of this server's shard."""


class ResumeFetched(BridgeMessage, frozen=True, kw_only=True):
    """Model and momentum after `round` outer steps, then records to replay in order."""

    round: Count
    model: FileRef
    momentum: FileRef
    records: tuple[FileRef, ...]


class FetchSamples(BridgeMessage, frozen=True, kw_only=True):
    """The next samples of round `round`; `wanted` is a wish. `request` counts up from 0 in each round."""

    round: Count
    request: Count
    wanted: Annotated[int, Meta(ge=1)]


class SamplesFetched(BridgeMessage, frozen=True, kw_only=True):
    """Rows [start, stop) of the SafeTensors file at `path` (verified, cached by the worker: never delete it)."""

    interval: Interval
    path: RelativePath


class NoSamples(BridgeMessage, frozen=True, kw_only=True):
    """No samples are left in this round: contribute what you have, even nothing."""

    round: Count


class FetchHeldOut(BridgeMessage, frozen=True, kw_only=True):
    """All held-out slices of the job's dataset."""


class HeldOutFetched(BridgeMessage, frozen=True, kw_only=True):
    """SafeTensors files, verified and cached by the worker."""

    paths: tuple[RelativePath, ...]


class FetchOthers(BridgeMessage, frozen=True, kw_only=True):
    """Aggregate only: model `round` as the other shards have it; `digest` is that of this one's."""

    round: Count
    digest: Digest


class OthersFetched(BridgeMessage, frozen=True, kw_only=True):
    """The other shards' files, in their order: with this one's they are the whole model."""

    files: tuple[FileRef, ...]


Fetch = FetchSource | FetchBase | FetchResume | FetchSamples | FetchHeldOut | FetchOthers
Fetched = SourceFetched | BaseFetched | ResumeFetched | SamplesFetched | NoSamples | HeldOutFetched | OthersFetched


# --- send ------------------------------------------------------------------------------------------------------------


class SendUpdate(BridgeMessage, frozen=True, kw_only=True):
    """A pseudo-gradient (θ_start − θ_end, canonical SafeTensors fp32) of round `round`. samples may be 0.

    One file for each parameter server, with the tensors of its shard. The call returns when all of them have answered;
    the worker retries broken transfers itself. The files stay the executor's: keep them until the round is committed,
    they may have to be sent again.
    """

    round: Count
    base_digest: Digest
    files: Parts
    samples: Count
    intervals: Annotated[tuple[Interval, ...], Meta(max_length=INTERVALS_PER_CONTRIBUTION_MAX)]
    loss: float = 0.0


class SendAccepted(BridgeMessage, frozen=True, kw_only=True):
    """The parameter server holds it."""


class SendRefused(BridgeMessage, frozen=True, kw_only=True):
    """Not taken, and why; sending the same again would not help."""

    reason: Reason


class SendRebase(BridgeMessage, frozen=True, kw_only=True):
    """The open round has another base: go back to the θ kept for it, or FetchBase."""

    round: Count
    base_digest: Digest


Send = SendUpdate
Sent = SendAccepted | SendRefused | SendRebase


# --- events ----------------------------------------------------------------------------------------------------------


class ViewChanged(BridgeMessage, frozen=True, kw_only=True):
    """The newest view. A training executor whose base is not (round, base_digest) rebases at once.

    Views are numbered anew in each job epoch: of two, the one with the higher (job_epoch, view) is newer.
    """

    view: Count
    round: Count
    base_digest: Digest
    member: bool
    committed_round: Count
    final: bool = False
    job_epoch: Count = 0


class UpdateArrived(BridgeMessage, frozen=True, kw_only=True):
    """Outer step `round`, to be subtracted from its base, shard by shard; shard k must then have `parts[k]`.

    `base_digest` and `model_digest` are the whole's.
    """

    round: Count
    close: Count
    base_digest: Digest
    model_digest: Digest
    files: Parts
    parts: Annotated[tuple[Digest, ...], Meta(min_length=1, max_length=SHARDS_MAX)]


class RoundCommitted(BridgeMessage, frozen=True, kw_only=True):
    """Round `round` (model `digest`; for an aggregate executor its shard's) is durable: what could undo it may go."""

    round: Count
    digest: Digest


class Screen(BridgeMessage, frozen=True, kw_only=True):
    """Aggregate: check names, shapes, dtypes and finiteness of an update; answer with Screened."""

    ticket: Count
    round: Count
    file: FileRef


class MergeInput(Struct, frozen=True, kw_only=True):
    """One contribution to merge; the list comes in (peer id, fence) order."""

    peer_id: str
    fence: Count
    samples: Count
    file: FileRef


class Prepare(BridgeMessage, frozen=True, kw_only=True):
    """Aggregate: these are what round `round` will be closed with, unless something happens; some still arrive.

    Of those the file is at its path with `.part` behind it, and grows. Nothing is answered: a Merge with the same
    inputs may be answered sooner. A later Prepare supersedes this one, and so does any Merge.
    """

    round: Count
    base_digest: Digest
    inputs: tuple[MergeInput, ...]


class Merge(BridgeMessage, frozen=True, kw_only=True):
    """Aggregate: close round `round` on its base with these; always from the state before the round."""

    round: Count
    close: Count
    base_digest: Digest
    inputs: tuple[MergeInput, ...]


class Stop(BridgeMessage, frozen=True, kw_only=True):
    """The job is over (finished or cancelled): exit 0."""

    reason: Reason


Event = ViewChanged | UpdateArrived | RoundCommitted | Screen | Prepare | Merge | Stop


# --- status ----------------------------------------------------------------------------------------------------------


class TrainProgress(BridgeMessage, frozen=True, kw_only=True):
    """Totals since the start of the round; `batch_s` is the mean of recent batches. Sent after every batch."""

    round: Count
    batches: Count
    samples: Count
    batch_size: Count
    batch_s: Annotated[float, Meta(ge=0)]
    loss: float


class BaseReady(BridgeMessage, frozen=True, kw_only=True):
    """The executor stands on the base of round `round`, which has this digest."""

    round: Count
    digest: Digest


class StateReady(BridgeMessage, frozen=True, kw_only=True):
    """Aggregate: model and momentum after `round` outer steps exist and can be served."""

    round: Count
    model: FileRef
    momentum: FileRef


class Screened(BridgeMessage, frozen=True, kw_only=True):
    """Answer to Screen; `refusal` is None when the update is sound."""

    ticket: Count
    refusal: Reason | None = None


class UpdateMade(BridgeMessage, frozen=True, kw_only=True):
    """First part of the answer to Merge: what is subtracted, and the digest of the model that it leads to.

    It may be sent to those who train; MergeDone follows, with the same update. Answered when they have it, or after a
    few seconds: what is left to do then disturbs nobody.
    """

    round: Count
    close: Count
    model_digest: Digest
    update: FileRef


class MergeDone(BridgeMessage, frozen=True, kw_only=True):
    """Answer to Merge: the new model and momentum, the merged pseudo-gradient, and what was subtracted."""

    round: Count
    close: Count
    model: FileRef
    momentum: FileRef
    record: FileRef
    update: FileRef
    update_norm: float = 0.0


class MergeFailed(BridgeMessage, frozen=True, kw_only=True):
    """Answer to Merge when it cannot be done (non-finite result, base unknown)."""

    round: Count
    close: Count
    reason: Reason


class EvaluationDone(BridgeMessage, frozen=True, kw_only=True):
    """Held-out loss, nats per predicted token, of model `round`."""

    round: Count
    digest: Digest
    loss: float
    samples: Count


class ExecutorFailed(BridgeMessage, frozen=True, kw_only=True):
    """The executor gives up; it exits with a non-zero code right after."""

    reason: Reason


Report = (
    TrainProgress
    | BaseReady
    | StateReady
    | Screened
    | UpdateMade
    | MergeDone
    | MergeFailed
    | EvaluationDone
    | ExecutorFailed
)


class GoOn(BridgeMessage, frozen=True, kw_only=True):
    """Noted; nothing to do differently."""


class SyncAt(BridgeMessage, frozen=True, kw_only=True):
    """Contribute once `batches` batches of round `round` are done.

    `batch_size`: samples in each batch from now on, rounds to come included; None: as many as before.
    """

    round: Count
    batches: Count
    batch_size: Annotated[int, Meta(ge=1)] | None = None


class Finish(BridgeMessage, frozen=True, kw_only=True):
    """Exit 0 now."""


Instruction = GoOn | SyncAt | Finish
