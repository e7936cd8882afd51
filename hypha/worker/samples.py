"""Samples for a training executor: asked for at the scheduler until the round is over, brought here, handed over.

FetchSamples(r) ─▶ r is open, or comes next where the job's inner steps may run ahead ─▶ SliceRequest ─▶ slice file
"""

from functools import partial

from hypha.errors import Refused
from hypha.protocol import bridge
from hypha.protocol.messages import NoMore, SliceGrant, SliceRequest
from hypha.telemetry import get_logger
from hypha.worker.session import Session

log = get_logger("worker.trainer")


class Samples:
    """Answers one session's questions for samples."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lead = 1 if session.context.job.streaming.overlap_steps else 0  # rounds trained before they are open

    async def fetch(self, request: bridge.FetchSamples) -> bridge.SamplesFetched | bridge.NoSamples:
        """Return the samples of the next grant, or that this round has none left for this worker."""
        session, first = self._session, request.round - self._lead
        await session.until(lambda: session.view is not None and (session.view.round >= first or session.stopped))
        grant = await self._ask(request)
        if grant is None or isinstance(grant, NoMore):
            return bridge.NoSamples(round=request.round)
        path = await session.slice_path(grant.slice)
        return bridge.SamplesFetched(interval=grant.interval, path=path)

    async def _ask(self, request: bridge.FetchSamples) -> SliceGrant | NoMore | None:
        """Ask until answered or the round has moved on; under a new job epoch, ask anew."""
        session = self._session
        while self._open(request.round):
            view = session.view
            assert view is not None, "a round is open"
            message = SliceRequest(
                job_id=view.job_id,
                job_epoch=view.job_epoch,
                round=request.round,
                lease_id=session.context.lease_id,
                fence=session.context.fence,
                request=request.request,
                wanted=request.wanted,
            )
            try:
                answer = await session.insist(
                    session.context.scheduler, message, partial(self._open, request.round, message.job_epoch)
                )
            except Refused as refusal:
                # The round moved on while we asked, or another view has us no more: nothing to train on in this round.
                log.info("No samples", round=request.round, reason=str(refusal))
                return None
            if answer is not None:
                return answer
        return None

    def _open(self, round_asked: int, job_epoch: int | None = None) -> bool:
        session, view = self._session, self._session.view
        if session.stopped or session.leaving or view is None or not 0 <= round_asked - view.round <= self._lead:
            return False
        return job_epoch in (None, view.job_epoch)
