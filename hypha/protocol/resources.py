"""What a worker has and a task needs: CPU cores, memory, storage and GPUs, as one vector.

cpu      cores            gpu      devices (0.5 shares one)
memory   GB (10^9 bytes)  storage  GB (10^9 bytes)

Arithmetic is done in whole millionths, so that ten times 0.1 is exactly 1 and what is returned is what was taken.
An amount below half a millionth counts as none.
"""

import math
from typing import Annotated

from msgspec import Meta, Struct

from hypha.errors import LocalProtocolError

AMOUNT_MAX = 1e9
Amount = Annotated[float, Meta(ge=0, le=AMOUNT_MAX)]

KINDS = ("cpu", "memory", "storage", "gpu")
_MILLIONTHS = 1_000_000


class ResourceWeights(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many units one core, one GB of memory, one GB of storage and one GPU are worth when prices are compared.

    The defaults follow what clouds charge: a training GPU costs about as much as 16 cores, a core as 4 GB of memory.
    """

    cpu: Amount = 1.0
    memory: Amount = 0.25
    storage: Amount = 0.01
    gpu: Amount = 16.0


DEFAULT_WEIGHTS = ResourceWeights()


class Resources(Struct, frozen=True, kw_only=True):
    """A non-negative, finite amount of each kind; missing means none. Raises ValueError for anything else."""

    cpu: Amount = 0.0
    memory: Amount = 0.0
    storage: Amount = 0.0
    gpu: Amount = 0.0

    def __post_init__(self) -> None:
        """Refuse what no machine has; NaN would compare false with everything and so fit everywhere."""
        for kind in KINDS:
            amount = getattr(self, kind)
            if not 0 <= amount <= AMOUNT_MAX:
                raise ValueError(f"{kind} must be between 0 and {AMOUNT_MAX:g}, got {amount!r}")

    def __str__(self) -> str:
        """Say the amounts that are there: `cpu 4, gpu 1`."""
        return ", ".join(f"{kind} {getattr(self, kind):g}" for kind in KINDS if self._millionths(kind)) or "nothing"

    @property
    def is_zero(self) -> bool:
        """Whether there is none of any kind."""
        return not any(self._millionths(kind) for kind in KINDS)

    def fits_in(self, room: "Resources") -> bool:
        """Return whether `room` has at least this much of every kind."""
        return not self.lacking_in(room)

    def lacking_in(self, room: "Resources") -> tuple[str, ...]:
        """Return the kinds of which `room` has too little, in the order of KINDS."""
        return tuple(kind for kind in KINDS if self._millionths(kind) > room._millionths(kind))

    def plus(self, other: "Resources") -> "Resources":
        """Return the sum."""
        return _from_millionths([self._millionths(kind) + other._millionths(kind) for kind in KINDS])

    def minus(self, other: "Resources") -> "Resources":
        """Return what is left. Raises LocalProtocolError when `other` does not fit in this."""
        if lacking := other.lacking_in(self):
            raise LocalProtocolError(f"cannot take {other} from {self}: too little {', '.join(lacking)}")
        return _from_millionths([self._millionths(kind) - other._millionths(kind) for kind in KINDS])

    def join(self, other: "Resources") -> "Resources":
        """Return the smallest amounts in which both fit."""
        return _from_millionths([max(self._millionths(kind), other._millionths(kind)) for kind in KINDS])

    def units(self, weights: ResourceWeights = DEFAULT_WEIGHTS) -> float:
        """Return the amounts as one number, each kind weighted."""
        return math.fsum(getattr(self, kind) * getattr(weights, kind) for kind in KINDS)

    def _millionths(self, kind: str) -> int:
        amount: float = getattr(self, kind)
        return round(amount * _MILLIONTHS)


NOTHING = Resources()


def _from_millionths(amounts: list[int]) -> Resources:
    cpu, memory, storage, gpu = (amount / _MILLIONTHS for amount in amounts)
    return Resources(cpu=cpu, memory=memory, storage=storage, gpu=gpu)
