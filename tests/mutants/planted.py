"""Defects that somebody could plausibly write, one each: where, what instead of what, and what it breaks.

    Planted(name, file, old ─▶ new, breaks, tests)      `old` stands exactly once in the file

`LEASES_AND_SAMPLES` are about what is granted, `planted_rounds.ROUNDS_AND_STATE` about what is merged and kept.
"""

from msgspec import Struct


class Planted(Struct, frozen=True, kw_only=True):
    """One defect; `breaks` names the rule that it breaks, `tests` the tests of the module it is in."""

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """Return the module with the defect. Raises ValueError where it does not fit the module any more."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: its text stands {text.count(self.old)} times in {self.file}, not once")
        return text.replace(self.old, self.new)


LEASE = ("tests/protocol/test_lease.py", "tests/protocol/test_lease_properties.py")
HOLDER = ("tests/protocol/test_holder.py",)
INTERVALS = ("tests/protocol/test_intervals.py",)
SLICES = (
    "tests/protocol/test_slices.py",
    "tests/protocol/test_slices_sharing.py",
    "tests/protocol/test_slices_properties.py",
)
AUCTION = (
    "tests/protocol/test_auction_matching.py",
    "tests/protocol/test_auction_scheduler.py",
    "tests/protocol/test_auction_replaced.py",
    "tests/protocol/test_auction_bounds.py",
    "tests/protocol/test_auction_worker.py",
)
FENCE = ("tests/protocol/test_fence.py",)
SCHEDULER = ("tests/scheduler/test_store.py", "tests/scheduler/test_leading.py")

LEASES_AND_SAMPLES = (
    Planted(
        name="renewal after the deadline",
        file="hypha/protocol/lease.py",
        old="if lease.deadline <= self._now]:",
        new="if lease.deadline + 3.0 <= self._now]:",
        breaks="a lease lives on, and is renewed, up to 3 s after its deadline (L3)",
        tests=LEASE,
    ),
    Planted(
        name="old attempt extends",
        file="hypha/protocol/lease.py",
        old="extended = _pair(sender) > (lease.job_epoch, lease.attempt)",
        new="extended = True",
        breaks="a duplicated renewal extends a lease that its holder has given up (leases.md)",
        tests=LEASE,
    ),
    Planted(
        name="lease epoch not checked",
        file="hypha/protocol/lease.py",
        old="if sender.job_epoch < lease.job_epoch:",
        new="if sender.job_epoch < 0:",
        breaks="a deposed scheduler renews what its successor holds",
        tests=LEASE,
    ),
    Planted(
        name="lease fence not checked",
        file="hypha/protocol/lease.py",
        old="if lease.fence != sender.fence:",
        new="if lease.fence < sender.fence:",
        breaks="a stale holder's fence is as good as the newest",
        tests=LEASE,
    ),
    Planted(
        name="resources free before the job is gone",
        file="hypha/protocol/lease.py",
        old="        for lease in self._leases.values():\n            held = held.plus(lease.resources)",
        new="        for lease in self._living():\n            held = held.plus(lease.resources)",
        breaks="two jobs on one GPU while the first is being killed (L1)",
        tests=LEASE,
    ),
    Planted(
        name="holder counts from receipt",
        file="hypha/protocol/holder.py",
        old="deadline = sent_at + HOLDER_SHARE * remaining_s",
        new="deadline = now + HOLDER_SHARE * remaining_s",
        breaks="with a slow answer the holder stops after the grantor (L1)",
        tests=HOLDER,
    ),
    Planted(
        name="holder relies on the whole ttl",
        file="hypha/protocol/holder.py",
        old="deadline = sent_at + HOLDER_SHARE * remaining_s",
        new="deadline = sent_at + remaining_s",
        breaks="with a slow clock the holder stops after the grantor (L1)",
        tests=HOLDER,
    ),
    Planted(
        name="holder does not release what it lost",
        file="hypha/protocol/holder.py",
        old='self._end("no renewal was answered before the deadline", must_release=True)',
        new='self._end("no renewal was answered before the deadline", must_release=False)',
        breaks="a worker whose answers are lost is idle until its lease expires",
        tests=HOLDER,
    ),
    Planted(
        name="fences restart in the last block",
        file="hypha/protocol/fence.py",
        old="        self._last = reserved\n",
        new="        self._last = max(0, reserved - FENCE_BLOCK)\n",
        breaks="a restarted worker hands out fences that it handed out before (leases.md)",
        tests=FENCE,
    ),
    Planted(
        name="fence block reserved afterwards",
        file="hypha/store/fences.py",
        old="        replace_durably(self._disk, self._path, _encode(state))\n        return first",
        new="        return first",
        breaks="fences leave before their block is on disk",
        tests=("tests/store/test_fences.py",),
    ),
    Planted(
        name="losers are forgotten",
        file="hypha/protocol/auction_scheduler.py",
        old="        self._losers.append(Loser(peer=kept.peer, offer=kept.offer, reason=reason))\n",
        new="",
        breaks="workers that lost an auction are not told, and wait for the end of their offer",
        tests=AUCTION,
    ),
    Planted(
        name="half a set is kept",
        file="hypha/protocol/auction_scheduler.py",
        old="placed = {} if below_minimum(self._wants, filled) else matching.placed()",
        new="placed = matching.placed()",
        breaks="two schedulers that hold halves starve each other",
        tests=AUCTION,
    ),
    Planted(
        name="samples come back after their round",
        file="hypha/protocol/slices.py",
        old="held.remove(interval.slice, interval.start, interval.stop)\n",
        new="pass\n",
        breaks="committed samples are granted again (L6)",
        tests=SLICES,
    ),
    Planted(
        name="slice used twice",
        file="hypha/protocol/slices.py",
        old="        self._take(number, start, stop)\n        held.add(number, start, stop)",
        new="        held.add(number, start, stop)",
        breaks="two members are granted the same samples (L6)",
        tests=SLICES,
    ),
    Planted(
        name="epoch ends too early",
        file="hypha/protocol/slices.py",
        old="        if self.samples_used == self.samples_per_epoch:\n            self._begin(self.epoch + 1)",
        new="        if self.samples_used >= self.samples_per_epoch - 8:\n            self._begin(self.epoch + 1)",
        breaks="the last samples of an epoch are never seen (L6)",
        tests=SLICES,
    ),
    Planted(
        name="ungranted samples count",
        file="hypha/protocol/slices.py",
        old="if interval.start >= interval.stop or held is None or not held.covers(interval):",
        new="if interval.start >= interval.stop:",
        breaks="a contribution made from samples of somebody else is merged (L6)",
        tests=SLICES,
    ),
    Planted(
        name="older grant wins after a restart",
        file="hypha/protocol/slices.py",
        old="                held.remove(number, *lost)\n                self._release({number: Spans([lost])})",
        new="                pass",
        breaks="after a restart samples belong to whoever lost them",
        tests=SLICES,
    ),
    Planted(
        name="grants are not journaled",
        file="hypha/scheduler/answers.py",
        old="            await job.scribe.note(Granted(grant=grant))\n",
        new="            assert grant is not None\n",
        breaks="a restarted scheduler grants samples again that are being trained on",
        tests=SCHEDULER,
    ),
    Planted(
        name="journal written after the reply",
        file="hypha/scheduler/answers.py",
        old="            await job.scribe.note(Granted(grant=grant))\n",
        new="            job._nursery.start_soon(job.scribe.note, Granted(grant=grant))\n",
        breaks="a grant is used whose record a crash has lost",
        tests=SCHEDULER,
    ),
    Planted(
        name="samples return before it is journaled",
        file="hypha/scheduler/scribe.py",
        old="        self._excluded += found\n",
        new="        found = [*found]\n        self._excluded += found\n        [*map(self._noted, found)]\n",
        breaks="a restart may name an excluded contribution and the new owner's (L6)",
        tests=SCHEDULER,
    ),
    Planted(
        name="dead leases are tried again",
        file="hypha/scheduler/coordinator.py",
        old="        self.scribe.ended(member)\n",
        new="",
        breaks="a restarted scheduler waits for leases that ended long ago",
        tests=SCHEDULER,
    ),
    Planted(
        name="a lease dies, its job does not",
        file="hypha/worker/service.py",
        old="if self.jobs.kill(lease.lease_id, lease.reason) or lease.job_id is not None:",
        new="if lease.job_id is not None:",
        breaks="an executor outlives its lease (L3)",
        tests=("tests/worker/test_service.py", "tests/worker/test_jobs.py"),
    ),
    Planted(
        name="what is leased already is offered again",
        file="hypha/protocol/lease.py",
        old="        free = self.capacity.minus(self._held())\n        if lacking",
        new="        free = self.capacity\n        if lacking",
        breaks="a worker promises more than it has (L1)",
        tests=LEASE,
    ),
    Planted(
        name="nobody's samples stay assigned",
        file="hypha/protocol/slices.py",
        old="        returned = self.return_round(round)\n",
        new="        returned: tuple[Interval, ...] = ()\n",
        breaks="what was granted and not used blocks the end of the epoch (L7)",
        tests=SLICES,
    ),
    Planted(
        name="what a contribution leaves is lost",
        file="hypha/protocol/slices.py",
        old="        return self._release(left)\n",
        new="        return ()\n",
        breaks="the rest of a grant is neither used nor free: the epoch never ends (L7)",
        tests=SLICES,
    ),
    Planted(
        name="the holder's clock runs from the deadline",
        file="hypha/protocol/holder.py",
        old="            self.deadline = deadline\n",
        new="            self.deadline += HOLDER_SHARE * remaining_s\n",
        breaks="every renewal adds a whole ttl to what the holder relies on (L1)",
        tests=HOLDER,
    ),
)
