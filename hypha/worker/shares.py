"""How the parameter servers of one job share its model: what is pushed to a shard, and the rest for whoever evaluates.

PushUpdate ─▶ misfit: another shard, another number of them, parts that are not the contribution's
FetchOthers(r) ─▶ wait for the view that opens round r+1 on it ─▶ FetchModel at the other shards' servers ─▶ files
                     └─ a later round is open: model r is gone, and not evaluated
"""

from functools import partial
from hashlib import sha256

import trio

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError
from hypha.protocol.bridge import FetchOthers, FileRef, OthersFetched
from hypha.protocol.job import JobSpec
from hypha.protocol.messages import FetchModel, PushUpdate, RoundView
from hypha.protocol.shards import kind_of, part_of, whole_digest
from hypha.protocol.views import server_of
from hypha.worker.session import Session
from hypha.worker.together import together

# An evaluation that waits for a view is asked so often whether it is still wanted.
VIEW_WAIT_S = 5.0


def misfit(job: JobSpec, header: PushUpdate) -> str | None:
    """Say why a push does not fit how the job's model is shared; None if it does."""
    whole, count = header.contribution, max(1, len(header.parts))
    if (count, header.shard) != (job.shards, job.shard):
        return f"shard {header.shard} of {count} was pushed to shard {job.shard} of {job.shards}"
    if not header.parts:
        return None
    digest = whole_digest([part.digest for part in header.parts], sha256)
    if (digest, sum(part.bytes for part in header.parts)) != (whole.digest, whole.bytes):
        return "the parts of the update are not those of the contribution"
    return None


def base_of(view: RoundView, shard: int) -> FetchModel | None:
    """Return the question for a shard's part of a view's base; None where there is no such part."""
    digest = part_of(view.base_digest, view.parts, shard)
    if digest is None:
        return None
    return FetchModel(
        job_id=view.job_id,
        job_epoch=view.job_epoch,
        part=kind_of("model", shard),
        round=view.round - 1,
        digest=digest,
    )


async def fetch_others(session: Session, request: FetchOthers) -> OthersFetched:
    """Bring the other shards of a model here. Raises Refused: it is gone, or (code "retry") not to be had now."""
    job = session.context.job
    if job.shards == 1:
        return OthersFetched(files=())
    with trio.move_on_after(VIEW_WAIT_S) as patience:
        await session.until(lambda: session.view is not None and session.view.round > request.round)
    if patience.cancelled_caught:
        raise Refused(f"round {request.round} is not closed yet", "retry")
    view = session.view
    if (
        view is None
        or view.round != request.round + 1
        or part_of(view.base_digest, view.parts, job.shard) != request.digest
    ):
        raise Refused(f"model {request.round} is not the open round's base any more")
    others = [shard for shard in range(job.shards) if shard != job.shard]
    return OthersFetched(files=tuple(await together([partial(_fetch, session, view, shard) for shard in others])))


async def _fetch(session: Session, view: RoundView, shard: int) -> FileRef:
    context, server, wanted = session.context, server_of(view, shard), base_of(view, shard)
    path = context.directory / f"others-{view.round - 1}-{shard}.safetensors"
    if server is None or wanted is None:
        raise Refused(f"shard {shard} has no parameter server", "retry")
    try:
        return await context.bring(server.peer_id, wanted, path)
    except (PeerUnreachable, RemoteProtocolError) as error:
        raise Refused(f"shard {shard} of model {view.round - 1} is not here yet: {error}", "retry") from error
