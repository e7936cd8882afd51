"""A worker's model as its parameter servers share it: one file for each shard, and the same arithmetic on every one.

    bases, parameters ──pseudo_gradients──▶ Δ by shard, what coding lost by shard
    bases, updates    ──subtract─────────▶ θ' by shard
    bases, updates    ──move─────────────▶ θ' in the parameters, and by shard a little later

One server has the whole model: then there is one file. Nothing here depends on how the tensors are split, so neither
does the trained model.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import overload

import msgspec
import torch

from hypha.protocol.bridge import FileRef
from hypha.protocol.compression import Coding
from hypha.protocol.messages import Interval
from hypha.training import outer
from hypha.training.tensors import Written, aside


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


def move(
    outs: Sequence[Path],
    bases: Sequence[Path],
    updates: Sequence[Path],
    parts: tuple[str, ...],
    *,
    coding: Coding,
    fragment: Collection[str],
    into: Mapping[str, torch.Tensor] | None,
) -> Sequence[Path]:
    """Write the bases θ' that updates lead to; nothing where their digests are not `parts`.

    `into` are parameters that are the base and nothing else: they have its values when this returns, and the files
    follow while they are in use. Raises RemoteProtocolError: an update does not fit its base.
    """
    if into is None:
        written = subtract(outs, bases, updates, coding=coding, fragment=fragment)
        digests = tuple(each.digest for each in written)
    else:
        pairs = zip(bases, updates, strict=True)
        digests = tuple(outer.load(into, base, update, coding=coding) for base, update in pairs)
    if into is not None and digests == parts:
        return Behind(outs, bases, updates, coding=coding)
    return tuple(outs) if digests == parts else ()


class Behind(Sequence[Path]):
    """The files of θ' = θ − U, written while their values are already in use; whoever asks for them waits until then.

    It holds links of its own to bases and updates, so that they may be removed.
    """

    def __init__(self, outs: Sequence[Path], bases: Sequence[Path], updates: Sequence[Path], *, coding: Coding) -> None:
        self._outs = tuple(outs)
        bases = [_linked(base, out.with_name(f"{out.name}.base")) for base, out in zip(bases, outs, strict=True)]
        updates = [_linked(update, out.with_name(f"{out.name}.sub")) for update, out in zip(updates, outs, strict=True)]
        self._done = aside(partial(_write, self._outs, bases, updates, coding))

    def __len__(self) -> int:
        """Count them."""
        return len(self._outs)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...

    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        """Return what is asked for once it is written. Raises StoreError: it could not be."""
        self._done.result()
        return self._outs[index]


def _linked(path: Path, link: Path) -> Path:
    link.unlink(missing_ok=True)
    link.hardlink_to(path)
    return link


def _write(outs: Sequence[Path], bases: Sequence[Path], updates: Sequence[Path], coding: Coding) -> None:
    for out, base, update in zip(outs, bases, updates, strict=True):
        outer.subtract(out, base, update, coding=coding)
        base.unlink()
        update.unlink()


def generator_of(round_: int, used: Sequence[Interval], tensor: str) -> torch.Generator:
    """Randomness of a worker's own, yet the same again: no two workers take the same samples in the same round."""
    seed = hashlib.sha256(msgspec.json.encode((round_, sorted(used), tensor))).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed[:8], "little") >> 1)
