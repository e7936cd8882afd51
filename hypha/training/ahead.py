"""An outer step begun before its round is closed, on updates that still arrive.

    Prepare(round, base, inputs) ─▶ a thread walks all files together, as far as they have come ─▶ U, Δ̄
    Merge(the same round, base and inputs) ─▶ taken as it is: the same files, in the same order, so the same bits
    any other Merge, another Prepare       ─▶ given up

What arrives is not verified while it is read. It is once the server may name it in a Merge, under the same path, and a
path is used for one transfer only: what was read is then what was verified. If the step fails, nothing is said about
why: the files are screened and merged in the ordinary way, which finds out who is to blame.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from msgspec import Struct

from hypha.errors import RemoteProtocolError, StoreError
from hypha.protocol.bridge import FileRef, Merge, MergeInput, Prepare
from hypha.telemetry import get_logger, span_from
from hypha.training.arriving import Arriving
from hypha.training.outer import Made, Share, Step

log = get_logger("training.ahead")

# Each is a descriptor; where there are more, the round is merged when it is closed.
INPUTS_MAX = 256

# So long one that is here waits for those that still arrive, before it is screened by itself.
OTHERS_WAIT_S = 0.2

# Returns the step that merges these shares into files of its own.
Begin = Callable[[Sequence[Share]], Step]


class Begun(Struct, frozen=True):
    """A step whose first part is made."""

    step: Step
    made: Made


class _Attempt(Struct, frozen=True):
    """One Prepare, from its arrival to its end."""

    wanted: Prepare
    given_up: threading.Event
    begun: Future[Begun | None]


class Ahead:
    """The newest such step, in a thread of its own; use as a context manager."""

    def __init__(self, work_dir: Path) -> None:
        self._work_dir = work_dir
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._attempt: _Attempt | None = None

    def __enter__(self) -> "Ahead":
        """Nothing runs yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give up what is under way."""
        self.give_up()
        self._pool.shutdown()

    def prepare(self, wanted: Prepare, begin: Begin) -> None:
        """Begin with these instead of whatever was begun before."""
        self.give_up()
        if len(wanted.inputs) > INPUTS_MAX:
            return
        given_up = threading.Event()
        self._attempt = _Attempt(wanted, given_up, self._pool.submit(self._made, wanted, given_up, begin))

    def take(self, merge: Merge) -> Begun | None:
        """Return what this Merge asks for, if it was begun and comes out; else None, and it is given up."""
        attempt = self._attempt
        if attempt is None or not _same(attempt.wanted, merge):
            self.give_up()
            return None
        self._attempt = None
        return attempt.begun.result()

    def found_sound(self, file: FileRef) -> bool:
        """Whether this update has been read to its end with others, and all of it is sound. False: not known.

        Waits a moment for the end of the step, which reads what screening would read once more.
        """
        attempt = self._attempt
        if attempt is None or all(one.file != file for one in attempt.wanted.inputs):
            return False
        here = all((self._work_dir / one.file.path).exists() for one in attempt.wanted.inputs)
        try:
            return attempt.begun.result(None if here else OTHERS_WAIT_S) is not None
        except TimeoutError:
            return False

    def give_up(self) -> None:
        """End what is under way, and remove what it wrote."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        attempt.given_up.set()
        begun = attempt.begun.result()
        if begun is not None:
            for written in (begun.made.update, begun.made.record):
                written.path.unlink(missing_ok=True)

    def _made(self, wanted: Prepare, given_up: threading.Event, begin: Begin) -> Begun | None:
        with span_from(wanted.traceparent, "merge_ahead", round=wanted.round) as span, ExitStack() as stack:
            try:
                step = begin([self._share(one, given_up, stack) for one in in_order(wanted.inputs)])
                return Begun(step, step.make())
            except (RemoteProtocolError, StoreError, OSError) as error:  # OSError: a base that went meanwhile
                log.debug("Not merged ahead", round=wanted.round, reason=str(error))
                if given_up.is_set():
                    span.set(given_up=True)  # whatever came of that, nobody wanted it any more
                else:
                    span.fail(error)
                return None

    def _share(self, one: MergeInput, given_up: threading.Event, stack: ExitStack) -> Share:
        path = self._work_dir / one.file.path
        arriving = Arriving(path, one.file.bytes, given_up)
        stack.callback(arriving.close)
        return Share(path, one.samples, name_of(one), arriving)


def in_order(inputs: Sequence[MergeInput]) -> list[MergeInput]:
    """The order in which contributions are added up."""
    return sorted(inputs, key=lambda one: (one.peer_id, one.fence))


def name_of(one: MergeInput) -> str:
    """Whose it is, for people."""
    return f"{one.peer_id}/{one.fence}"


def _same(wanted: Prepare, merge: Merge) -> bool:
    same_base = (wanted.round, wanted.base_digest) == (merge.round, merge.base_digest)
    return same_base and in_order(wanted.inputs) == in_order(merge.inputs)
