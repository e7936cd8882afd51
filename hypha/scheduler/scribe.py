"""Writes the journal, one record after another in the order of the decisions they record (rounds.md).

    note(grant) ──────────────▶ ┌──────┐ ─▶ returns once durable; StoreError: not acknowledged
    ended(lease), exclude(c) ─▶ │ lock │ ─▶ written in the background, again and again until the disk takes it;
    committed() ──────────────▶ └──────┘    only then may an excluded contribution's samples be granted again

The order matters: of two grants of the same samples a restart believes the later one.
"""

from collections.abc import Callable, Iterable

import trio

from hypha.errors import StoreError
from hypha.network.retry import Backoff
from hypha.protocol.messages import Member
from hypha.protocol.tally import Exclude
from hypha.runtime import Runtime
from hypha.scheduler.records import Excluded, LeaseEnded, Record
from hypha.scheduler.standing import Standing
from hypha.scheduler.store import JobStore
from hypha.telemetry import get_logger

log = get_logger("scheduler")

BACKOFF_S = 0.5
BACKOFF_MAX_S = 15.0
SUBJECT = "journal"


class Scribe:
    """The one writer of a job's journal. `noted` is told of each exclusion once it is durable."""

    def __init__(
        self, runtime: Runtime, store: JobStore, standing: Standing, *, noted: Callable[[Exclude], None]
    ) -> None:
        self._runtime = runtime
        self._store = store
        self._standing = standing
        self._noted = noted
        self._lock = trio.Lock()
        self._excluded: list[Exclude] = []
        self._ended: list[Member] = []
        self._compact = False
        self._due = trio.Event()

    async def note(self, *records: Record) -> None:
        """Return once these are durable. Raises StoreError: then none is acknowledged."""
        await self._on_disk(self._store.note, *records)

    async def _on_disk(self, write: Callable[..., None], *records: Record) -> None:
        async with self._lock:
            try:
                await self._runtime.run_blocking(write, *records)
            except StoreError as error:
                self._standing.warn(SUBJECT, "The journal cannot be written; no samples are granted", str(error))
                raise
        if self._standing.clear(SUBJECT):
            log.info("The journal can be written again")

    def exclude(self, found: Iterable[Exclude]) -> None:
        """Write these in the background."""
        self._excluded += found
        self._due.set()

    def ended(self, member: Member) -> None:
        """Write in the background that a lease is over."""
        self._ended.append(member)
        self._due.set()

    def committed(self) -> None:
        """A round is in the chain: what the journal says of it may go, if there is much."""
        self._compact = True
        self._due.set()

    async def run(self) -> None:
        """Write what is due, until cancelled."""
        backoff = Backoff(self._runtime, base_s=BACKOFF_S, max_s=BACKOFF_MAX_S)
        while True:
            self._due = trio.Event()
            try:
                await self._write()
            except StoreError:
                await backoff.wait()
                continue
            backoff.reset()
            if not self._excluded and not self._ended:
                await self._due.wait()

    async def _write(self) -> None:
        found, ended = list(self._excluded), list(self._ended)
        if found or ended:
            await self.note(
                *(LeaseEnded(member=member) for member in ended), *(Excluded(exclude=each) for each in found)
            )
            del self._excluded[: len(found)], self._ended[: len(ended)]
            for each in found:
                self._noted(each)
        if self._compact:
            await self._on_disk(self._store.compact)
            self._compact = False
