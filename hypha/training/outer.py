"""The outer step of DiLoCo (arXiv 2311.08105, §2): Nesterov SGD on the mean of the workers' pseudo-gradients.

    Δ  = θ_start − θ_end                    one sign, in one place: `pseudo_gradient`
    Δ̄  = Σ (n_i / N) · Δ_i                  in (peer id, fence) order, n_i samples of N
    v' = μ·v + Δ̄      U = lr·(μ·v' + Δ̄)      θ' = θ − U

Everything is fp32 on the CPU with every multiply and every add rounded by itself: no fused multiply-add, so no `alpha=`
and no `addcmul`. One kernel's contraction would change the last bit from machine to machine, and records replayed
elsewhere would not give the committed model. All files are walked together in pieces of a tensor: a merge needs the
memory of a dozen pieces, however large the model and however many the workers.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from msgspec import Struct

from hypha.errors import RemoteProtocolError
from hypha.protocol.job import OuterOptimizer
from hypha.training.tensors import Reader, Shapes, Writer, Written, is_finite, mismatch

PARTS = ("model", "momentum", "record", "update")


class Share(Struct, frozen=True):
    """One contribution to a mean: its file and the samples it was trained on."""

    path: Path
    samples: int
    name: str  # for people: whose it is


class Stepped(Struct, frozen=True):
    """What an outer step wrote: θ', v', Δ̄ and U, and the Euclidean norm of U."""

    model: Written
    momentum: Written
    record: Written
    update: Written
    update_norm: float = 0.0


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """factor · tensor, the factor rounded to fp32 first, one rounding per element."""
    return tensor * torch.tensor(factor, dtype=torch.float32)


def mean(weighted: Iterable[tuple[torch.Tensor, int]], *, samples: int) -> torch.Tensor:
    """Mean of (tensor, its samples), added up in the order given; `samples` is the sum of all.

    Holds three tensors: the sum, the one read and its share. An only contributor weighs exactly 1.
    """
    parts = iter(weighted)
    first, count = next(parts)
    total, part = scaled(first, count / samples), torch.empty_like(first)
    for tensor, count in parts:
        torch.mul(tensor, torch.tensor(count / samples, dtype=torch.float32), out=part)
        total += part
    return total


def nesterov(
    momentum: torch.Tensor, gradient: torch.Tensor, outer: OuterOptimizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (v', U) for one tensor; θ' is θ − U."""
    velocity = scaled(momentum, outer.momentum) + gradient
    update = scaled(scaled(velocity, outer.momentum) + gradient, outer.learning_rate)
    return velocity, update


def pseudo_gradient(out: Path, base: Path, parameters: Mapping[str, torch.Tensor]) -> Written:
    """Write Δ = θ_start − θ_end, θ_start being the file the round began with, θ_end the parameters now."""
    start = Reader(base)
    with Writer(out, start.layout.shapes()) as file:
        for piece in start.pieces():
            file.append(start.part(piece) - piece.of(parameters[piece.name]))
        return file.finish()


def subtract(out: Path, base: Path, update: Path) -> Written:
    """Write θ' = θ − U: what every worker does with an outer update, as the parameter server did."""
    model, change = Reader(base), Reader(update)
    _same_tensors(change, model.layout.shapes(), "update")
    with Writer(out, model.layout.shapes()) as file:
        for piece in model.pieces():
            file.append(model.part(piece) - change.part(piece))
        return file.finish()


def zeros(out: Path, shapes: Shapes) -> Written:
    """Write the momentum before the first step."""
    with Writer(out, shapes) as file:
        for name in file.names:
            file.append(torch.zeros(shapes[name]))
        return file.finish()


def step(
    outs: Mapping[str, Path], *, model: Path, momentum: Path, shares: Sequence[Share], outer: OuterOptimizer
) -> Stepped:
    """Merge contributions and take one outer step; `outs` names the four files by PARTS.

    Raises RemoteProtocolError: nothing to merge, wrong tensors, or a result that is not finite. Then no file is left.
    """
    counted = [share for share in shares if share.samples > 0]
    if not counted:
        raise RemoteProtocolError("a total weight of zero is not a step")
    theta, velocity = Reader(model), Reader(momentum)
    deltas = [(Reader(share.path), share.samples) for share in counted]
    for share, (file, _) in zip(counted, deltas, strict=True):
        _same_tensors(file, theta.layout.shapes(), f"contribution of {share.name}")
    samples = sum(share.samples for share in counted)
    squares = 0.0
    with _writers(outs, theta.layout.shapes()) as files:
        for piece in theta.pieces():
            gradient = mean(((file.part(piece), count) for file, count in deltas), samples=samples)
            speed, update = nesterov(velocity.part(piece), gradient, outer)
            after = theta.part(piece) - update
            if not (is_finite(after) and is_finite(speed)):
                raise RemoteProtocolError(f"the outer step makes tensor {piece.name!r} not finite")
            for part, elements in zip(PARTS, (after, speed, gradient, update), strict=True):
                files[part].append(elements)
            squares += float(torch.linalg.vector_norm(update)) ** 2
        written = {part: files[part].finish() for part in PARTS}
    return Stepped(**written, update_norm=math.sqrt(squares))


def _same_tensors(file: Reader, shapes: Shapes, what: str) -> None:
    fault = mismatch(file.layout, shapes)
    if fault is not None:
        raise RemoteProtocolError(f"{what}: {fault}")


@contextmanager
def _writers(outs: Mapping[str, Path], shapes: Shapes) -> Iterator[dict[str, Writer]]:
    with ExitStack() as stack:
        yield {part: stack.enter_context(Writer(outs[part], shapes)) for part in PARTS}


def replay(outs: Mapping[str, Path], *, model: Path, momentum: Path, record: Path, outer: OuterOptimizer) -> Stepped:
    """Take again the outer step whose Δ̄ was recorded: the same bits as when it was first taken."""
    return step(outs, model=model, momentum=momentum, shares=[Share(record, 1, "record")], outer=outer)
