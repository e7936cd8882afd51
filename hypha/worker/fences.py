"""Fences for this worker's offers: the rule of `protocol.fence` over the file of `store.fences`."""

import trio

from hypha.protocol.fence import Fences, MustReserve
from hypha.runtime import Runtime
from hypha.store.fences import FenceFile


class FenceKeeper:
    """Hands out fences, writing the next block durably before any of it leaves."""

    def __init__(self, file: FenceFile, runtime: Runtime) -> None:
        self._file = file
        self._runtime = runtime
        self._fences = Fences(file.reserved)
        self._lock = trio.Lock()

    async def take(self) -> int:
        """Return a fence above every one ever returned. Raises StoreError when the next block cannot be written."""
        async with self._lock:
            taken = self._fences.take()
            while isinstance(taken, MustReserve):
                # The file counts fences *below* its number as possibly gone, the rule counts up to and including.
                # After a failed write the file has counted that block as gone already: reserve above it.
                block = max(1, taken.upto + 1 - self._file.reserved)
                await self._runtime.run_blocking(self._file.reserve, block)
                self._fences.reserved(taken.upto)
                taken = self._fences.take()
            return taken
