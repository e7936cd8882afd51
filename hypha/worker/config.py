"""The worker's configuration: what it has, what it asks for it, and which executors it can run.

work_dir              job directories, the slice cache, fences, records of running executors
[resources]           cpu memory storage gpu; detected where left out
[offer]               price floor strategy …               (hypha.protocol.auction.OfferConfig)
[lease]               offer_ttl_s ttl_s
[transfers]           patience with broken streams
warm_executor         one idle process that has imported what the built-in executors need
[[executors]]         class name runtime cmd args
"""

import os
import shutil
from pathlib import Path
from typing import Annotated, Literal

import psutil
from msgspec import Meta, Struct, field

from hypha.config import NodeConfig
from hypha.network.breaker import BreakerLimits
from hypha.protocol.auction import OfferConfig
from hypha.protocol.resources import Resources

BYTES_PER_GB = 1e9


class ResourcesConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What this worker may lease out: cores and GB (10^9 bytes). Left out: what the machine has."""

    cpu: Annotated[float, Meta(gt=0)] | None = None
    memory: Annotated[float, Meta(gt=0)] | None = None
    storage: Annotated[float, Meta(gt=0)] | None = None
    gpu: Annotated[float, Meta(ge=0)] | None = None

    def detect(self, work_dir: Path) -> Resources:
        """Return the configured amounts, completed by what psutil and the GPU driver report."""
        return Resources(
            cpu=float(count_cores()) if self.cpu is None else self.cpu,
            memory=psutil.virtual_memory().total / BYTES_PER_GB if self.memory is None else self.memory,
            storage=shutil.disk_usage(work_dir).free / BYTES_PER_GB if self.storage is None else self.storage,
            gpu=float(count_gpus()) if self.gpu is None else self.gpu,
        )


class LeaseConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a lease lives without a renewal: the temporary one of an offer, then the renewable one."""

    offer_ttl_s: Annotated[float, Meta(gt=0, le=60)] = 5.0
    ttl_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0


class TransferConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Patience with broken streams: waits double from `backoff_s` to `backoff_max_s`, with jitter."""

    backoff_s: Annotated[float, Meta(gt=0)] = 0.25
    backoff_max_s: Annotated[float, Meta(gt=0)] = 8.0
    stall_s: Annotated[float, Meta(gt=0)] = 60.0  # one message or transfer without an answer for so long is retried
    at_once: Annotated[int, Meta(ge=1, le=256)] = 16  # streams a parameter server receives or sends at a time
    breaker: BreakerLimits = BreakerLimits()


class ExecutorConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A program this worker can run. Without `cmd`: the built-in executor of its class."""

    work: Literal["train", "aggregate"] = field(name="class")
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    runtime: Literal["process", "parameter-server"] = "process"
    cmd: Annotated[str, Meta(min_length=1)] | None = None
    args: tuple[str, ...] = ()
    # An executor that reports nothing for so long has failed; it covers loading a model and one evaluation.
    stall_s: Annotated[float, Meta(gt=0)] = 300.0
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None  # of torch; default: the lease's whole cores

    def __post_init__(self) -> None:
        """Refuse arguments without a program."""
        if self.args and self.cmd is None:
            raise ValueError("`args`: they need `cmd`; the built-in executors take none")
        if (self.runtime == "parameter-server") and self.work != "aggregate":
            raise ValueError("`runtime`: parameter-server is for class aggregate")


DEFAULT_EXECUTORS = (
    ExecutorConfig(work="train", name="diloco-transformer"),
    ExecutorConfig(work="aggregate", name="parameter-server", runtime="parameter-server"),
)


class Config(NodeConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a worker reads from its file."""

    work_dir: Path = Path("work")
    resources: ResourcesConfig = ResourcesConfig()
    offer: OfferConfig = OfferConfig()
    lease: LeaseConfig = LeaseConfig()
    transfers: TransferConfig = TransferConfig()
    executors: tuple[ExecutorConfig, ...] = DEFAULT_EXECUTORS
    cache_bytes: Annotated[int, Meta(ge=1 << 20)] = 10_000_000_000  # verified slices kept for the next epoch
    warm_executor: bool = False

    def __post_init__(self) -> None:
        """Refuse two executors of one name: a scheduler asks for them by it."""
        names = [executor.name for executor in self.executors]
        if not names:
            raise ValueError("`executors`: at least one is needed")
        if len(set(names)) < len(names):
            raise ValueError(f"`executors`: names must differ, got {', '.join(names)}")


def count_cores() -> int:
    """Return how many cores this process may use, or where the system does not tell, how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def count_gpus() -> int:
    """Return how many NVIDIA devices the driver reports; 0 without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def executor_named(config: Config, name: str, work: str) -> ExecutorConfig | None:
    """Return the executor a job asks for, or None where this worker has none such."""
    return next((e for e in config.executors if e.name == name and e.work == work), None)
