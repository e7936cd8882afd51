"""An executor's own parameters, where they are not simply the base it stands on (Streaming DiLoCo, arXiv 2501.18512).

    own θ ──inner steps──▶ θ ──save──▶ file ──▶ base r known: θ_f ← α·θ_f,base + (1-α)·θ_f   f: what round r moved
                                └── restore: as the round began, to train it again

Only a synchronised fragment comes from the base; the others stay as the inner steps left them. So a round's beginning
is a file of its own, and mixing in the base's newest fragment.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from hypha.training.tensors import Reader


def mix(
    parameters: Mapping[str, torch.Tensor], base: Sequence[Path], *, fragment: Collection[str], weight: float
) -> None:
    """Draw a fragment's parameters towards the base's, by shard: all the way with weight 1, to the last bit."""
    with torch.no_grad():
        for name, file in ((name, part) for part in map(Reader, base) for name in part.names if name in fragment):
            theirs = file.read(name).to(parameters[name].device, parameters[name].dtype)
            if weight == 1.0:
                parameters[name].copy_(theirs)
            else:
                parameters[name].lerp_(theirs, weight)
