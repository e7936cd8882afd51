"""The outer step of DiLoCo (arXiv 2311.08105, §2): Nesterov SGD on the mean of the workers' pseudo-gradients.

    Δ  = θ_start − θ_end                    one sign, in one place: `pseudo_gradient`
    Δ̄  = Σ (n_i / N) · Δ_i                  in (peer id, fence) order, n_i samples of N
    v' = μ·v + Δ̄      U = lr·(μ·v' + Δ̄)      θ' = θ − U

Everything is fp32 on the CPU, the same bits on every machine (`arithmetic`). All files are walked together in pieces
of a tensor: a merge needs the memory of a dozen pieces, however large the model and however many the workers. A step
walks twice (`Step`): once for what the workers wait for, U and the digest of θ', and for Δ̄; then for v' and θ', while U
travels. The first walk may begin while contributions still arrive (`ahead`).

Where updates are coded (hypha.protocol.compression), U is what the coded file decodes to, here as at the workers. What
coding lost is owed: with a coding that wants feedback it is added to the next U, and until then lies beside the
momentum, each tensor's elements in pairs (v, owed).

Where the model is synchronised in fragments (hypha.protocol.fragments), pseudo-gradient, record and update hold the
tensors of one; model and momentum stay whole, and what is not of the fragment is copied.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from msgspec import Struct

from hypha.errors import RemoteProtocolError
from hypha.protocol.compression import PLAIN, Coding
from hypha.protocol.job import OuterOptimizer
from hypha.training.arithmetic import mean, nesterov
from hypha.training.arriving import Arriving
from hypha.training.coded import CodedReader, CodedWriter, Generators
from hypha.training.tensors import Digester, Piece, Reader, Shapes, Writer, Written, is_finite, mismatch, pieces_of

PARTS = ("model", "momentum", "record", "update")


class Share(Struct, frozen=True):
    """One contribution to a mean: its file and the samples it was trained on."""

    path: Path
    samples: int
    name: str  # for people: whose it is
    arriving: Arriving | None = None  # the same file, where it may not be whole yet


class Stepped(Struct, frozen=True):
    """What an outer step wrote: θ', v', Δ̄ and U, and the Euclidean norm of U."""

    model: Written
    momentum: Written
    record: Written
    update: Written
    update_norm: float = 0.0


def pseudo_gradient(
    out: Path,
    base: Path,
    parameters: Mapping[str, torch.Tensor],
    *,
    coding: Coding = PLAIN,
    generators: Generators | None = None,
    owed: Path | None = None,
    lost: Path | None = None,
    fragment: Collection[str] | None = None,
) -> Written:
    """Write Δ = θ_start − θ_end, θ_start being the file the round began with, θ_end the parameters now.

    Plus what an earlier coding lost, `owed`; what this one loses is written to `lost`. Both are plain files.
    Raises RemoteProtocolError: it cannot be coded.
    """
    start, debt = Reader(base), None if owed is None else Reader(owed)
    shapes = _moved(start.layout.shapes(), fragment)
    with ExitStack() as stack:
        file = stack.enter_context(CodedWriter(out, shapes, coding, generators))
        rest = None if lost is None else stack.enter_context(Writer(lost, shapes))
        for piece in pieces_of(shapes):
            delta = start.part(piece) - piece.of(parameters[piece.name])
            if debt is not None:
                delta += debt.part(piece)
            sent = file.append(piece, delta)
            if rest is not None:
                rest.append(delta - sent)
        if rest is not None:
            rest.finish()
        return file.finish()


def subtract(
    out: Path, base: Path, update: Path, *, coding: Coding = PLAIN, fragment: Collection[str] | None = None
) -> Written:
    """Write θ' = θ − U: what every worker does with an outer update, as the parameter server did."""
    model = Reader(base)
    moved = _moved(model.layout.shapes(), fragment)
    change = _coded(update, moved, coding, "update")
    with Writer(out, model.layout.shapes()) as file:
        for piece in model.pieces():
            before = model.part(piece)
            file.append(before - change.part(piece) if piece.name in moved else before)
        return file.finish()


def load(parameters: Mapping[str, torch.Tensor], base: Path, update: Path, *, coding: Coding = PLAIN) -> str:
    """Give parameters the values θ' = θ − U, and return the digest of the file that `subtract` would write."""
    model = Reader(base)
    shapes = model.layout.shapes()
    change, digest = _coded(update, shapes, coding, "update"), Digester(shapes)
    with torch.no_grad():
        for piece in model.pieces():
            after = model.part(piece) - change.part(piece)
            digest.append(after)
            piece.put(parameters[piece.name], after)
    return digest.finish()


def _moved(shapes: Shapes, fragment: Collection[str] | None) -> Shapes:
    return shapes if fragment is None else {name: shape for name, shape in shapes.items() if name in fragment}


def zeros(out: Path, shapes: Shapes) -> Written:
    """Write the momentum before the first step."""
    with Writer(out, shapes) as file:
        for name in file.names:
            file.append(torch.zeros(shapes[name]))
        return file.finish()


class Made(Struct, frozen=True):
    """The first part of an outer step: U, the digest that θ' will have, Δ̄, and the Euclidean norm of U."""

    update: Written
    model_digest: str
    record: Written
    update_norm: float


class Step:
    """One outer step in two parts: `make` what the workers wait for, then `keep` the state that follows from it."""

    def __init__(
        self,
        outs: Mapping[str, Path],
        *,
        model: Path,
        momentum: Path,
        shares: Sequence[Share],
        outer: OuterOptimizer,
        upward: Coding = PLAIN,
        downward: Coding = PLAIN,
        fragment: Collection[str] | None = None,
    ) -> None:
        """Merge contributions, coded `upward`, and take one outer step; `outs` names the four files by PARTS.

        The update is written as `downward` codes it. `fragment`: names of the tensors that are moved, None for all.
        Raises RemoteProtocolError: nothing to merge, or wrong tensors.
        """
        counted = [share for share in shares if share.samples > 0]
        if not counted:
            raise RemoteProtocolError("a total weight of zero is not a step")
        self.outs, self._outer, self._downward = outs, outer, downward
        self._theta = Reader(model)
        self._shapes = self._theta.layout.shapes()
        self._moved = _moved(self._shapes, fragment)
        self._velocity = Velocity(momentum, self._shapes)
        self._deltas = [
            (_coded(share.path, self._moved, upward, f"contribution of {share.name}", share.arriving), share.samples)
            for share in counted
        ]
        self._samples = sum(share.samples for share in counted)

    def make(self) -> Made:
        """Write U and Δ̄. Raises RemoteProtocolError: the result is not finite. Then neither file is left."""
        squares, digest = 0.0, Digester(self._shapes)
        with (
            CodedWriter(self.outs["update"], self._moved, self._downward) as sent,
            Writer(self.outs["record"], self._moved) as record,
        ):
            for piece in self._theta.pieces():
                before = self._theta.part(piece)
                if piece.name not in self._moved:
                    digest.append(before)
                    continue
                gradient = mean(((file.part(piece), count) for file, count in self._deltas), samples=self._samples)
                speed, update = self._nesterov(piece, gradient)
                applied = sent.append(piece, update)
                after = before - applied
                if not (is_finite(after) and is_finite(speed)):
                    raise RemoteProtocolError(f"the outer step makes tensor {piece.name!r} not finite")
                digest.append(after)
                record.append(gradient)
                squares += float(torch.linalg.vector_norm(applied)) ** 2
            return Made(sent.finish(), digest.finish(), record.finish(), math.sqrt(squares))

    def keep(self, made: Made) -> Stepped:
        """Write θ' and v', which follow from what `make` wrote: contributions are not needed any more."""
        feedback, held = self._downward.feedback, pairs(self._shapes) if self._downward.feedback else self._shapes
        sent, record = _coded(made.update.path, self._moved, self._downward, "update"), Reader(made.record.path)
        with Writer(self.outs["model"], self._shapes) as model, Writer(self.outs["momentum"], held) as momentum:
            for piece in self._theta.pieces():
                before = self._theta.part(piece)
                if piece.name not in self._moved:
                    model.append(before)
                    momentum.append(self._velocity.as_is(piece, owing=feedback))
                    continue
                applied = sent.part(piece)
                model.append(before - applied)
                speed, update = self._nesterov(piece, record.part(piece))
                momentum.append(paired(speed, update - applied) if feedback else speed)
            return Stepped(model.finish(), momentum.finish(), made.record, made.update, made.update_norm)

    def take(self) -> Stepped:
        """Take both parts. Raises RemoteProtocolError: the result is not finite. Then no file is left."""
        return self.keep(self.make())

    def _nesterov(self, piece: Piece, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return v' and U before it is coded, with what is owed where that is wanted."""
        speed, owed = self._velocity.part(piece)
        speed, update = nesterov(speed, gradient, self._outer)
        if owed is not None and self._downward.feedback:
            update += owed
        return speed, update


class Velocity:
    """Reads a momentum's file: v, and what is owed where the step that wrote it coded its update with feedback."""

    def __init__(self, path: Path, shapes: Shapes) -> None:
        self._file = Reader(path)
        self._owing = mismatch(self._file.layout, pairs(shapes)) is None and bool(shapes)
        fault = None if self._owing else mismatch(self._file.layout, shapes)
        if fault is not None:
            raise RemoteProtocolError(f"momentum: {fault}")

    def part(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return v and what is owed, None where nothing can be."""
        if not self._owing:
            return self._file.part(piece), None
        both = self._file.part(Piece(piece.name, 2 * piece.start, 2 * piece.stop)).view(-1, 2)
        return both[:, 0].clone(), both[:, 1].clone()

    def as_is(self, piece: Piece, *, owing: bool) -> torch.Tensor:
        """Return what the next momentum holds of a tensor that the step does not touch."""
        speed, owed = self.part(piece)
        return paired(speed, torch.zeros_like(speed) if owed is None else owed) if owing else speed


def pairs(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors that hold two numbers for every element."""
    return {name: (*shape, 2) for name, shape in shapes.items()}


def paired(speed: torch.Tensor, owed: torch.Tensor) -> torch.Tensor:
    """Flat tensors as one, element beside element."""
    return torch.stack((speed, owed), dim=1).reshape(-1)


def _coded(path: Path, shapes: Shapes, coding: Coding, what: str, arriving: Arriving | None = None) -> CodedReader:
    try:
        return CodedReader(path, shapes, coding, arriving)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{what}: {error}") from error


def replay(
    outs: Mapping[str, Path],
    *,
    model: Path,
    momentum: Path,
    record: Path,
    outer: OuterOptimizer,
    downward: Coding = PLAIN,
    fragment: Collection[str] | None = None,
) -> Stepped:
    """Take again the outer step whose Δ̄ was recorded: the same bits as when it was first taken."""
    shares = [Share(record, 1, "record")]
    step = Step(outs, model=model, momentum=momentum, shares=shares, outer=outer, downward=downward, fragment=fragment)
    return step.take()
