"""Which tensors of a model which outer step synchronises: Streaming DiLoCo (arXiv 2501.18512).

    embed  layer 0  layer 1  layer 2  layer 3  layer 4  head     layers strided over the fragments; what comes before
      A      A        B        C        A        B       B       the first layer and after the last goes with them

    round        1   2   3   4   5   6  …     round r synchronises fragment (r-1) mod F:
    fragment     A   B   C   A   B   C  …     F rounds move the whole model

A layer is what shares the first number in its tensors' names ("model.layers.7.mlp…", "h.7.attn…"), as transformers and
torch name them. Workers and parameter server split alike without a word: names alone decide.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, TypeVar

from msgspec import Meta, Struct

from hypha.errors import ConfigError

# A fragment is a layer at least; no model has more of them worth a round each.
FRAGMENTS_MAX = 256
# Inner steps that a synchronisation may take: the run-ahead bound of any real round is far below it.
OVERLAP_STEPS_MAX = 1 << 20
# Parts of names without a number that say "before the first layer": anything else comes after the last one.
INPUT_PARTS = ("embed", "wte", "wpe", "patch", "stem", "position", "cls_token")

T = TypeVar("T")
Layer = tuple[str, int]


class Streaming(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the model is synchronised: piece by piece, and while the workers train on.

    fragments      into how many parts the model is split, by layers; each outer step synchronises one, in turn
    overlap_steps  inner steps of the next round before an outer update is applied; with 0 a worker waits for it
    mixing         weight of the synchronised value over the worker's own; 1: it takes the place of it
    """

    fragments: Annotated[int, Meta(ge=1, le=FRAGMENTS_MAX)] = 1
    overlap_steps: Annotated[int, Meta(ge=0, le=OVERLAP_STEPS_MAX)] = 0
    mixing: Annotated[float, Meta(gt=0, le=1)] = 1.0

    @property
    def plain(self) -> bool:
        """Whether this is DiLoCo (arXiv 2311.08105): a round's beginning is its base, and nothing else is kept."""
        return self == Streaming()

    def turn(self, round_: int) -> int:
        """Return which fragment a round synchronises."""
        return (round_ - 1) % self.fragments


class Fragments:
    """The split of one model; `names` are its tensors' in any order. Raises ConfigError: too few layers for it."""

    def __init__(self, names: Iterable[str], streaming: Streaming) -> None:
        self.streaming = streaming
        self.parts = split(names, streaming.fragments)

    def of(self, round_: int) -> frozenset[str]:
        """Return the names of the tensors that a round synchronises."""
        return self.parts[self.streaming.turn(round_)]

    def among(self, tensors: Mapping[str, T], round_: int) -> dict[str, T]:
        """Return what belongs to the tensors that a round synchronises."""
        names = self.of(round_)
        return {name: value for name, value in tensors.items() if name in names}

    def say(self, round_: int) -> str:
        """Say for people what a round synchronises; nothing where that is the whole model."""
        count = self.streaming.fragments
        fragment = f"fragment {self.streaming.turn(round_) + 1} of {count}"
        return f"round {round_} synchronises {fragment}: " if count > 1 else ""


def split(names: Iterable[str], fragments: int) -> tuple[frozenset[str], ...]:
    """Return the names of each fragment. Raises ConfigError when the model has fewer layers than that."""
    every = sorted(names)
    found: dict[str, Layer | None] = {name: layer_of(name) for name in every}
    layers = sorted({layer for layer in found.values() if layer is not None})
    if fragments > max(1, len(layers)):
        raise ConfigError(f"streaming.fragments {fragments} exceeds the {len(layers)} layers of this model")
    turn = {layer: number % fragments for number, layer in enumerate(layers)}
    last = turn[layers[-1]] if layers else 0
    parts: list[set[str]] = [set() for _ in range(fragments)]
    for name, layer in found.items():
        outside = 0 if any(part in name for part in INPUT_PARTS) else last
        parts[outside if layer is None else turn[layer]].add(name)
    return tuple(frozenset(part) for part in parts)


def layer_of(name: str) -> Layer | None:
    """Return the layer of a tensor: where its stack begins in the module tree, and its number there; None: no layer."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return None if number is None else (".".join(parts[:number]), int(parts[number]))
