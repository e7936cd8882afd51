"""What a job is: the part of a scheduler's configuration that travels to the workers, plus where to resume.

JobSpec ── model, preprocessor, dataset ── what is trained on what
        ── inner, outer, rounds         ── how (DiLoCo, arXiv 2311.08105)
        ── compression                  ── in what form updates travel
        ── streaming                    ── in which parts, and how long beside the inner steps
        ── resume                       ── which committed state a parameter server starts from
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from hypha.protocol.compression import Compression
from hypha.protocol.fragments import Streaming
from hypha.protocol.shards import SHARDS_MAX

Positive = Annotated[float, Meta(gt=0)]
NonNegative = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
AtLeastOne = Annotated[int, Meta(ge=1, le=2**40)]
Text = Annotated[str, Meta(min_length=1, max_length=1024)]
HexDigest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class ModelSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Exactly one of `repository` (a hub id), `path` (a directory every worker can read) or `config` (from scratch).

    `type` is a transformers Auto class by its task name ("causal-lm", "image-classification", …) or "torch" for a
    plain module described by `config`. `seed` fixes the initial weights when there are none to load.
    """

    type: Text = "causal-lm"
    repository: Text | None = None
    revision: Text | None = None
    path: Text | None = None
    config: dict[str, Any] | None = None
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0

    def __post_init__(self) -> None:
        """Refuse a model with no source or with several."""
        given = [k for k in ("repository", "path", "config") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"model needs exactly one of repository, path, config; got {given or 'none'}")


class PreprocessorSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A transformers processor applied to each batch: `inputs` maps its arguments to tensors of the slices."""

    type: Text = "auto"  # auto, tokenizer, image, feature
    repository: Text | None = None
    revision: Text | None = None
    path: Text | None = None
    inputs: dict[str, str] = {}

    def __post_init__(self) -> None:
        """Refuse a preprocessor with no source or with several."""
        if (self.repository is None) == (self.path is None):
            raise ValueError("preprocessor needs exactly one of repository, path")


class Schedule(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Learning-rate factor over inner steps, counted over the whole job: warm-up from 0, then the named shape.

    `wsd` (warm-up, stable, decay) decays linearly over the last `decay_steps`; after `total_steps` it stays at `floor`.
    """

    type: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: Annotated[int, Meta(ge=0)] = 0
    total_steps: AtLeastOne | None = None
    decay_steps: AtLeastOne | None = None
    floor: Annotated[float, Meta(ge=0, le=1)] = 0.0

    def __post_init__(self) -> None:
        """Refuse a decaying schedule without an end."""
        if self.type != "constant" and self.total_steps is None:
            raise ValueError(f"schedule {self.type!r} needs total_steps")
        if self.type == "wsd" and self.decay_steps is None:
            raise ValueError("schedule 'wsd' needs decay_steps")


class InnerOptimizer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """AdamW (arXiv 1711.05101) on each worker."""

    learning_rate: Positive = 4e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    clip_norm: Positive | None = None
    schedule: Schedule = Schedule()


class OuterOptimizer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """SGD with Nesterov momentum at the parameter server."""

    learning_rate: Positive = 0.7
    momentum: Fraction = 0.9


class Rounds(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How long, and how often the workers meet.

    updates                  outer steps in all
    samples_between_updates  per outer step, in total over all workers
    max_batch_size           samples per inner step at most
    deadline_s               a round closes then with whoever has contributed, if they reach the quorum
    quorum                   accepted contributions without which no round closes
    evaluate_every           outer steps between evaluations of the held-out split; 0: never
    batch_sizes              "proportional": cut to each worker's speed; "equal": max_batch_size for everybody
    """

    updates: AtLeastOne
    samples_between_updates: AtLeastOne
    max_batch_size: AtLeastOne = 32
    deadline_s: Positive = 600.0
    quorum: AtLeastOne = 1
    evaluate_every: Annotated[int, Meta(ge=0)] = 1
    batch_sizes: Literal["proportional", "equal"] = "proportional"


class HeldOutSlice(Struct, frozen=True, kw_only=True):
    """A slice that is never trained on."""

    name: Text
    samples: AtLeastOne
    bytes: AtLeastOne
    digest: HexDigest
    digest_algorithm: Text = "sha256"


class DatasetRef(Struct, frozen=True, kw_only=True):
    """A dataset by name and the sha256 of its manifest, with the tensors its slices hold and the held-out slices."""

    name: Text
    manifest_digest: HexDigest
    schema: dict[str, str]  # tensor name -> safetensors dtype and shape per sample, e.g. "U8[128]"
    held_out: Annotated[tuple[HeldOutSlice, ...], Meta(max_length=64)] = ()


class ResumePoint(Struct, frozen=True, kw_only=True):
    """Committed state: model and momentum after `round` outer steps, then records to replay, in order."""

    round: Annotated[int, Meta(ge=0)]
    model_digest: HexDigest
    momentum_digest: HexDigest
    records: Annotated[tuple[HexDigest, ...], Meta(max_length=4096)] = ()


class JobSpec(Struct, frozen=True, kw_only=True):
    """Everything an executor needs to know; sent with DispatchJob and handed over as a JSON file."""

    job_id: Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    work: Literal["train", "aggregate"]
    executor: Text
    model: ModelSpec
    dataset: DatasetRef
    inner: InnerOptimizer
    outer: OuterOptimizer
    rounds: Rounds
    preprocessor: PreprocessorSpec | None = None
    resume: ResumePoint | None = None  # of the shard
    shards: Annotated[int, Meta(ge=1, le=SHARDS_MAX)] = 1  # parameter servers that share the model
    shard: Annotated[int, Meta(ge=0, lt=SHARDS_MAX)] = 0  # which of them this job is for; trainers work with all
    compression: Compression = Compression()
    streaming: Streaming = Streaming()
