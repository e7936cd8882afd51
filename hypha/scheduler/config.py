"""The scheduler's configuration: where it keeps its state, and the job it runs.

state_dir                  journal, chain of committed rounds, records and checkpoints
checkpoint_url             the same for artifacts elsewhere: a directory or an fsspec URL
[scheduler.job]            name, model, preprocessor, dataset, optimizers
[scheduler.job.rounds]     how many, how long, how few may close one      (hypha.protocol.job.Rounds)
[scheduler.job.compression]  codecs of pseudo-gradients and outer updates   (hypha.protocol.compression)
[scheduler.job.streaming]  fragments, and updates beside inner steps      (hypha.protocol.fragments)
[scheduler.job.resources]  workers and parameter servers: how many, what they need, what they may cost
"""

from math import ceil
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from hypha.config import NodeConfig
from hypha.network.breaker import BreakerLimits
from hypha.protocol.compression import Compression
from hypha.protocol.fragments import Streaming
from hypha.protocol.job import InnerOptimizer, ModelSpec, OuterOptimizer, PreprocessorSpec, Rounds
from hypha.protocol.resources import Resources
from hypha.protocol.shards import SHARDS_MAX

Name = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Price(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is bid in public per lease-hour, and what is paid at most, which stays private."""

    bid: Annotated[float, Meta(gt=0)] = 1.0
    max: Annotated[float, Meta(gt=0)] | None = None

    def __post_init__(self) -> None:
        """Refuse a maximum below the bid."""
        if self.max is not None and self.max < self.bid:
            raise ValueError(f"max {self.max:g} is below bid {self.bid:g}")

    @property
    def limit(self) -> float:
        """The most that is paid: `max`, or the bid where there is none."""
        return self.bid if self.max is None else self.max


class JobResources(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who is wanted for the job.

    The run starts with `min_workers` at least and takes up to `workers`; each must have what `worker` says. `find_s`:
    the job fails when they cannot be had by then. Once it runs, it waits while fewer than `min_workers` are leased;
    where that is not given, it goes on with whoever reaches the quorum. Beyond `workers` it takes those that come, up
    to `max_workers`. `parameter_servers` share the model, tensor by tensor, evenly by bytes; each has a lease of its
    own. A job keeps the number that it was begun with.
    """

    workers: Annotated[int, Meta(ge=1, le=4096)] = 1
    min_workers: Annotated[int, Meta(ge=1, le=4096)] | None = None
    max_workers: Annotated[int, Meta(ge=1, le=4096)] | None = None
    parameter_servers: Annotated[int, Meta(ge=1, le=SHARDS_MAX)] = 1
    executor: Annotated[str, Meta(min_length=1)] = "diloco-transformer"
    parameter_server_executor: Annotated[str, Meta(min_length=1)] = "parameter-server"
    worker: Resources = Resources(cpu=1.0, memory=1.0)
    parameter_server: Resources = Resources(cpu=1.0, memory=1.0)
    worker_price: Price = Price()
    parameter_server_price: Price = Price()
    find_s: Annotated[float, Meta(gt=0)] = 600.0

    def __post_init__(self) -> None:
        """Refuse a minimum above what is wanted."""
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} exceeds workers {self.workers}")
        if self.max_workers is not None and self.max_workers < self.workers:
            raise ValueError(f"max_workers {self.max_workers} is below workers {self.workers}")

    @property
    def fewest(self) -> int:
        """How many workers the run needs to start: `min_workers`, or all of them where it is not given."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def most(self) -> int:
        """How many workers the run takes: `max_workers`, or those wanted at the start where it is not given."""
        return self.workers if self.max_workers is None else self.max_workers


class DatasetConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A dataset by name; `digest` pins its manifest, otherwise the first one provided under the name is pinned."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None


class CheckpointConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Model and momentum are stored every `every` rounds and at the end; the last `keep` stay, and `keep_every`ths."""

    every: Annotated[int, Meta(ge=1)] = 10
    keep: Annotated[int, Meta(ge=1)] = 3
    keep_every: Annotated[int, Meta(ge=0)] = 0


class JobConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training job."""

    model: ModelSpec
    dataset: DatasetConfig | str
    rounds: Rounds
    name: Name = "job"
    preprocessor: PreprocessorSpec | None = None
    inner_optimizer: InnerOptimizer = InnerOptimizer()
    outer_optimizer: OuterOptimizer = OuterOptimizer()
    compression: Compression = Compression()
    streaming: Streaming = Streaming()
    resources: JobResources = JobResources()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        """Refuse a quorum that the wanted workers could never reach, and a codec under which training diverges."""
        if self.rounds.quorum > self.resources.workers:
            raise ValueError(f"rounds.quorum {self.rounds.quorum} exceeds resources.workers {self.resources.workers}")
        if self.compression.outer_updates == "topk" and self.outer_optimizer.momentum > 0:
            # What topk delays by some 1/density rounds, momentum goes on adding to: the model oscillates ever wider.
            raise ValueError("compression.outer_updates 'topk' needs outer_optimizer.momentum 0")
        # An update that is not due yet at the next synchronisation is applied there: nobody runs on beyond it.
        batches = ceil(self.rounds.samples_between_updates / self.rounds.max_batch_size)
        steps = ceil(batches / self.resources.workers)
        if self.streaming.overlap_steps > steps:
            overlap = self.streaming.overlap_steps
            raise ValueError(f"streaming.overlap_steps {overlap} exceeds the {steps} inner steps of a round")

    @property
    def dataset_config(self) -> DatasetConfig:
        """The dataset, also where only its name was given."""
        return DatasetConfig(name=self.dataset) if isinstance(self.dataset, str) else self.dataset


class SchedulerTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The [scheduler] table."""

    job: JobConfig
    # How long offers are welcome after an advertisement, and the rest between two that found too few.
    welcome_s: Annotated[float, Meta(gt=0, le=60)] = 2.0
    retry_s: Annotated[float, Meta(gt=0)] = 2.0
    # The share of all workers that the first advertisement asks; later ones ask as many as its offers say are needed.
    first_fraction: Annotated[float, Meta(gt=0, le=1)] = 1.0
    # One message without an answer for so long is sent again.
    patience_s: Annotated[float, Meta(gt=0)] = 15.0
    # A standby takes over where the leader has not renewed its hold on the job's store for so long.
    hold_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0
    breaker: BreakerLimits = BreakerLimits()


class Config(NodeConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a scheduler reads from its file."""

    scheduler: SchedulerTable
    state_dir: Path = Path("state")
    checkpoint_url: str | None = None
