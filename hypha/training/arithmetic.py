"""The arithmetic of an outer step, every multiply and every add rounded by itself: no fused multiply-add.

One kernel's contraction would change the last bit from machine to machine, and records replayed elsewhere would not
give the committed model: so no `alpha=` and no `addcmul`. Several operations in turn go over a block that stays in the
processor's nearer cache: three quarters of the time that they take over a piece of a megabyte, one after the other.
"""

from collections.abc import Iterable

import torch

from hypha.protocol.job import OuterOptimizer

# 128 KiB of fp32: half a dozen operands stay in the second-level cache. Less is all overhead of calls.
BLOCK_ELEMENTS = 1 << 15


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """factor · tensor, the factor rounded to fp32 first, one rounding per element."""
    return tensor * _rounded(factor)


def mean(weighted: Iterable[tuple[torch.Tensor, int]], *, samples: int) -> torch.Tensor:
    """Mean of (tensor, its samples), added up in the order given; `samples` is the sum of all.

    Holds two tensors: the sum and the one read. An only contributor weighs exactly 1.
    """
    parts = iter(weighted)
    first, count = next(parts)
    total, share = scaled(first, count / samples).contiguous(), torch.empty(BLOCK_ELEMENTS)
    for tensor, count in parts:
        weight = _rounded(count / samples)
        for into, block in zip(_blocks(total), _blocks(tensor), strict=True):
            into += torch.mul(block, weight, out=share[: block.numel()])
    return total


def nesterov(
    momentum: torch.Tensor, gradient: torch.Tensor, outer: OuterOptimizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (v', U) for one tensor: v' = μ·v + Δ̄ and U = lr·(μ·v' + Δ̄); θ' is θ − U."""
    decay, rate = _rounded(outer.momentum), _rounded(outer.learning_rate)
    velocity, update = torch.empty(gradient.shape), torch.empty(gradient.shape)
    blocks = (_blocks(each) for each in (momentum, gradient, velocity, update))
    for before, slope, after, moved in zip(*blocks, strict=True):
        torch.mul(before, decay, out=after)
        after += slope
        torch.mul(after, decay, out=moved)
        moved += slope
        moved *= rate
    return velocity, update


def _rounded(factor: float) -> torch.Tensor:
    return torch.tensor(factor, dtype=torch.float32)


def _blocks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of all elements in their order; copies where it is not contiguous."""
    return torch.split(tensor.reshape(-1), BLOCK_ELEMENTS)
