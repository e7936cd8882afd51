"""What a parameter server starts from when a job goes on: committed state out of the scheduler's store.

ResumePoint ──▶ model r, momentum r, records r+1 … n   each by digest, each until it is here
                     └─ unreachable, or a no: again, doubling; a no that does not change: the job fails with it
"""

from hypha.errors import PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.retry import Backoff
from hypha.protocol.bridge import FileRef, ResumeFetched
from hypha.protocol.messages import FetchModel
from hypha.protocol.shards import kind_of
from hypha.telemetry import get_logger
from hypha.worker.session import JobContext

log = get_logger("worker.resume")

# A scheduler that has just come up may not know us yet; one that says no so often does not have it.
REFUSALS_MAX = 5


async def fetch_resume(context: JobContext, job_epoch: int, backoff: Backoff) -> ResumeFetched:
    """Bring the files of the job's resume point into its directory. Raises RemoteProtocolError, StoreError."""
    resume = context.job.resume
    if resume is None:
        raise RemoteProtocolError("this job starts from the beginning: there is no resume point")
    wanted = [("model", resume.round, resume.model_digest), ("momentum", resume.round, resume.momentum_digest)]
    wanted += [("record", resume.round + 1 + n, digest) for n, digest in enumerate(resume.records)]
    files = []
    for part, made_in, digest in wanted:
        part = kind_of(part, context.job.shard)
        request = FetchModel(job_id=context.job.job_id, job_epoch=job_epoch, part=part, round=made_in, digest=digest)
        files.append(await _fetch(context, request, backoff))
        backoff.reset()
    return ResumeFetched(round=resume.round, model=files[0], momentum=files[1], records=tuple(files[2:]))


async def _fetch(context: JobContext, wanted: FetchModel, backoff: Backoff) -> FileRef:
    path = context.directory / f"resume-{wanted.part}-{wanted.round}.safetensors"
    refusals = 0
    while True:
        try:
            return await context.bring(context.scheduler, wanted, path)
        except (PeerUnreachable, RemoteProtocolError) as error:
            log.info("State not fetched yet", part=wanted.part, round=wanted.round, reason=str(error))
            refusals += isinstance(error, Refused) and error.code == "refused"
            if refusals >= REFUSALS_MAX:
                raise
            await backoff.wait()
