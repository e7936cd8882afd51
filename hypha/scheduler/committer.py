"""Making outer steps durable, off the critical path: workers train on while this runs (rounds.md).

    Outcome(r) ─▶ fetch records ─▶ store them under their digests ─▶ chain entry r ─▶ committed
                  every N rounds and at the end: model and momentum, too, before the entry
    the server of one shard gone before its record was here ─▶ lost: the round opens again

A store that cannot be written is tried again for as long as it takes; training waits at the end of the next round.
"""

from collections.abc import Callable
from pathlib import Path

import trio
from msgspec import Struct

from hypha.errors import PeerUnreachable, RemoteProtocolError, StoreError
from hypha.network.artifacts import fetch_artifact
from hypha.network.retry import Backoff
from hypha.network.seam import Network
from hypha.protocol.closing import Outcome
from hypha.protocol.messages import FetchModel, Member
from hypha.protocol.shards import kind_of
from hypha.runtime import Runtime
from hypha.scheduler.config import CheckpointConfig
from hypha.scheduler.standing import Standing
from hypha.scheduler.store import Deposed, JobStore
from hypha.telemetry import get_logger, span

log = get_logger("scheduler.committer")

STORE_BACKOFF_S = 0.5
STORE_BACKOFF_MAX_S = 15.0


class Wanted(Struct, frozen=True, kw_only=True):
    """One file of a round: its part, digest and the round that made it."""

    part: str
    round: int
    digest: str


class Committer:
    """Fetches and stores what rounds made. `alive` tells whether a server's lease still lives."""

    def __init__(
        self,
        network: Network,
        runtime: Runtime,
        store: JobStore,
        *,
        job_epoch: int,
        checkpoint: CheckpointConfig,
        updates: int,
        downloads: Path,
        patience_s: float,
        alive: Callable[[Member], bool],
        standing: Standing,
    ) -> None:
        self._network = network
        self._runtime = runtime
        self._store = store
        self._job_epoch = job_epoch
        self._checkpoint = checkpoint
        self._updates = updates
        self._downloads = downloads
        self._patience_s = patience_s
        self._alive = alive
        self._standing = standing

    def stores_state(self, round_made: int) -> bool:
        """Whether model and momentum of this round are kept."""
        return round_made == self._updates or round_made % self._checkpoint.every == 0

    async def commit(self, outcome: Outcome) -> bool:
        """Make a round durable. False: it is lost, a server that made it is gone and its record never came.

        Raises Deposed when another scheduler has taken the job over.
        """
        kept: list[bool] = []

        async def keep_shard(shard: int) -> None:
            wanted = self._wanted(outcome, shard)
            kept.append(all([await self.keep(each, outcome.servers[shard]) for each in wanted]))

        with span("commit", round=outcome.round):
            async with trio.open_nursery() as nursery:
                for shard in range(len(outcome.servers)):
                    nursery.start_soon(keep_shard, shard)
            if not all(kept):
                return False
            await self._append(outcome)
        return True

    def _wanted(self, outcome: Outcome, shard: int) -> list[Wanted]:
        merged = outcome.merged[shard]
        digests = {"record": merged.record_digest}
        if self.stores_state(outcome.round):
            digests |= {"model": merged.model_digest, "momentum": merged.momentum_digest}
        return [
            Wanted(part=kind_of(part, shard), round=outcome.round, digest=digest) for part, digest in digests.items()
        ]

    async def keep(self, wanted: Wanted, server: Member) -> bool:
        """Fetch one file from the server that has it, and store it. False once that is dead."""
        backoff = self._backoff()
        path = self._downloads / f"{wanted.part}-{wanted.digest}"
        while not path.is_file():
            if not self._alive(server):
                self._standing.clear("fetch")
                log.warn("State lost before it was stored", part=wanted.part, round=wanted.round)
                return False
            if not await self._fetch(wanted, server, path):
                await backoff.wait()
        await self._persist(lambda: self._store.put(wanted.part, wanted.round, wanted.digest, path))
        await self._runtime.run_blocking(path.unlink, True)  # noqa: FBT003 - missing_ok
        return True

    async def _fetch(self, wanted: Wanted, server: Member, path: Path) -> bool:
        message = FetchModel(
            job_id=self._store.opened.job_id,
            job_epoch=self._job_epoch,
            part=wanted.part,
            round=wanted.round,
            digest=wanted.digest,
        )
        try:
            await fetch_artifact(
                self._network, server.peer_id, message, path, runtime=self._runtime, patience_s=self._patience_s
            )
        except StoreError as error:
            self._standing.warn("fetch", "What servers made cannot be written to state_dir; tried again", str(error))
            return False
        except (PeerUnreachable, RemoteProtocolError) as error:
            self._standing.note("fetch", f"{wanted.part} of round {wanted.round} is not here yet", str(error))
            return False
        self._standing.clear("fetch")
        return True

    async def _append(self, outcome: Outcome) -> None:
        entry = self._store.round_entry(
            outcome.merged, outcome.contributions, job_epoch=self._job_epoch, nonce=self._runtime.new_id()
        )
        await self._persist(lambda: self._store.commit(entry))
        if self.stores_state(outcome.round):
            await self._persist(lambda: self._store.prune(self._checkpoint))

    async def _persist(self, write: Callable[[], object]) -> None:
        """Run a write until the store takes it; says so when it does not, and when it does again."""
        backoff = self._backoff()
        while True:
            try:
                await self._runtime.run_blocking(write)
            except Deposed:
                raise
            except StoreError as error:
                self._standing.warn("store", "The job's store cannot be written; tried again", str(error))
                await backoff.wait()
            else:
                if self._standing.clear("store"):
                    log.info("The job's store can be written again")
                return

    def _backoff(self) -> Backoff:
        return Backoff(self._runtime, base_s=STORE_BACKOFF_S, max_s=STORE_BACKOFF_MAX_S)
