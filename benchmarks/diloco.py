"""Held-out loss of DiLoCo beside plain data-parallel AdamW: same model, same tokens, two workers.

    data-parallel   every step: both workers' batches, one averaged gradient, one AdamW
    DiLoCo          `--inner` steps of AdamW on each worker, then one Nesterov outer step (hypha.training.outer)

One process plays both workers in turn, so the comparison is of the algorithm and repeats exactly: real text (the
standard library's source), the product's own model builder, inner loop and outer arithmetic. Bytes are what each
worker sends and receives per token: fp32 gradients by ring all-reduce every step, against one pseudo-gradient up and
one update down per outer step.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Figure, print_report
from hypha.dataset import open_dataset
from hypha.dataset_tool import prepare
from hypha.demo.corpus import standard_library
from hypha.protocol.job import InnerOptimizer, ModelSpec, OuterOptimizer, Schedule
from hypha.training.arithmetic import mean, nesterov
from hypha.training.batches import Batch, Rows
from hypha.training.inner import InnerLoop, loss_of
from hypha.training.models import build, parameters_of

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.06,
}
WORKERS = 2
BATCH = 16
HELD_OUT_BATCHES = 16
WARMUP_STEPS = 10
# Not the paper's 0.7 and 0.9: in a dozen outer steps so much momentum overshoots more than it gains. With these, a run
# of four outer steps of 50 inner ones ended 5.6 % above data-parallel, with the paper's 9.0 %, without momentum 4.8 %.
OUTER = OuterOptimizer(learning_rate=0.9, momentum=0.5)
CPU = torch.device("cpu")
# Communicating 1/H as often may cost this much of the loss that data-parallel reaches on the same tokens.
LOSS_RATIO_WANTED = 1.05
FP32_BYTES = 4


class Text:
    """Training batches in a fixed order, and held-out ones."""

    def __init__(self, directory: Path) -> None:
        dataset = open_dataset(directory)
        schema = dict(dataset.manifest.schema)
        self._train = [Rows(directory / ref.name, schema) for ref in dataset.manifest.train]
        self._held_out = [Rows(directory / ref.name, schema) for ref in dataset.manifest.held_out]

    def batches(self) -> Iterator[Batch]:
        """Yield batches of BATCH rows until the text ends."""
        for rows in self._train:
            for start in range(0, rows.samples - BATCH + 1, BATCH):
                yield labelled(rows.read(start, start + BATCH))

    def held_out(self) -> list[Batch]:
        """Return the batches that judge a model."""
        rows = self._held_out[0]
        count = min(HELD_OUT_BATCHES, rows.samples // BATCH)
        return [labelled(rows.read(n * BATCH, (n + 1) * BATCH)) for n in range(count)]


def labelled(batch: Batch) -> Batch:
    """Return a batch whose labels are its own tokens."""
    return {**batch, "labels": batch["input_ids"]}


def inner(steps: int) -> InnerOptimizer:
    """Return the demo's inner optimizer for a run of `steps`, the same for both ways."""
    schedule = Schedule(type="cosine", warmup_steps=WARMUP_STEPS, total_steps=steps, floor=0.1)
    return InnerOptimizer(learning_rate=3e-3, weight_decay=0.1, clip_norm=1.0, schedule=schedule)


def judge(model: torch.nn.Module, batches: list[Batch]) -> float:
    """Return the mean loss in nats per predicted byte."""
    with torch.no_grad():
        return statistics.mean(float(loss_of(model, batch, CPU)) for batch in batches)


def fresh() -> torch.nn.Module:
    """Return the model that both ways start from."""
    return build(ModelSpec(config=MODEL))


def data_parallel(text: Text, steps: int) -> float:
    """Train with one AdamW on both workers' batches; returns the held-out loss."""
    model, batches = fresh(), text.batches()
    loop = InnerLoop(model, inner(steps), CPU)
    for _ in range(steps):
        pair = [next(batches) for _ in range(WORKERS)]
        loop.step({name: torch.cat([batch[name] for batch in pair]) for name in pair[0]}, round_=1)
    return judge(model, text.held_out())


def diloco(text: Text, steps: int, inner_steps: int, optimizer: OuterOptimizer) -> float:
    """Train the same tokens with an outer step after every `inner_steps`; returns the held-out loss."""
    batches = text.batches()
    models = [fresh() for _ in range(WORKERS)]
    loops = [InnerLoop(model, inner(steps), CPU) for model in models]
    base = {name: tensor.detach().clone() for name, tensor in parameters_of(models[0]).items()}
    momentum = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    for number in range(steps // inner_steps):
        for _ in range(inner_steps):
            for loop in loops:
                loop.step(next(batches), round_=number + 1)
        for name, start in base.items():
            deltas = [(start - parameters_of(model)[name].detach(), inner_steps * BATCH) for model in models]
            average = mean(deltas, samples=WORKERS * inner_steps * BATCH)
            momentum[name], update = nesterov(momentum[name], average, optimizer)
            base[name] = start - update
        for model in models:
            for name, tensor in parameters_of(model).items():
                tensor.data.copy_(base[name])
    return judge(models[0], text.held_out())


def _prepare(directory: Path) -> None:
    prepare(
        [Path(path) for path in standard_library().sources],
        directory,
        name="text",
        sequence_length=128,
        slice_bytes=1 << 22,
        held_out=0.05,
        seed=0,
        max_bytes=None,
        digest="sha256",
        force=False,
    )


def main() -> None:
    """Train both ways and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outer", type=int, default=12, help="outer steps")
    parser.add_argument("--inner", type=int, default=20, help="inner steps between two outer ones, per worker")
    parser.add_argument("--learning-rate", type=float, default=OUTER.learning_rate, help="of the outer optimizer")
    parser.add_argument("--momentum", type=float, default=OUTER.momentum, help="of the outer optimizer")
    arguments = parser.parse_args()
    optimizer = OuterOptimizer(learning_rate=arguments.learning_rate, momentum=arguments.momentum)
    steps = arguments.outer * arguments.inner
    with tempfile.TemporaryDirectory(prefix="hypha-bench-") as folder:
        directory = Path(folder) / "text"
        _prepare(directory)
        text = Text(directory)
        initial = judge(fresh(), text.held_out())
        began = time.perf_counter()
        parallel = data_parallel(text, steps)
        middle = time.perf_counter()
        local = diloco(text, steps, arguments.inner, optimizer)
        ended = time.perf_counter()
    parameters = sum(tensor.numel() for tensor in parameters_of(fresh()).values())
    ring = 2 * (WORKERS - 1) / WORKERS * 2 * parameters * FP32_BYTES / (BATCH * 128)
    outer = 2 * parameters * FP32_BYTES / (arguments.inner * BATCH * 128)
    figures = [
        Figure("held_out_loss_ratio_to_data_parallel", round(local / parallel, 4), LOSS_RATIO_WANTED, "lower", "ratio"),
        Figure("bytes_ratio_to_data_parallel", round(ring / outer, 2), float(arguments.inner), "higher", "ratio"),
    ]
    detail = {
        "initial_loss": round(initial, 4),
        "data_parallel_loss": round(parallel, 4),
        "diloco_loss": round(local, 4),
        "parameters": parameters,
        "workers": WORKERS,
        "tokens": steps * WORKERS * BATCH * 128,
        "outer_optimizer": optimizer,
        "outer_steps": arguments.outer,
        "inner_steps": arguments.inner,
        "bytes_per_token": {"data_parallel": round(ring, 1), "diloco": round(outer, 1)},
        "seconds": {"data_parallel": round(middle - began, 1), "diloco": round(ended - middle, 1)},
    }
    print_report("diloco", figures, detail)


if __name__ == "__main__":
    main()
