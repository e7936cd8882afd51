"""Outer updates as they come to a worker that trains, shard by shard, until the executor can apply them.

    parameter servers ── OuterUpdate(shard, round, close) ──▶ judged ─▶ a file each
                              all shards have the same Close ─▶ UpdateArrived, once ──▶ executor

Of one shard only the newest Close counts: what comes late of an older one is taken and dropped.
"""

from hashlib import sha256
from pathlib import Path

from msgspec import Struct

from hypha.errors import Refused, StoreError
from hypha.network.seam import Stream
from hypha.network.transfer import partial_path, receive_file
from hypha.protocol import bridge
from hypha.protocol.messages import Accepted, OuterUpdate
from hypha.protocol.shards import part_of, whole_digest
from hypha.protocol.tensorfile import DIGEST_ALGORITHM
from hypha.protocol.views import refusal
from hypha.telemetry import inject
from hypha.worker.session import Session


class Arrived(Struct, frozen=True):
    """One shard's newest update, and its file in the work directory."""

    header: OuterUpdate
    path: Path


class Arrivals:
    """The updates of one training session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._newest: dict[int, Arrived] = {}  # by shard
        self._handed_over = -1  # the newest Close that the executor was given
        self._count = 0

    async def receive(self, stream: Stream, header: OuterUpdate) -> None:
        """Take an outer update from a parameter server of the newest view; hand it over with the other shards'."""
        self._judge(stream.peer.peer_id, header)
        if self._is_news(header):
            await self._take(stream, header)
        await stream.send_message(Accepted(digest=header.digest))

    def _is_news(self, header: OuterUpdate) -> bool:
        known = self._newest.get(header.shard)
        return known is None or header.close > known.header.close

    async def _take(self, stream: Stream, header: OuterUpdate) -> None:
        # A repetition may come while the first is under way, so each arrives in a file of its own.
        self._count += 1
        context = self._session.context
        path = context.directory / f"update-{header.round}-{header.close}-{header.shard}-{self._count}.safetensors"
        kept = False
        try:
            await receive_file(
                stream,
                path,
                size=header.bytes,
                digest=header.digest,
                algorithm=DIGEST_ALGORITHM,
                runtime=context.runtime,
            )
            self._judge(stream.peer.peer_id, header)  # the view may have moved on meanwhile
            if self._is_news(header):
                kept = True
                self._keep(Arrived(header, path))
        except StoreError as error:
            self._session.fail(str(error))
            raise Refused(f"the update cannot be stored: {error}", "retry") from error
        finally:
            if not kept:
                discard(path)

    def _judge(self, peer_id: str, header: OuterUpdate) -> None:
        session = self._session
        if header.job_id != session.context.job.job_id:
            raise Refused(f"this lease is for job {session.context.job.job_id}, not {header.job_id}")
        verdict = session.guard.check_server(
            job_epoch=header.job_epoch, view=header.view, peer_id=peer_id, shard=header.shard
        )
        if verdict is not None:
            raise refusal(verdict)
        view = session.view
        assert view is not None, "judged above"
        base = part_of(view.base_digest, view.parts, header.shard)
        leads_to_base = header.round == view.round - 1 and header.model_digest == base
        starts_at_base = header.round == view.round and header.base_digest == base
        if not (leads_to_base or starts_at_base):
            raise Refused(f"outer step {header.round} does not belong to view {view.view} of round {view.round}")

    def _keep(self, arrived: Arrived) -> None:
        header = arrived.header
        before = self._newest.get(header.shard)
        if before is not None and before.header.close > self._handed_over:
            discard(before.path)
        self._newest[header.shard] = arrived
        whole = [self._newest[shard] for shard in sorted(self._newest)]
        if len(whole) == self._session.context.job.shards and {each.header.close for each in whole} == {header.close}:
            self._handed_over = header.close
            self._hand_over(whole)

    def _hand_over(self, whole: list[Arrived]) -> None:
        headers = [each.header for each in whole]
        files = [bridge.FileRef(path=a.path.name, bytes=a.header.bytes, digest=a.header.digest) for a in whole]
        parts = tuple(header.model_digest for header in headers)
        self._session.owed.owe()
        self._session.emit(
            bridge.UpdateArrived(
                round=headers[0].round,
                close=headers[0].close,
                base_digest=whole_digest([header.base_digest for header in headers], sha256),
                model_digest=whole_digest(parts, sha256),
                files=tuple(files),
                parts=parts,
                traceparent=inject() or headers[0].traceparent,
            )
        )


def discard(path: Path) -> None:
    """Remove a file and what there is of it."""
    for each in (path, partial_path(path)):
        each.unlink(missing_ok=True)
