"""The job's chain, replayed from its first model by nothing but its records: the same bits, or a fault in words.

record/, model/ of round 0 ── linked away as they appear, before pruning takes them ──▶ DIR/kept/
chain ─▶ protocol.manifest.Chain (one successor each, no sample twice) ─▶ training.outer.replay ─▶ digests
every start of a scheduler ─▶ began with round, samples and model of the newest commit before its epoch entry
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from hypha.dataset import open_dataset
from hypha.errors import HyphaError
from hypha.protocol import manifest
from hypha.protocol.job import OuterOptimizer
from hypha.store.chain import Chain
from hypha.store.objects import open_objects
from hypha.training.outer import PARTS, replay
from tests.chaos.story import Resumed, Story

OUTER = OuterOptimizer(learning_rate=0.7, momentum=0.9)


class Archive:
    """Keeps a link to whatever the store may prune and the replay needs."""

    def __init__(self, store: Path, kept: Path) -> None:
        self._store = store
        self._kept = kept
        kept.mkdir()

    def keep(self) -> None:
        """Link what is new."""
        for pattern in ("record/*", "model/00000000-*", "momentum/00000000-*"):
            for path in self._store.glob(pattern):
                with suppress(FileExistsError, FileNotFoundError):
                    os.link(path, self._kept / f"{path.parent.name}-{path.name}")


class Verdict(Struct, frozen=True):
    """What the chain says of a job: its commits, and everything that is wrong with them."""

    rounds: int
    samples: int
    epochs: int
    faults: tuple[str, ...]
    resume_faults: tuple[str, ...]


def judge(store: Path, kept: Path, dataset: Path, story: Story) -> Verdict:
    """Replay a finished job."""
    opened = open_dataset(dataset)
    rounds: list[manifest.RoundCommitted] = []
    before: dict[int, Resumed] = {}
    faults: list[str] = []
    try:
        links = Chain(open_objects(str(store))).load()
        entries = [manifest.from_bytes(link.payload) for link in links]
        chain = manifest.Chain(entries[0].job_id, opened.manifest.train)
        for link, entry in zip(links, entries, strict=True):
            if isinstance(entry, manifest.JobEpochStarted):
                at = chain.state
                before[entry.job_epoch] = Resumed(at.round, at.samples, at.model_digest or "", entry.job_epoch)
            else:
                rounds.append(entry)
            chain.append(link.digest, entry)
        faults += _replay(kept, rounds)
        end = chain.state
    except HyphaError as error:
        return Verdict(len(rounds), 0, 0, (f"chain: {error}",), ("the chain cannot be read",))
    if story.finished is not None and story.finished.model_digest != end.model_digest:
        faults.append("the final model is not the one of the last commit")
    return Verdict(end.round, end.samples, end.epoch, tuple(faults), tuple(_resumes(story.starts, before)))


def _resumes(starts: Sequence[Resumed], before: dict[int, Resumed]) -> list[str]:
    faults = []
    for start in starts:
        there = before.get(start.job_epoch)
        if there is None:
            faults.append(f"job epoch {start.job_epoch} is not in the chain")
        elif (start.round, start.samples) != (there.round, there.samples):
            faults.append(f"job epoch {start.job_epoch} began with {start}, the chain had {there}")
        elif start.round and start.model_digest != there.model_digest:
            faults.append(f"job epoch {start.job_epoch} began with another model than round {start.round} left")
    return faults


def _replay(kept: Path, rounds: Sequence[manifest.RoundCommitted]) -> list[str]:
    """Take every outer step again; returns how the results differ from what was committed."""
    base_digest = rounds[0].merged.base_digest
    model, momentum = kept / f"model-00000000-{base_digest}", next(kept.glob("momentum-00000000-*"), kept)
    if not model.exists():
        return ["the initial model was never stored"]
    faults: list[str] = []
    for number, entry in enumerate(rounds, start=1):
        merged = entry.merged
        if (merged.round, merged.base_digest) != (number, base_digest):
            return [*faults, f"entry {number} is round {merged.round} on another base"]
        outs = {part: kept / f"replayed-{number % 2}-{part}" for part in PARTS}
        record = kept / f"record-{number:08d}-{merged.record_digest}"
        stepped = replay(outs, model=model, momentum=momentum, record=record, outer=OUTER)
        if (stepped.model.digest, stepped.momentum.digest) != (merged.model_digest, merged.momentum_digest):
            return [*faults, f"round {number} replayed is not what was committed"]
        model, momentum, base_digest = outs["model"], outs["momentum"], merged.model_digest
    return faults
