"""One model on several parameter servers: who has which tensors, and what the whole is called (rounds.md).

    tensors by name and size ──split──▶ S disjoint groups, evenly by bytes: shard 0 … shard S-1
    digests of S parts ──whole_digest──▶ the digest of the whole; of one part: that part's own

Every shard takes the same outer steps, each on its own tensors: same rounds, same Close, same contributions. Where a
message or an entry of the chain has a list of parts, an empty one means that the whole is the one shard's.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from hypha.errors import LocalProtocolError

# Each shard is a connection from every worker and one more lease without which no round closes.
SHARDS_MAX = 16


class Hashed(Protocol):
    """What a hash function of `hashlib` returns."""

    def hexdigest(self) -> str:
        """The digest in hexadecimal."""


Sha256 = Callable[[bytes], Hashed]


def split(
    sizes: Mapping[str, int], shards: int, fragments: Iterable[Collection[str]] | None = None
) -> tuple[tuple[str, ...], ...]:
    """Split tensors, given by name with their sizes in bytes, into so many groups; each in the order of names.

    The largest first, each to the group that has the fewest bytes so far; ties by name and number. Where the model is
    synchronised in fragments each of these is split so: every round moves as much of every shard. Raises
    LocalProtocolError where there are fewer tensors than groups.
    """
    if not 1 <= shards <= SHARDS_MAX:
        raise LocalProtocolError(f"{shards} parameter servers; 1 to {SHARDS_MAX} are possible")
    if shards > len(sizes):
        raise LocalProtocolError(f"parameter_servers = {shards}, but the model has only {len(sizes)} tensors to share")
    groups: list[list[str]] = [[] for _ in range(shards)]
    filled = [0] * shards
    for fragment in fragments or (sizes.keys(),):
        now = [0] * shards  # of this fragment
        for name in sorted(fragment, key=lambda name: (-sizes[name], name)):
            number = min(range(shards), key=lambda number: (now[number], filled[number], len(groups[number]), number))
            groups[number].append(name)
            now[number], filled[number] = now[number] + sizes[name], filled[number] + sizes[name]
    return tuple(tuple(sorted(group)) for group in groups)


def whole_digest(parts: Sequence[str], sha256: Sha256) -> str:
    """Return the digest of what consists of these parts, in the order of shards."""
    return parts[0] if len(parts) == 1 else sha256("\n".join(parts).encode()).hexdigest()


def part_of(whole: str, parts: Sequence[str], shard: int) -> str | None:
    """Return a shard's digest; None where there is no such shard."""
    known = parts or (whole,)
    return known[shard] if shard < len(known) else None


def kind_of(part: str, shard: int) -> str:
    """Return how a shard's model, momentum or record is called in the job's store and on the wire."""
    return part if shard == 0 else f"{part}-{shard}"
