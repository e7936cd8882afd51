"""One idle executor process that has imported what a job needs, so that the job need not wait for that.

    room for a job ─▶ started: interpreter, torch, transformers ─▶ waits on its standard input
         ├─ take(start) ─▶ one line, and it is that job's executor: the caller records it and ends its group
         ├─ no room for FULL_S ─▶ ended: its memory belongs to those who pay for it
         └─ this worker is gone ─▶ standard input ends, and so does it; a restarted worker ends it by its record

It holds no job's socket, directory or environment before it is taken, and is used once.
"""

import os
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from hypha.protocol.warm import LINE_BYTES_MAX, WarmStart
from hypha.telemetry import get_logger
from hypha.worker.process import INTERPRETER, LEASE_VARIABLE, ProcessRecord, birth_of, end_group

log = get_logger("worker.warm")

COMMAND = (*INTERPRETER, "hypha.training.warm")
# Begins the name of its record, and is in its environment and that of all it starts, as a lease's id is in others'.
MARK_PREFIX = "warm-"
# Room comes and goes with jobs, which live for minutes.
LOOK_S = 0.5
# A job that fills the worker takes the spare, but not at once: its directory and its bridge come first.
FULL_S = 5.0
# A job that has just begun, or ended, needs the processor more than the next one's spare does.
AFTER_JOB_S = 10.0
# One that ended by itself would do so again: a broken installation must not keep a core busy.
AGAIN_S = 60.0


class Spare:
    """The idle process and the end of the pipe that it waits on."""

    def __init__(self, process: trio.Process, mark: str, told_by: int, record: Path) -> None:
        self.process = process
        self.mark = mark
        self.record = record
        self._told_by = told_by

    def tell(self, start: WarmStart) -> bool:
        """Give it its job; False where it cannot hear of it any more."""
        line = msgspec.json.encode(start) + b"\n"
        try:
            # A pipe that nobody wrote to takes a line of this size at once, also while the other end still imports.
            return len(line) <= LINE_BYTES_MAX and os.write(self._told_by, line) == len(line)
        except OSError:
            return False
        finally:
            self.hang_up()

    def hang_up(self) -> None:
        """Close the pipe: without a job, that ends it."""
        told_by, self._told_by = self._told_by, -1
        if told_by >= 0:
            os.close(told_by)

    async def end(self) -> None:
        """End it with all it started; nothing of it is left then."""
        self.hang_up()
        await end_group(self.process.pid)
        await self.process.wait()
        if self.process.stdout is not None:
            await self.process.stdout.aclose()
        self.record.unlink(missing_ok=True)


class Warm:
    """Keeps at most one spare while `run` runs. `has_gpu`: it sees this machine's devices, and serves leases of one."""

    def __init__(self, records: Path, environment: Mapping[str, str], *, has_gpu: bool) -> None:
        self._records = records
        self._environment = dict(environment)
        self._has_gpu = has_gpu
        self._spare: Spare | None = None
        self._number = 0
        self._not_before = -float("inf")
        self._room_at = -float("inf")

    async def run(self, has_room: Callable[[], bool]) -> None:
        """Start a spare whenever there is room for a job, and end it where there is none, until cancelled."""
        try:
            while True:
                await self._look(has_room(), trio.current_time())
                await trio.sleep(LOOK_S)
        finally:
            await self._end()

    async def _look(self, has_room: bool, now: float) -> None:  # noqa: FBT001 - what was seen
        if has_room:
            self._room_at = now
        else:
            self._not_before = max(self._not_before, now + AFTER_JOB_S)
        if self._spare is not None:
            if self._spare.process.poll() is not None or now - self._room_at > FULL_S:
                await self._end()
        elif has_room and now >= self._not_before:
            await self._start()

    def take(self, start: WarmStart, *, has_gpu: bool) -> tuple[trio.Process, str] | None:
        """Give the spare its job; returns its process and the mark in its environment, None where there is none.

        The process is the caller's from then on, and so is its record under that mark.
        """
        spare = self._spare
        if spare is None or has_gpu != self._has_gpu or spare.process.poll() is not None or not spare.tell(start):
            return None
        self._spare = None
        self._not_before = max(self._not_before, trio.current_time() + AFTER_JOB_S)
        return spare.process, spare.mark

    async def _start(self) -> None:
        self._number += 1
        mark = f"{MARK_PREFIX}{os.getpid()}-{self._number}"
        own = {"OMP_NUM_THREADS": "1", LEASE_VARIABLE: mark}
        if not self._has_gpu:
            own["CUDA_VISIBLE_DEVICES"] = ""
        hears_by, told_by = os.pipe()
        record = self._records / f"{mark}.json"
        try:
            process = await trio.lowlevel.open_process(
                COMMAND,
                cwd=self._records,
                env={**self._environment, **own},
                stdin=hears_by,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except BaseException:
            os.close(told_by)
            raise
        finally:
            os.close(hears_by)
        self._spare = Spare(process, mark, told_by, record)
        # Without a record it still ends with this worker: by its standard input.
        with suppress(OSError):
            record.write_bytes(msgspec.json.encode(ProcessRecord(process.pid, birth_of(process.pid) or "", mark)))
        log.debug("Warming an executor", process_group=process.pid)

    async def _end(self) -> None:
        spare, self._spare = self._spare, None
        if spare is None:
            return
        code = spare.process.poll()
        if code is not None:
            self._not_before = trio.current_time() + AGAIN_S
            log.warn("The warm executor ended by itself", exit_code=code, again_in_s=AGAIN_S)
        # It is remembered nowhere else: whoever cancels waits until nothing of it is left.
        with trio.CancelScope(shield=True):
            await spare.end()
