"""Held-out loss of each model, in a thread of its own, so that no Screen or Merge ever waits for it.

    submit(round, model file) ─▶ newest pending ─▶ load ─▶ held-out rows ─▶ EvaluationDone(round, digest, loss)
                                   └─ where servers share the model: the first fetches the others' files, too

Only the newest waiting model is evaluated when several come at once. Loss is in nats per predicted token (or label):
the mean over predictions, not over batches. Every evaluation sees the same rows.
"""

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from msgspec import Struct

from hypha.errors import HyphaError, JobFailed
from hypha.protocol.bridge import EvaluationDone, FetchHeldOut, FetchOthers, FileRef, HeldOutFetched, OthersFetched
from hypha.protocol.job import JobSpec
from hypha.telemetry import get_logger, span_from
from hypha.training import models, tensors
from hypha.training.batches import Batch, Rows
from hypha.training.inner import loss_of, predicted
from hypha.training.preprocess import Preprocessor
from hypha.training.session import BridgeRefused, Session
from hypha.training.sources import fetch_preprocessor

log = get_logger("training.evaluate")

# Rows evaluated, spread evenly over the split: 256 × 127 bytes put the standard error of nats per byte near 0.02, and a
# larger sample would take processor time from training on machines that do both.
SAMPLES_MAX = 256
BATCH_SAMPLES = 32
# Evaluation yields to everything else on the machine (Linux: the nice value of one thread).
NICE = 10


class Pending(Struct, frozen=True):
    """A model to evaluate: a link of its own to the file, so that the original may go meanwhile."""

    round: int
    digest: str
    path: Path
    traceparent: str | None


class Evaluator:
    """Evaluates what is submitted until closed; a context manager. Failures are logged: training goes on without it."""

    def __init__(self, session: Session, job: JobSpec, work_dir: Path, build: Callable[[], torch.nn.Module]) -> None:
        self._session, self._job, self._work_dir, self._build = session, job, work_dir, build
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._condition = threading.Condition()
        self._pending: Pending | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="evaluate", daemon=True)

    def __enter__(self) -> "Evaluator":
        """Start the thread, if there is anything to evaluate on."""
        if self._job.dataset.held_out and self._job.rounds.evaluate_every and self._job.shard == 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop after the batch in progress."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def wants(self, round_: int) -> bool:
        """Whether model `round_` is one of those to evaluate: every n-th, the initial and the final one."""
        every = self._job.rounds.evaluate_every
        return self._thread.is_alive() and (round_ % every == 0 or round_ == self._job.rounds.updates)

    def submit(self, round_: int, model: FileRef, traceparent: str | None = None) -> None:
        """Evaluate this model when there is time; a model that still waits is given up for it."""
        if not self.wants(round_):
            return
        path = self._work_dir / f"evaluate-{round_}-{model.digest[:8]}.safetensors"
        with suppress(FileExistsError):
            os.link(self._work_dir / model.path, path)
        with self._condition:
            if self._pending is not None and self._pending.path != path:
                self._pending.path.unlink(missing_ok=True)
            self._pending = Pending(round_, model.digest, path, traceparent)
            self._condition.notify()

    def _run(self) -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            model = models.without_cache(self._build()).to(self._device).eval()
            preprocess = fetch_preprocessor(self._session, self._job)
            slices = self._held_out()
            while (pending := self._next()) is not None:
                self._evaluate(pending, model, preprocess, slices)
        except HyphaError as error:
            log.warn("Held-out evaluation ends", reason=str(error))

    def _next(self) -> Pending | None:
        with self._condition:
            self._condition.wait_for(lambda: self._closed or self._pending is not None)
            pending, self._pending = self._pending, None
            return None if self._closed else pending

    def _held_out(self) -> list[Rows]:
        fetched = self._session.fetch_patiently(FetchHeldOut(), leave=lambda: self._closed)
        if not isinstance(fetched, HeldOutFetched):
            raise JobFailed(f"worker answered FetchHeldOut with {type(fetched).__name__}")
        return [Rows(self._work_dir / path, self._job.dataset.schema) for path in fetched.paths]

    def _others(self, pending: Pending) -> list[Path]:
        """The rest of the model, where other servers have it. Raises BridgeRefused: it is gone."""
        if self._job.shards == 1:
            return []
        request = FetchOthers(round=pending.round, digest=pending.digest)
        fetched = self._session.fetch_patiently(request, leave=lambda: self._closed)
        if not isinstance(fetched, OthersFetched):
            raise JobFailed(f"worker answered FetchOthers with {type(fetched).__name__}")
        return [self._work_dir / file.path for file in fetched.files]

    def _evaluate(self, pending: Pending, model: torch.nn.Module, preprocess: Preprocessor, slices: list[Rows]) -> None:
        paths = [pending.path]
        try:
            paths += self._others(pending)
            tensors.load_parts(paths, models.parameters_of(model))
        except BridgeRefused as refusal:
            log.info("Not evaluated", round=pending.round, reason=str(refusal))
            return
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
        total, count, samples = 0.0, 0, 0
        with span_from(pending.traceparent, "evaluate", round=pending.round), torch.inference_mode():
            for rows in spread(slices, SAMPLES_MAX):
                if self._closed:
                    return
                batch = preprocess(rows)
                predictions = predicted(batch, shifted=self._job.model.type in models.NEXT_TOKEN_TASKS)
                total += float(loss_of(model, batch, self._device)) * predictions
                count, samples = count + predictions, samples + len(next(iter(rows.values())))
        loss = total / count if count else math.nan
        log.info("Evaluated", round=pending.round, held_out_loss=loss, samples=samples)
        if math.isfinite(loss):
            done = EvaluationDone(round=pending.round, digest=pending.digest, loss=loss, samples=samples)
            self._session.report(done)


def spread(slices: list[Rows], samples_max: int) -> Iterator[Batch]:
    """Yield batches of at most `samples_max` rows in all, from runs of rows spread evenly over the slices."""
    total = sum(rows.samples for rows in slices)
    runs = max(1, min(samples_max, total) // BATCH_SAMPLES)
    for run in range(runs):
        at = run * total // runs
        for rows in slices:
            if at < rows.samples:
                yield rows.read(at, min(at + BATCH_SAMPLES, rows.samples))
                break
            at -= rows.samples
