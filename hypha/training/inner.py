"""Inner steps: AdamW (arXiv 1711.05101) on one worker's own samples.

    batch ─▶ forward ─▶ loss ─▶ backward ─▶ clip ─▶ AdamW at the schedule's learning rate

The optimizer's state stays with the worker across rounds. `save` and `restore` put it on disk and back, so that a
round that was never committed can be trained again.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from torch import nn

from hypha.errors import JobFailed
from hypha.protocol.job import InnerOptimizer, Schedule
from hypha.telemetry import get_logger
from hypha.training.models import without_cache
from hypha.training.tensors import Reader, save

log = get_logger("training.inner")

Batch = Mapping[str, torch.Tensor]
# Labels with this value are not predicted (torch.nn.CrossEntropyLoss, transformers).
IGNORED_LABEL = -100


class Inner(Struct, frozen=True):
    """The inner optimizer at one moment: its moments on disk (None before the first step), and where it stands."""

    path: Path | None
    steps: int
    offset: int | None
    rng: tuple[torch.Tensor, ...]  # of the processor, then of each device


class InnerLoop:
    """A model and its AdamW. `steps` counts since this process began; see `finished_round` for `offset`."""

    def __init__(self, model: nn.Module, inner: InnerOptimizer, device: torch.device) -> None:
        self.model = without_cache(model).to(device).train()
        self.inner = inner
        self.device = device
        self.steps = 0
        self.offset: int | None = None
        self.step_s = 0.0
        self._named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._optimizer = torch.optim.AdamW(
            list(self._named.values()),
            lr=inner.learning_rate,
            betas=inner.betas,
            eps=inner.epsilon,
            weight_decay=inner.weight_decay,
            fused=True,
        )

    def step(self, batch: Batch, *, round_: int) -> float:
        """Take one inner step and return its loss. Raises JobFailed naming step and loss when that is not finite."""
        began = time.monotonic()
        for group in self._optimizer.param_groups:
            group["lr"] = self.inner.learning_rate * factor(self.inner.schedule, self.steps + (self.offset or 0))
        self._optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.model, batch, self.device)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise JobFailed(f"loss is {value} at inner step {self.steps} of this worker, in round {round_}")
        loss.backward()  # type: ignore[no-untyped-call]
        if self.inner.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._named.values(), self.inner.clip_norm)
        self._optimizer.step()
        self.steps += 1
        self.step_s = time.monotonic() - began
        if self.steps == 1:
            log.info("First inner step", round=round_, seconds=round(self.step_s, 3))
        return value

    def finished_round(self, round_: int, steps: int) -> None:
        """Find this worker's place in the schedule after its first round: as many steps as that one, times the rounds
        before it. A worker that joins late so warms up, as its empty moments want it, and then decays with the others.
        """
        if self.offset is None and steps:
            self.offset = (round_ - 1) * steps

    def save(self, path: Path) -> Inner:
        """Keep the optimizer as it is now."""
        state = self._optimizer.state
        tensors = {
            f"{name}/{moment}": state[parameter][moment]
            for name, parameter in self._named.items()
            for moment in ("exp_avg", "exp_avg_sq")
            if parameter in state
        }
        written = save(path, tensors).path if tensors else None
        return Inner(written, self.steps, self.offset, (torch.get_rng_state(), *torch.cuda.get_rng_state_all()))

    def restore(self, kept: Inner) -> None:
        """Go back to what `save` kept."""
        self._optimizer.state.clear()
        if kept.path is not None:
            file = Reader(kept.path)
            for name, parameter in self._named.items():
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(kept.steps), dtype=torch.float32, device=self.device),
                    "exp_avg": file.read(f"{name}/exp_avg").to(self.device, copy=True),
                    "exp_avg_sq": file.read(f"{name}/exp_avg_sq").to(self.device, copy=True),
                }
        self.steps, self.offset = kept.steps, kept.offset
        torch.set_rng_state(kept.rng[0])
        torch.cuda.set_rng_state_all(kept.rng[1:])


def factor(schedule: Schedule, step: int) -> float:
    """Learning-rate factor of inner step `step`, counted from 0: linear warm-up, the named shape, then `floor`."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.type == "constant" or schedule.total_steps is None:
        return 1.0
    begin = schedule.warmup_steps
    if schedule.type == "wsd" and schedule.decay_steps is not None:
        begin = max(begin, schedule.total_steps - schedule.decay_steps)
    if step < begin:
        return 1.0
    progress = min(1.0, (step - begin) / max(1, schedule.total_steps - begin))
    shape = (1 + math.cos(math.pi * progress)) / 2 if schedule.type == "cosine" else 1 - progress
    return schedule.floor + (1 - schedule.floor) * shape


def loss_of(model: nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """Return the model's own loss. Raises JobFailed when the model computes none."""
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    try:
        output: Any = model(**inputs)
    except TypeError as error:
        raise JobFailed(f"model does not take tensors {', '.join(sorted(inputs))}: {error}") from error
    loss = output.get("loss")
    if not isinstance(loss, torch.Tensor):
        raise JobFailed(f"model computes no loss from tensors {', '.join(sorted(inputs))}; is one named 'labels'?")
    return loss


def predicted(batch: Batch, *, shifted: bool) -> int:
    """How many predictions a batch's loss is the mean over: its labels, less the first of each row if `shifted`."""
    labels = batch["labels"]
    return int(((labels[:, 1:] if shifted else labels) != IGNORED_LABEL).sum())
