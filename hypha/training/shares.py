"""A worker's model as its parameter servers share it: one file for each shard, and the same arithmetic on every one.

    bases, parameters ──pseudo_gradients──▶ Δ by shard, what coding lost by shard
    bases, updates    ──subtract─────────▶ θ' by shard

One server has the whole model: then there is one file. Nothing here depends on how the tensors are split, so neither
does the trained model.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import torch

from hypha.protocol.bridge import FileRef
from hypha.protocol.compression import Coding
from hypha.protocol.messages import Interval
from hypha.training import outer
from hypha.training.tensors import Written


def pseudo_gradients(
    bases: Sequence[Path],
    parameters: Mapping[str, torch.Tensor],
    *,
    round_: int,
    used: Sequence[Interval],
    coding: Coding,
    owed: Sequence[Path],
    lost: Sequence[Path],
    fragment: Collection[str],
    work_dir: Path,
) -> tuple[FileRef, ...]:
    """Write what the parameters have become since the base, coded, and what coding lost to `lost`, if that is wanted.

    `used` are the samples they were trained on, `fragment` the tensors that the round synchronises. Raises
    RemoteProtocolError: it cannot be coded.
    """
    written = [
        outer.pseudo_gradient(
            work_dir / f"update-{round_}-{shard}.safetensors",
            base,
            parameters,
            coding=coding,
            generators=partial(generator_of, round_, used),
            owed=owed[shard] if owed else None,
            lost=lost[shard] if lost else None,
            fragment=fragment,
        )
        for shard, base in enumerate(bases)
    ]
    return tuple(each.ref(work_dir) for each in written)


def subtract(
    outs: Sequence[Path], bases: Sequence[Path], updates: Sequence[Path], *, coding: Coding, fragment: Collection[str]
) -> list[Written]:
    """Write θ' = θ − U of every shard. Raises RemoteProtocolError: an update does not fit its base."""
    return [
        outer.subtract(out, base, update, coding=coding, fragment=fragment)
        for out, base, update in zip(outs, bases, updates, strict=True)
    ]


def generator_of(round_: int, used: Sequence[Interval], tensor: str) -> torch.Generator:
    """Randomness of a worker's own, yet the same again: no two workers take the same samples in the same round."""
    seed = hashlib.sha256(msgspec.json.encode((round_, sorted(used), tensor))).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed[:8], "little") >> 1)
