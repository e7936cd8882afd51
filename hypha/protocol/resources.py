"""What a worker has and a task needs: CPU cores, memory, storage and GPUs, as one vector.

cpu      cores            gpu      devices (0.5 shares one)
memory   GB (10^9 bytes)  storage  GB (10^9 bytes)
"""

from typing import Annotated

from msgspec import Meta, Struct

Amount = Annotated[float, Meta(ge=0, le=1e9)]


class Resources(Struct, frozen=True, kw_only=True):
    """A non-negative amount of each kind; missing means none."""

    cpu: Amount = 0.0
    memory: Amount = 0.0
    storage: Amount = 0.0
    gpu: Amount = 0.0
