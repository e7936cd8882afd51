"""Executors without processes: the worker's Launcher seam, as tasks in virtual time.

launch ─▶ starting (what importing torch costs) ─▶ Trainer | Aggregator ─▶ exit 0, 1
   └─ leaving ─▶ cancelled ─▶ the time a killed process takes to be gone ─▶ gone
fail("exit") ends one with a signal; fail("stall") lets it stand still, alive and silent
`does_wrong` = "spoil": its next update has numbers in it that are none; "claim": it names samples of others
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import numpy as np
import trio

from hypha.errors import HyphaError
from hypha.protocol.bridge import ExecutorFailed, FileRef, Send
from hypha.worker.process import Executor, Launch
from tests.sim import weights
from tests.sim.aggregator import Aggregator
from tests.sim.line import BridgeRefused, Line
from tests.sim.overlap import Overlapping
from tests.sim.trainer import Trainer
from tests.sim.virtual import VirtualRuntime

START_S = 0.8
KILL_S = 0.1
SIGKILL = -9
# More samples than any grant has.
GRANTED_MAX = 1000


class Pace(msgspec.Struct, frozen=True):
    """How fast a machine computes: seconds for a batch, and the factor on everything else."""

    batch_s: float = 0.25
    factor: float = 1.0


class SimExecutor:
    """One running executor."""

    def __init__(self, what: Launch, runtime: VirtualRuntime, pace: Pace, note: Callable[[str], None]) -> None:
        self.what = what
        self.nursery: trio.Nursery
        self._runtime = runtime
        self._pace = pace
        self._note = note
        self.does_wrong: str | None = None
        self._line: Line | None = None
        self._stalled = False
        self._lines: list[str] = []
        self._code: int | None = None
        self._over = trio.Event()
        self._scope = trio.CancelScope()

    # --- what its worker sees ---

    async def wait(self) -> int:
        """Return the exit code."""
        await self._over.wait()
        assert self._code is not None
        return self._code

    def last_lines(self) -> tuple[str, ...]:
        """Return what it said when it failed."""
        return tuple(self._lines)

    # --- what happens to it ---

    def fail(self, how: str) -> None:
        """Let it die by a signal, or stand still."""
        self.note(f"is made to {how}")
        if how == "stall":
            self._stalled = True
        else:
            self._code = SIGKILL
            self._scope.cancel()

    @property
    def is_sending(self) -> bool:
        """Whether it is delivering an update."""
        return self._line is not None and self._line.is_sending

    def _spoil(self, update: Send) -> Send:
        """Replace an update by one that is wrong, where that is wanted."""
        wrong = self.does_wrong if update.samples else None
        if wrong is None:
            return update
        self.does_wrong = None
        self.note(f"sends a wrong update: {wrong}")
        if wrong == "claim":
            first, *others = update.intervals
            # More than was trained on, and than was granted.
            more = msgspec.structs.replace(first, stop=first.stop + GRANTED_MAX)
            return msgspec.structs.replace(update, intervals=(more, *others), samples=update.samples + GRANTED_MAX)
        return msgspec.structs.replace(update, files=tuple(self._spoilt(file.path) for file in update.files))

    def _spoilt(self, sound: str) -> FileRef:
        root = self.what.directory
        nowhere = np.full(weights.ELEMENTS, np.nan, np.float32)
        return weights.write(root / f"{sound}.spoilt", nowhere, root, weights.names_in(root / sound))

    async def run(self) -> None:
        """Live, from the start to the exit."""
        line = self._line = Line(self.what.session, self._runtime, self._spoil)
        try:
            with self._scope:
                async with trio.open_nursery() as self.nursery:
                    self.nursery.start_soon(line.run)
                    self._code = await self._main(line)
                    self.nursery.cancel_scope.cancel()
        finally:
            if self._code is not None:
                self.note(f"exits with {self._code}")
                self._over.set()

    async def _main(self, line: Line) -> int:
        what = self.what
        try:
            await self.work(START_S)
            if what.job.work == "train":
                kind = Overlapping if what.job.streaming.overlap_steps else Trainer
                await kind(line, what.job, what.directory, self, self._pace.batch_s).run()
            else:
                await Aggregator(line, what.job, what.directory, self).run()
        except HyphaError as error:
            self._lines.append(str(error))
            try:
                await line.report(ExecutorFailed(reason=str(error)))
            except BridgeRefused as refusal:
                self._lines.append(f"the worker does not take the reason: {refusal}")
            return 1
        return 0

    # --- what it runs on ---

    def now(self) -> float:
        """Seconds on the machine's clock."""
        return self._runtime.now()

    async def work(self, seconds: float) -> None:
        """Compute for so long on a machine of speed 1, give or take a tenth."""
        await self._runtime.sleep(seconds * self._pace.factor * (0.9 + 0.2 * self._runtime.random.random()))
        if self._stalled:
            await trio.sleep_forever()

    def note(self, what: str) -> None:
        """Tell the event log."""
        self._note(f"{self.what.job.work} {self.what.lease_id} {what}")


class SimLauncher:
    """Starts executors on one machine; `running` by lease until nothing of them is left."""

    def __init__(self, runtime: VirtualRuntime, pace: Pace, note: Callable[[str], None]) -> None:
        self.running: dict[str, SimExecutor] = {}
        self._runtime = runtime
        self._pace = pace
        self._note = note

    @asynccontextmanager
    async def launch(self, what: Launch) -> AsyncIterator[Executor]:
        """See `hypha.worker.process.Launcher`."""
        executor = self.running[what.lease_id] = SimExecutor(what, self._runtime, self._pace, self._note)
        executor.note("starts")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(executor.run)
                try:
                    yield executor
                finally:
                    nursery.cancel_scope.cancel()
                    with trio.CancelScope(shield=True):
                        await self._runtime.sleep(KILL_S)
        finally:
            del self.running[what.lease_id]
            executor.note("is gone")
