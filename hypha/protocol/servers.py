"""Who has which shard of the model, and what each shard's state is (rounds.md).

    committed: models and momenta by shard ──▶ whoever comes must hold exactly that
    none yet:  the first to say ──────────────▶ is the initial model's shard, once all shards are said

A shard without its server stops rounds from closing, and nothing else: the others keep what they hold.
"""

from collections.abc import Iterator, Sequence

from msgspec import Struct

from hypha.protocol.messages import Member


class Serving(Struct, frozen=True):
    """One parameter server: its shard, and its signed addresses."""

    shard: int
    address: bytes


class Servers:
    """The parameter servers of one job, one for each shard; iterates over them in the order of shards."""

    def __init__(self, shards: int, models: Sequence[str], momenta: Sequence[str]) -> None:
        """`models` and `momenta` are the committed ones' digests by shard; empty before there are any."""
        self.shards = shards
        self._serving: dict[Member, Serving] = {}
        self._models = dict(enumerate(models))
        self._momenta = dict(enumerate(momenta))
        self._pinned = bool(models)

    def __iter__(self) -> Iterator[Member]:
        return iter(sorted(self._serving, key=lambda server: self._serving[server].shard))

    def __contains__(self, server: object) -> bool:
        return server in self._serving

    def __len__(self) -> int:
        return len(self._serving)

    @property
    def missing(self) -> tuple[int, ...]:
        """The shards that nobody serves."""
        there = {serving.shard for serving in self._serving.values()}
        return tuple(shard for shard in range(self.shards) if shard not in there)

    def order(self) -> tuple[int, ...]:
        """Return the shards that they have, in their order."""
        return tuple(self._serving[server].shard for server in self)

    def addresses(self) -> tuple[bytes, ...]:
        """Return their signed addresses, in their order."""
        return tuple(self._serving[server].address for server in self)

    def models(self) -> tuple[str, ...]:
        """Return the digests of the committed or initial model by shard; empty while one is unknown."""
        return tuple(self._models[shard] for shard in sorted(self._models)) if len(self._models) == self.shards else ()

    def lacking(self) -> str:
        """Say in words which shards are missing; nothing where there is only one."""
        return f" for shard {', '.join(map(str, self.missing))} of {self.shards}" if self.shards > 1 else ""

    def add(self, server: Member, serving: Serving, *, digest: str, momentum_digest: str | None) -> str | None:
        """A server holds the newest model and momentum of a shard. Returns why it does not count, or None."""
        shard = serving.shard
        if shard >= self.shards:
            return f"there is no shard {shard} of {self.shards}"
        if shard not in self.missing:
            return f"shard {shard} is served by another"
        model, momentum = self._models.get(shard), self._momenta.get(shard)
        if self._pinned and digest != model:
            return f"its model is {digest[:12]}, not {str(model)[:12]}"
        if momentum is not None and momentum_digest != momentum:
            return "its momentum is not the committed one"
        self._models[shard] = digest
        self._serving[server] = serving
        return None

    def remove(self, server: Member) -> bool:
        """A server is gone; False where it was none."""
        return self._serving.pop(server, None) is not None

    def committed(self, models: Sequence[str], momenta: Sequence[str]) -> None:
        """From now on whoever comes must hold these."""
        self._models, self._momenta = dict(enumerate(models)), dict(enumerate(momenta))
        self._pinned = True
