"""The updates of a parameter server's shard: files that arrive, are held, and go.

PushUpdate ─▶ arriving(ticket) ─▶ keep ─▶ merge, again and again ─▶ forget
                    └── Prepare: the executor begins to read them on their way
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hypha.network.transfer import partial_path
from hypha.protocol.bridge import FileRef, Merge, MergeInput, Prepare
from hypha.protocol.collect import Foreseen, MergePlan
from hypha.protocol.messages import Contribution, PartRef
from hypha.telemetry import inject

SPOOL = "spool"


class Spool:
    """Files in a folder of the job's directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._arriving: dict[int, FileRef] = {}  # by ticket
        self._held: dict[tuple[str, int, str], FileRef] = {}  # by whose it is, and the digest of the whole update

    def make(self) -> None:
        """Make the folder."""
        (self._directory / SPOOL).mkdir(exist_ok=True)

    @contextmanager
    def arriving(self, ticket: int, part: PartRef) -> Iterator[tuple[Path, FileRef]]:
        """Give a transfer its place while the context is open; what an error leaves there is removed."""
        path = self._directory / SPOOL / f"{ticket}.safetensors"
        self._arriving[ticket] = file = FileRef(path=f"{SPOOL}/{path.name}", bytes=part.bytes, digest=part.digest)
        try:
            yield path, file
        except BaseException:
            path.unlink(missing_ok=True)
            partial_path(path).unlink(missing_ok=True)
            raise
        finally:
            del self._arriving[ticket]

    def keep(self, contribution: Contribution, file: FileRef) -> None:
        """Hold what has arrived."""
        self._held[_key(contribution)] = file

    def forget(self, contributions: Iterable[Contribution]) -> None:
        """Remove what is of no use any more."""
        for gone in contributions:
            file = self._held.pop(_key(gone), None)
            if file is not None:
                (self._directory / file.path).unlink(missing_ok=True)

    def prepare(self, foreseen: Foreseen, traceparent: str | None) -> Prepare:
        """Return what the executor may begin with."""
        tickets = zip(foreseen.inputs, foreseen.tickets, strict=True)
        files = {_key(each): self._arriving[ticket] for each, ticket in tickets if ticket is not None}
        return Prepare(
            round=foreseen.round,
            base_digest=foreseen.base_digest,
            inputs=_inputs(foreseen.inputs, {**self._held, **files}),
            traceparent=traceparent,
        )

    def merge(self, plan: MergePlan) -> Merge:
        """Return what the executor is asked for."""
        return Merge(
            round=plan.round,
            close=plan.close,
            base_digest=plan.base_digest,
            inputs=_inputs(plan.inputs, self._held),
            traceparent=inject(),
        )


def _key(contribution: Contribution) -> tuple[str, int, str]:
    return contribution.peer_id, contribution.fence, contribution.digest


def _inputs(
    contributions: Iterable[Contribution], files: Mapping[tuple[str, int, str], FileRef]
) -> tuple[MergeInput, ...]:
    return tuple(
        MergeInput(peer_id=each.peer_id, fence=each.fence, samples=each.samples, file=files[_key(each)])
        for each in contributions
    )
