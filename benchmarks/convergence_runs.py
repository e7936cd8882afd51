"""One training run of the convergence table: a small model, real text, all workers played in turn by one process.

    data-parallel   every step: all workers' batches, one averaged gradient, one AdamW
    DiLoCo          H steps of AdamW on each worker ─▶ pseudo_gradient ─▶ step ─▶ subtract, as files in a directory:
                    the product's arithmetic and codecs, error feedback included, without a network between
    fragments       the model's tensors in F groups, each with its own base and momentum; group k is synchronised at
                    inner steps kH/F, (k+F)H/F, …, and applied `overlap` steps later as α·θ_global + (1-α)·θ_local

The same spec gives the same numbers. A run sees `batches` batches, whatever the number of workers.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct

from hypha.dataset import open_dataset
from hypha.protocol.compression import Coding
from hypha.protocol.fragments import split
from hypha.protocol.job import InnerOptimizer, ModelSpec, OuterOptimizer, Schedule
from hypha.training import outer, tensors
from hypha.training.batches import Batch, Rows
from hypha.training.inner import InnerLoop, loss_of
from hypha.training.models import build, parameters_of

SEQUENCE, BATCH = 64, 8
# Batches that a run trains on where nothing else is said, over all workers: 800 inner steps with two of them.
BATCHES = 1_600
HELD_OUT_BATCHES = 48
WARMUP_SHARE = 0.02
CPU = torch.device("cpu")
FP32_BYTES = 4
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": SEQUENCE,
    "tie_word_embeddings": False,
    "initializer_range": 0.06,
}


class Spec(Struct, frozen=True, kw_only=True):
    """What one run does; `inner_steps` 0 is data-parallel."""

    name: str
    seed: int = 0
    workers: int = 2
    batches: int = BATCHES
    inner_steps: int = 50
    learning_rate: float = 0.9
    momentum: float = 0.5
    upward: Coding = Coding()
    downward: Coding = Coding()
    fragments: int = 1
    overlap: int = 0
    mixing: float = 1.0

    @property
    def steps(self) -> int:
        """Inner steps of each worker."""
        return self.batches // self.workers

    @property
    def outer_steps(self) -> int:
        """How often each tensor is synchronised."""
        return self.steps // self.inner_steps if self.inner_steps else 0

    @property
    def tokens(self) -> int:
        """What all workers train on together."""
        return self.batches * BATCH * SEQUENCE

    @property
    def outer(self) -> OuterOptimizer:
        """The outer optimizer."""
        return OuterOptimizer(learning_rate=self.learning_rate, momentum=self.momentum)


class Outcome(Struct, frozen=True):
    """Held-out loss in nats per byte; bytes that one worker sends and receives per token that it trains on."""

    spec: Spec
    loss: float
    up: float
    down: float
    seconds: float


class Text:
    """Training batches in an order of the seed's, and held-out ones."""

    def __init__(self, directory: Path, seed: int, batches: int) -> None:
        dataset = open_dataset(directory)
        schema = dict(dataset.manifest.schema)
        slices = [Rows(directory / ref.name, schema) for ref in dataset.manifest.train]
        held_out = Rows(directory / dataset.manifest.held_out[0].name, schema)
        self._held_out = [held_out.read(n * BATCH, (n + 1) * BATCH) for n in range(HELD_OUT_BATCHES)]
        self._places = [(rows, at) for rows in slices for at in range(0, rows.samples - BATCH + 1, BATCH)]
        order = torch.randperm(len(self._places), generator=torch.Generator().manual_seed(seed))
        self._order = order.tolist()[:batches]
        assert len(self._order) == batches, f"{len(self._places)} batches of text are too few"

    def batches(self) -> Iterator[Batch]:
        """Yield the batches."""
        for place in self._order:
            rows, at = self._places[place]
            yield _labelled(rows.read(at, at + BATCH))

    def judge(self, model: torch.nn.Module) -> float:
        """Return the mean held-out loss."""
        with torch.no_grad():
            return statistics.mean(float(loss_of(model, _labelled(batch), CPU)) for batch in self._held_out)


def _labelled(batch: Batch) -> Batch:
    return {**batch, "labels": batch["input_ids"]}


def _inner(spec: Spec) -> InnerOptimizer:
    schedule = Schedule(
        type="cosine", warmup_steps=max(1, round(WARMUP_SHARE * spec.steps)), total_steps=spec.steps, floor=0.1
    )
    return InnerOptimizer(learning_rate=3e-3, weight_decay=0.1, clip_norm=1.0, schedule=schedule)


def _fresh(spec: Spec) -> torch.nn.Module:
    return build(ModelSpec(config=MODEL, seed=spec.seed))


def train(spec: Spec, dataset: Path) -> Outcome:
    """Run to the end."""
    torch.set_num_threads(1)
    torch.manual_seed(spec.seed)
    began, text = time.perf_counter(), Text(dataset, spec.seed, spec.batches)
    if spec.inner_steps == 0:
        loss, up, down = _data_parallel(spec, text)
    else:
        with tempfile.TemporaryDirectory(prefix="hypha-bench-") as folder:
            loss, up, down = DiLoCo(spec, text, Path(folder)).run()
    return Outcome(spec, round(loss, 4), round(up, 3), round(down, 3), round(time.perf_counter() - began, 1))


def _data_parallel(spec: Spec, text: Text) -> tuple[float, float, float]:
    model, batches = _fresh(spec), text.batches()
    loop = InnerLoop(model, _inner(spec), CPU)
    for _ in range(spec.steps):
        several = [next(batches) for _ in range(spec.workers)]
        loop.step({name: torch.cat([batch[name] for batch in several]) for name in several[0]}, round_=1)
    parameters = sum(tensor.numel() for tensor in parameters_of(model).values())
    ring = 2 * (spec.workers - 1) / spec.workers * parameters * FP32_BYTES / (BATCH * SEQUENCE)
    return text.judge(model), ring, ring


class Part:
    """One fragment: the names of its tensors, its base and momentum as files, what each worker and the server owe."""

    def __init__(self, directory: Path, number: int, spec: Spec, start: dict[str, torch.Tensor]) -> None:
        self.directory, self.number, self.spec = directory, number, spec
        self.names = set(start)
        self.base = tensors.save(directory / f"base-{number}-0", start).path
        self.momentum = outer.zeros(directory / f"momentum-{number}-0", tensors.shapes_of(start)).path
        self.owed: list[Path | None] = [None] * spec.workers
        self.rounds = self.up = self.down = 0
        self.due: dict[str, torch.Tensor] | None = None

    def of(self, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return this fragment's tensors."""
        return {name: tensor for name, tensor in parameters.items() if name in self.names}

    def synchronise(self, workers: list[dict[str, torch.Tensor]]) -> None:
        """Push, merge, step; the result is `due`."""
        self.rounds += 1
        stem = f"{self.number}-{self.rounds}"
        shares = [self._pushed(index, self.of(parameters), stem) for index, parameters in enumerate(workers)]
        stepped = outer.Step(
            {part: self.directory / f"{part}-{stem}" for part in outer.PARTS},
            model=self.base,
            momentum=self.momentum,
            shares=shares,
            outer=self.spec.outer,
            upward=self.spec.upward,
            downward=self.spec.downward,
        ).take()
        applied = outer.subtract(
            self.directory / f"base-{stem}", self.base, stepped.update.path, coding=self.spec.downward
        )
        assert applied.digest == stepped.model.digest
        self.up += sum(share.path.stat().st_size for share in shares)
        self.down += stepped.update.bytes * len(workers)
        for path in (self.base, self.momentum, stepped.model.path, stepped.record.path, stepped.update.path):
            path.unlink()
        self.base, self.momentum = applied.path, stepped.momentum.path
        file = tensors.Reader(self.base)
        self.due = {name: file.read(name) for name in file.names}

    def _pushed(self, index: int, parameters: dict[str, torch.Tensor], stem: str) -> outer.Share:
        coding = self.spec.upward
        lost = self.directory / f"lost-{stem}-{index}" if coding.feedback else None
        delta = outer.pseudo_gradient(
            self.directory / f"push-{self.number}-{index}",
            self.base,
            parameters,
            coding=coding,
            owed=self.owed[index],
            lost=lost,
        )
        self.owed[index] = lost
        return outer.Share(delta.path, self.spec.inner_steps * BATCH, str(index))

    def apply(self, workers: list[dict[str, torch.Tensor]]) -> None:
        """Mix what is due into every worker's parameters."""
        due, self.due = self.due, None
        if due is None:
            return
        with torch.no_grad():
            for parameters in workers:
                for name, value in due.items():
                    if self.spec.mixing < 1:
                        parameters[name].lerp_(value, self.spec.mixing)
                    else:
                        parameters[name].copy_(value)


class DiLoCo:
    """All workers of one run and the fragments that they synchronise."""

    def __init__(self, spec: Spec, text: Text, directory: Path) -> None:
        self.spec, self.text = spec, text
        models = [_fresh(spec) for _ in range(spec.workers)]
        self.loops = [InnerLoop(model, _inner(spec), CPU) for model in models]
        self.workers = [parameters_of(model) for model in models]
        start = {name: tensor.detach().clone() for name, tensor in self.workers[0].items()}
        self.parts = [
            Part(directory, number, spec, {name: start[name] for name in names})
            for number, names in enumerate(_split(start, spec.fragments))
        ]

    def run(self) -> tuple[float, float, float]:
        """Return the held-out loss of the global model, and bytes up and down per token."""
        spec, batches = self.spec, self.text.batches()
        period = max(1, spec.inner_steps // spec.fragments)
        for step in range(1, spec.steps + 1):
            for loop in self.loops:
                loop.step(next(batches), round_=step)
            if step % period == 0:
                turn = (step // period - 1) % spec.fragments
                self.parts[turn].synchronise(self.workers)
            for number, part in enumerate(self.parts):
                synced_at = (number + 1) * period + (part.rounds - 1) * period * spec.fragments
                if step >= synced_at + spec.overlap:
                    part.apply(self.workers)
        self._conclude()
        up, down = (sum(getattr(part, way) for part in self.parts) / spec.tokens for way in ("up", "down"))
        return self.text.judge(self.loops[0].model), up, down

    def _conclude(self) -> None:
        """The global model is what the parameter server holds: everybody takes that."""
        for part in self.parts:
            tensors.load_into(part.base, part.of(self.workers[0]))


def _split(start: dict[str, torch.Tensor], fragments: int) -> list[list[str]]:
    """Return the names of each fragment, as the product splits them."""
    return [sorted(part) for part in split(start, fragments)]
