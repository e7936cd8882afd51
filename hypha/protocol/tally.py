"""What the parameter servers say they hold of one round, and which contributions are out of it for good.

    Collected(server 1)  a b c ┐
    Collected(server 2)  a b   ┴▶ accepted: what all of them hold, by id and digest      a b
                                  excluded: journaled, never named in a Close again

Reports may arrive late, twice and out of order. A server never gives up what it holds of a round and base, except an
empty contribution for a full one; so reports add up, and the order of arrival does not matter.
"""

from collections.abc import Iterable

from msgspec import Struct

from hypha.protocol.messages import Contribution, Count, Member, Name, PeerId, Reason

Key = tuple[str, int]  # (peer id, fence)


class Exclude(Struct, frozen=True, kw_only=True):
    """Whatever this lease contributes to this round is never merged. Journal it, then `RoundBook.excluded`.

    Only then may its samples be granted again: otherwise a restart could name them twice (invariant L6).
    """

    peer_id: PeerId
    fence: Count
    lease_id: Name
    round: Count
    reason: Reason

    @property
    def member(self) -> Member:
        """The lease that is excluded."""
        return Member(peer_id=self.peer_id, fence=self.fence, lease_id=self.lease_id)


class Tally:
    """The contributions to one round on one base, server by server. Dead servers are not asked about."""

    def __init__(self, round: int, base_digest: str | None) -> None:
        self.round = round
        self.base_digest = base_digest
        self._held: dict[Member, dict[Key, Contribution]] = {}

    def report(self, server: Member, contributions: Iterable[Contribution]) -> list[Contribution]:
        """Add what a server holds and return what is new of it. Contributions to another round or base are ignored."""
        held = self._held.setdefault(server, {})
        fresh = []
        for contribution in contributions:
            if contribution.round != self.round or contribution.base_digest != self.base_digest:
                continue
            key = (contribution.peer_id, contribution.fence)
            before = held.get(key)
            if before is None or (not before.samples and contribution.samples):
                held[key] = contribution
                fresh.append(contribution)
        return fresh

    def accepted(self, servers: Iterable[Member], excluded: Iterable[Key]) -> dict[Key, Contribution]:
        """Return what every one of `servers` holds, without the excluded, in (peer id, fence) order."""
        reports = [self._held.get(server, {}) for server in servers]
        if not reports:
            return {}
        out = set(excluded)
        first, others = reports[0], reports[1:]
        return {
            key: first[key]
            for key in sorted(first)
            if key not in out and all(key in other and other[key].digest == first[key].digest for other in others)
        }
