"""What a worker tells an executor process that was started before its job: one JSON line on its standard input.

worker ── WarmStart ──▶ python -m hypha.training.warm ──▶ the executor of that job, as if it had been started for it
       ── end of input ▶ it ends: nobody is left to give it a job
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

# Paths and a few variables; far more is no message of ours.
LINE_BYTES_MAX = 1 << 16


class WarmStart(Struct, frozen=True, kw_only=True):
    """The job to begin: its class, the executor's arguments, its directory, and what its environment holds besides."""

    work: Literal["train", "aggregate"]
    arguments: Annotated[tuple[str, ...], Meta(max_length=16)]
    directory: str
    environment: Annotated[dict[str, str], Meta(max_length=64)]
