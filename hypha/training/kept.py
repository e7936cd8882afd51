"""What a training executor keeps of rounds that are not committed yet, to be able to go back to them.

    Book[r] = Kept(base, own parameters and inner state at r's beginning, the update that was sent, debts)
      put(r) ── replaces r, and its base on disk          forget(r) ── r is committed: the files up to it may go

A debt is what coding an update lost (hypha.training.outer). It is its fragment's, and waits for that one's next turn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hypha.protocol.bridge import FileRef, SendUpdate
from hypha.protocol.messages import Interval
from hypha.training.inner import Inner


@dataclass
class Kept:
    """One uncommitted round as this executor has it."""

    base: Sequence[Path]  # by shard
    digest: str
    inner: Inner  # at the round's beginning
    update: SendUpdate | None = None
    contributed: bool = False
    out: bool = False  # the update is on its way
    ahead: bool = False  # the next round's inner steps may go on without their base
    early: bool = False  # its outer update is not to be applied yet
    begun: bool = False  # inner steps were taken on it
    requests: int = 0  # FetchSamples made so far
    refusals: int = 0
    fragment: int = 0  # what it synchronises
    local: Path | None = None  # own parameters at the beginning, the base not yet mixed in; None: they were the base
    # What codings before this round lost, by fragment and shard.
    owed: Mapping[int, tuple[Path, ...]] = field(default_factory=dict)
    lost: tuple[Path, ...] = ()  # what will be owed once this round's update was accepted

    def numbered(self) -> int:
        """Return the number of the next FetchSamples."""
        self.requests += 1
        return self.requests - 1

    def sent(self, round_: int, files: tuple[FileRef, ...], used: Sequence[Interval], loss: float) -> SendUpdate:
        """Describe the update that training on `used` gave."""
        return SendUpdate(
            round=round_,
            base_digest=self.digest,
            files=files,
            samples=sum(interval.samples for interval in used),
            intervals=tuple(sorted(used)),
            loss=loss,
        )


class Book(dict[int, Kept]):
    """Kept rounds by number; `debts` are all files of what was lost that are on disk."""

    def __init__(self, work_dir: Path) -> None:
        super().__init__()
        self.work_dir = work_dir
        self.debts: set[Path] = set()

    def put(self, round_: int, kept: Kept) -> None:
        """Keep a round, in place of what was kept under that number."""
        old = self.get(round_)
        self[round_] = kept
        if old is not None:
            remove(set(old.base) - set(kept.base))

    def owed(self, round_: int) -> Mapping[int, tuple[Path, ...]]:
        """What a round that begins now has to make good: what the last accepted update of each fragment lost."""
        before = max((number for number in self if number < round_), default=None)
        if before is None:
            return self[round_].owed if round_ in self else {}
        kept = self[before]
        return {**kept.owed, kept.fragment: kept.lost} if kept.contributed and kept.lost else kept.owed

    def forget(self, round_: int, *, here: int) -> None:
        """Drop what was kept to undo rounds up to `round_`, but not where the model stands."""
        for number in [one for one in self if one <= round_ and one != here]:
            kept = self.pop(number)
            update = () if kept.update is None else kept.update.files
            own = [path for path in (kept.inner.path, kept.local) if path is not None]
            remove([*kept.base, *own, *(self.work_dir / file.path for file in update)])
        needed = {path for kept in self.values() for each in (*kept.owed.values(), kept.lost) for path in each}
        remove(self.debts - needed)
        self.debts &= needed


def remove(paths: Iterable[Path]) -> None:
    """Remove files that nobody needs any more, if they are there."""
    for path in paths:
        path.unlink(missing_ok=True)
