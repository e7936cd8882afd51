"""What makes a job the same job: what its chain, its records and its checkpoints mean depends on these settings.

    name, manifest_digest          whose samples were used
    model                          which tensors there are
    outer_optimizer, compression   how records replay to the committed bits
    parameter_servers              whose tensors each record and checkpoint has
    fragments                      which tensors the record of a round holds

They stand in the journal's first record and in every job epoch's entry of the chain; whoever goes on with either under
other settings is refused, by key. Everything else (rounds, resources, inner optimizer …) may change between two runs.
"""

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct

from hypha.errors import ConfigError, StoreError
from hypha.protocol.compression import Compression
from hypha.protocol.job import ModelSpec, OuterOptimizer
from hypha.scheduler.config import JobConfig

# More differences than these make no message clearer.
NAMED_MAX = 4
REMEDY = (
    "set that back, name the job differently, use another directory, "
    "or start over with --fresh, which sets aside what is there"
)
MANIFEST = "manifest_digest"
KEYS = {
    MANIFEST: "dataset",
    "parameter_servers": "resources.parameter_servers",
    "fragments": "streaming.fragments",
}


class Settings(Struct, frozen=True, kw_only=True):
    """The settings that a job keeps for its life; `manifest_digest` is the dataset's, "" where it is not known yet."""

    name: str
    manifest_digest: str
    model: ModelSpec
    outer_optimizer: OuterOptimizer = OuterOptimizer()
    compression: Compression = Compression()
    parameter_servers: int = 1
    fragments: int = 1

    def canonical(self) -> str:
        """As JSON: equal settings, equal text."""
        return msgspec.json.encode(self, order="deterministic").decode()


class AnotherJob(ConfigError):
    """A store holds another job; `models` differ from each other, or are the same where something else differs."""

    def __init__(self, message: str, models: tuple[ModelSpec, ModelSpec]) -> None:
        super().__init__(f"{message}; {REMEDY}")
        self.message = message
        self.models = models

    def with_shapes(self, shapes: str) -> "AnotherJob":
        """Return the same with what differs between the tensors."""
        return AnotherJob(f"{self.message}: {shapes}", self.models) if shapes else self


def settings_of(job: JobConfig, *, manifest_digest: str) -> Settings:
    """Return the settings of a configured job."""
    return Settings(
        name=job.name,
        manifest_digest=manifest_digest,
        model=job.model,
        outer_optimizer=job.outer_optimizer,
        compression=job.compression,
        parameter_servers=job.resources.parameter_servers,
        fragments=job.streaming.fragments,
    )


def parsed(text: str, where: str) -> Settings:
    """Return the settings in a chain entry. Raises StoreError naming `where`."""
    try:
        return msgspec.json.decode(text, type=Settings)
    except msgspec.DecodeError as error:
        raise StoreError(f"{where}: not a job's settings: {error}") from error


def insist_same(before: Settings, now: Settings, *, where: str) -> None:
    """Raise AnotherJob, naming keys and values, where a job that was begun otherwise lies at `where`."""
    then, today = dict(_flat(before)), dict(_flat(now))
    differing = [key for key in sorted(then.keys() | today.keys()) if then.get(key) != today.get(key)]
    if "" in (before.manifest_digest, now.manifest_digest):
        differing = [key for key in differing if key != MANIFEST]
    if not differing:
        return
    named = "; ".join(
        f"scheduler.job.{KEYS.get(key, key)} was {_say(then.get(key))}, is {_say(today.get(key))}"
        for key in differing[:NAMED_MAX]
    )
    more = f" and {len(differing) - NAMED_MAX} more" if len(differing) > NAMED_MAX else ""
    raise AnotherJob(f"{where} holds a job that was begun otherwise: {named}{more}", (before.model, now.model))


def _flat(value: Struct) -> Iterator[tuple[str, Any]]:
    for key, inner in msgspec.structs.asdict(value).items():
        yield from _leaves(key, inner)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - whatever a configuration holds
    if isinstance(value, Struct):
        value = msgspec.structs.asdict(value)
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{key}.{name}", inner)


def _say(value: object) -> str:
    text = "not given" if value is None else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"
