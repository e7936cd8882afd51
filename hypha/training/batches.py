"""Samples: rows of SafeTensors slices, fetched one grant ahead of the training that uses them.

    FetchSamples ─▶ grant: rows [start, stop) of a slice ─▶ take(n) ─▶ {tensor name: n rows}
         └─ asked for and mapped in a thread while half of the previous grant is still to be trained

What was taken is recorded as intervals, merged where they touch; what a round leaves of a grant is simply dropped.
"""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from msgspec import Struct
from safetensors import safe_open

from hypha.errors import JobFailed, RemoteProtocolError
from hypha.protocol.bridge import Fetched, NoSamples, SamplesFetched
from hypha.protocol.messages import INTERVALS_PER_CONTRIBUTION_MAX, Interval
from hypha.protocol.tensorfile import TensorSpec
from hypha.training.calls import Call
from hypha.training.tensors import layout_of

# How often a wait for samples looks whether it is still wanted.
POLL_S = 0.2

Batch = dict[str, torch.Tensor]


class Rows:
    """The rows of one slice, mapped; checked against the dataset's schema before anything is read."""

    def __init__(self, path: Path, schema: Mapping[str, str]) -> None:
        """Raises JobFailed naming the slice and the tensor that is wrong."""
        try:
            tensors = layout_of(path).tensors
        except RemoteProtocolError as error:
            raise JobFailed(f"slice {error}") from error
        self.path = path
        self.samples = _check(path.name, {name: placed.spec for name, placed in tensors.items()}, schema)
        self._names = sorted(tensors)
        self._file = safe_open(path, framework="pt")

    def read(self, start: int, stop: int) -> Batch:
        """Return rows [start, stop) of every tensor; small integers become int64, as torch indexes with them."""
        return {name: widened(self._file.get_slice(name)[start:stop]) for name in self._names}  # type: ignore[no-untyped-call]


def _check(slice_name: str, found: Mapping[str, TensorSpec], schema: Mapping[str, str]) -> int:
    wrong = sorted(found.keys() ^ schema.keys())
    if wrong:
        raise JobFailed(f"slice {slice_name}: its tensors are {sorted(found)}, the dataset has {sorted(schema)}")
    rows = {spec.shape[0] if spec.shape else 0 for spec in found.values()}
    if len(rows) != 1:
        raise JobFailed(f"slice {slice_name}: its tensors have different numbers of rows: {sorted(rows)}")
    for name, spec in sorted(found.items()):
        per_sample = f"{spec.dtype}{list(spec.shape[1:])}"
        if per_sample.replace(" ", "") != schema[name].replace(" ", ""):
            raise JobFailed(f"slice {slice_name}: tensor {name!r} is {per_sample} per sample, expected {schema[name]}")
    return rows.pop()


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """int64 for whole numbers, fp32 for halves; others as they are."""
    if tensor.dtype in (torch.bool, torch.float32, torch.float64, torch.int64):
        return tensor
    return tensor.float() if tensor.dtype.is_floating_point else tensor.long()


class Grant(Struct):
    """Rows that are ours for this round, `next` being the first not yet taken."""

    interval: Interval
    rows: Rows
    next: int

    @property
    def left(self) -> int:
        """Rows not yet taken."""
        return self.interval.stop - self.next


# FetchSamples: how many are wanted, and whether they still are, asked where the worker says "later".
Ask = Callable[[int, Callable[[], bool]], Fetched]
Take = Callable[[Fetched], Grant | NoSamples]


def taker(work_dir: Path, schema: Mapping[str, str]) -> Take:
    """Return what makes rows of an answer. It raises JobFailed naming a slice that is wrong."""

    def take(answer: Fetched) -> Grant | NoSamples:
        if isinstance(answer, NoSamples):
            return answer
        if not isinstance(answer, SamplesFetched):
            raise RemoteProtocolError(f"worker answered FetchSamples with {type(answer).__name__}")
        rows = Rows(work_dir / answer.path, schema)
        at = answer.interval
        if not at.start < at.stop <= rows.samples:
            raise JobFailed(f"slice {rows.path.name}: rows [{at.start}, {at.stop}) of {rows.samples}")
        return Grant(at, rows, at.start)

    return take


class Fetching:
    """One FetchSamples under way in a thread of its own, which also maps what comes."""

    def __init__(self, ask: Ask, wanted: int, take: Take) -> None:
        self._abandoned = threading.Event()
        self._call = Call("fetch-samples", lambda: take(ask(wanted, self._abandoned.is_set)))

    def wait(self, timeout_s: float) -> Grant | NoSamples | None:
        """Return the answer, None if there is none yet. Raises what the request raised."""
        return self._call.result() if self._call.over.wait(timeout_s) else None

    def abandon(self) -> None:
        """Nobody wants it any more: it is not asked for again where the worker says "later"."""
        self._abandoned.set()


class Feed:
    """The samples of one round; a context manager whose end gives up what is still being fetched.

    `ask` is called in a thread. `leave()`, called in the caller's own thread, ends a wait. `first` is under way.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        take: Take,
        grant_samples: int,
        leave: Callable[[], bool],
        first: Fetching | None = None,
    ) -> None:
        self.used: list[Interval] = []
        self.exhausted = False
        self._ask = ask
        self._take = take
        self._grant_samples = grant_samples
        self._ahead = 0
        self._leave = leave
        self._grant: Grant | None = None
        self._fetching = first

    def __enter__(self) -> "Feed":
        """Nothing else is fetched before the first `take`."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Whatever is under way is no longer wanted."""
        if self._fetching is not None:
            self._fetching.abandon()

    def holds(self, samples: int) -> bool:
        """Whether so many can be taken without another grant."""
        return self._grant is not None and self._grant.left >= samples

    @property
    def full(self) -> bool:
        """A contribution can name no more intervals."""
        return len(self.used) >= INTERVALS_PER_CONTRIBUTION_MAX

    def take(self, samples: int, *, then: int) -> Batch | None:
        """Return `samples` rows; fewer only when no more are left; None when none are, or `leave()`.

        `then`: how many more this round may take after these; no more than that is asked for ahead.
        Raises JobFailed (slice with the wrong tensors), BridgeRefused, BridgeClosed.
        """
        parts: list[Batch] = []
        missing = samples
        self._ahead = max(0, then)
        while missing and not self.full:
            grant = self._current(missing)
            if grant is None:
                break
            count = min(missing, grant.left)
            parts.append(grant.rows.read(grant.next, grant.next + count))
            self._note(grant, count)
            missing -= count
            if grant.left <= self._grant_samples // 2:
                self._prefetch(missing + self._ahead - grant.left)
        return joined(parts) if parts else None

    def _note(self, grant: Grant, count: int) -> None:
        at = grant.interval
        taken = Interval(epoch=at.epoch, slice=at.slice, start=grant.next, stop=grant.next + count)
        grant.next += count
        last = self.used[-1] if self.used else None
        if last and (last.epoch, last.slice, last.stop) == (taken.epoch, taken.slice, taken.start):
            taken = Interval(epoch=at.epoch, slice=at.slice, start=last.start, stop=taken.stop)
            self.used.pop()
        self.used.append(taken)

    def _prefetch(self, samples: int) -> None:
        wanted = min(samples, self._grant_samples)
        if wanted > 0 and self._fetching is None and not self.exhausted:
            self._fetching = Fetching(self._ask, wanted, self._take)

    def _current(self, missing: int) -> Grant | None:
        """The grant to take from; waits for one. None: nothing left, or no longer wanted."""
        while self._grant is None or not self._grant.left:
            if self.exhausted or self._leave():
                return None
            self._prefetch(missing + self._ahead)
            assert self._fetching is not None
            answer = self._fetching.wait(POLL_S)
            if answer is None:
                continue
            self._fetching = None
            self.exhausted = isinstance(answer, NoSamples)
            self._grant = None if isinstance(answer, NoSamples) else answer
        return self._grant


def rows_of(batch: Batch) -> int:
    """How many samples a batch holds."""
    return len(next(iter(batch.values())))


def joined(parts: list[Batch]) -> Batch:
    """Rows of several batches under each other."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
