"""The pool keeps what answers, loses what does not, tells of each loss once; in virtual time."""

import pytest
import trio

from hypha.network.memory import MemoryFabric
from hypha.network.memory_faults import FaultProfile
from hypha.protocol.messages import CancelJob, Member
from hypha.protocol.resources import Resources
from hypha.scheduler.pool import LeasedWorker, NotHeld
from hypha.telemetry import metrics
from tests.lease_cast import OFFER_TTL_S, ONE_CPU, TTL_S, Cast, offered

HOUR_S = 3600.0
# Both directions of a message take one latency, a millisecond each.
ROUND_TRIP_S = 0.002


@pytest.fixture
def cast() -> Cast:
    metrics.reset()
    return Cast(MemoryFabric("pool"))


def renewals(status: str) -> float:
    return metrics.snapshot().get(f'hypha_lease_renewals_total{{status="{status}"}}', 0)


async def adopt(scheduler, worker, member: Member) -> LeasedWorker | NotHeld:
    return await scheduler.pool.adopt(
        member,
        work="train",
        executor="diloco-transformer",
        price=1.0,
        addresses=worker.network.signed_addresses(),
        resources=ONE_CPU,
        ttl_s=TTL_S,
    )


@pytest.mark.parametrize("rate", [0.95, 1.0, 1.05])
async def test_an_accepted_lease_lives_for_hours(cast, autojump_clock, rate):
    async with cast.worker("w", rate=2 - rate) as worker, cast.scheduler(rate=rate) as scheduler:
        leased = await scheduler.lease_from(worker)
        await trio.sleep(HOUR_S)
        assert scheduler.pool.live() == [leased]
        assert scheduler.pool.by_lease(leased.member.lease_id) is leased
        assert scheduler.pool.is_live(leased.member)
        assert worker.leases() == [("s", "renewable")]
        assert (scheduler.deaths, renewals("failure")) == ([], 0)
        # At 0.6 of the ttl each time.
        assert renewals("success") == pytest.approx(HOUR_S * rate / (0.6 * TTL_S), abs=2)
        assert metrics.snapshot()["hypha_active_workers"] == 1


async def test_a_member_lives_only_under_its_own_fence_and_name(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.scheduler() as scheduler:
        member = (await scheduler.lease_from(worker)).member
        others = [
            Member(peer_id="x", fence=member.fence, lease_id=member.lease_id),
            Member(peer_id="w", fence=member.fence + 1, lease_id=member.lease_id),
            Member(peer_id="w", fence=member.fence, lease_id="other"),
        ]
        assert [scheduler.pool.is_live(each) for each in [member, *others]] == [True, False, False, False]


async def test_a_silent_worker_is_lost_at_the_deadline_and_told_of_once(cast, autojump_clock):
    async with cast.scheduler() as scheduler:
        async with cast.worker("w") as worker:
            leased = await scheduler.lease_from(worker)
            cast.fabric.crash("w", silent=True)
        await trio.sleep(0.9 * TTL_S - 0.1)
        assert scheduler.pool.is_live(leased.member)
        await trio.sleep(0.2)
        assert not scheduler.pool.is_live(leased.member)
        assert scheduler.pool.live() == []
        await trio.sleep(HOUR_S)
        assert scheduler.deaths == [("w", "no renewal was answered before the deadline")]
        assert renewals("failure") >= 3
        assert metrics.snapshot()["hypha_active_workers"] == 0


async def test_a_closed_connection_is_no_death(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.scheduler() as scheduler:
        leased = await scheduler.lease_from(worker)
        await trio.sleep(0.6 * TTL_S - 0.1)
        cast.fabric.partition("w", "s")
        await trio.sleep(0.15 * TTL_S)
        cast.fabric.heal()
        await trio.sleep(HOUR_S)
        assert (scheduler.pool.live(), scheduler.deaths) == ([leased], [])
        assert renewals("failure") > 0


async def test_what_the_worker_calls_gone_is_gone_at_once(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.scheduler() as scheduler:
        leased = await scheduler.lease_from(worker)
        worker.ledger.revoke(leased.member.lease_id, reason="shutting down", now=worker.runtime.now())
        await trio.sleep(0.6 * TTL_S + 1)
        assert scheduler.deaths == [("w", "revoked: shutting down")]
        assert scheduler.pool.by_lease(leased.member.lease_id) is None


async def test_what_was_lost_is_also_given_back(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.scheduler() as scheduler:
        await scheduler.lease_from(worker)
        # The worker hears every renewal, so its own lease would live on; its answers are lost.
        cast.fabric.partition("w", "s", one_way=True)
        await trio.sleep(TTL_S)
        assert [peer_id for peer_id, _ in scheduler.deaths] == ["w"]
        assert (worker.leases(), worker.free) == ([], Resources(cpu=1))


async def test_an_offer_whose_first_renewal_has_no_known_outcome_is_released(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.scheduler() as scheduler:
        cast.fabric.partition("w", "s", one_way=True)
        outcome = await scheduler.lease_from(worker)
        assert outcome == NotHeld("no answer to 2 attempts to accept the offer")
        await trio.sleep(OFFER_TTL_S)
        assert (worker.leases(), scheduler.pool.live(), scheduler.deaths) == ([], [], [])


async def test_an_offer_that_has_lapsed_is_not_had(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.scheduler() as scheduler:
        offer = offered(worker, "s")
        received_at = scheduler.runtime.now()
        worker.ledger.revoke(offer.lease_id, reason="offered to nobody", now=worker.runtime.now())
        outcome = await scheduler.pool.accept(
            "w", offer, work="train", executor="x", price=1.0, received_at=received_at
        )
        assert outcome == NotHeld("revoked: offered to nobody")
        late = await scheduler.pool.accept(
            "w", offer, work="train", executor="x", price=1.0, received_at=received_at - OFFER_TTL_S
        )
        assert late == NotHeld("no renewal was answered before the deadline")


async def test_an_acceptance_nobody_waits_for_is_given_back(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.scheduler() as scheduler:
        with trio.move_on_after(ROUND_TRIP_S * 0.75):  # the renewal has arrived, its answer has not
            await scheduler.lease_from(worker)
        assert worker.leases() == [("s", "renewable")]
        await trio.sleep(1)
        assert (worker.leases(), scheduler.pool.live()) == ([], [])


async def test_releasing_frees_the_worker_and_is_no_death(cast, autojump_clock):
    async with cast.worker("w", cpu=3) as worker, cast.scheduler() as scheduler:
        first, second, _ = [await scheduler.lease_from(worker) for _ in range(3)]
        await scheduler.pool.release(first, "not needed")
        await scheduler.pool.release(first, "not needed")
        assert (worker.free, len(scheduler.pool.live())) == (Resources(cpu=1), 2)
        scheduler.pool.drop(second, "not needed")
        assert not scheduler.pool.is_live(second.member)
        await trio.sleep(1)
        assert worker.free == Resources(cpu=2)
        await scheduler.pool.release_all("the job is done")
        assert (worker.free, scheduler.pool.live()) == (Resources(cpu=3), [])
        await trio.sleep(HOUR_S)
        assert scheduler.deaths == []
        assert metrics.snapshot()["hypha_active_workers"] == 0


async def test_a_declined_offer_frees_the_worker_before_it_lapses(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.scheduler() as scheduler:
        scheduler.pool.decline("w", offered(worker, "s"), "another offer was better")
        await trio.sleep(0.1)
        assert worker.leases() == []


async def test_a_release_that_nobody_hears_is_given_up(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.scheduler() as scheduler:
        leased = await scheduler.lease_from(worker)
        cast.fabric.partition("w", "s")
        with trio.fail_after(TTL_S):
            await scheduler.pool.release(leased, "not needed")
        assert not leased.held.must_release
        await trio.sleep(TTL_S)
        assert worker.leases() == []


async def test_every_message_under_a_lease_is_newer_than_the_last(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.scheduler() as scheduler:
        leased = await scheduler.lease_from(worker)
        first = CancelJob(**scheduler.pool.envelope(leased), job_id="j", reason="r")
        await trio.sleep(TTL_S)  # a renewal lies between them
        second = CancelJob(**scheduler.pool.envelope(leased), job_id="j", reason="r")
        assert (first.lease_id, first.fence, first.job_epoch) == (leased.member.lease_id, leased.member.fence, 1)
        assert second.attempt > first.attempt + 1


async def test_a_restarted_scheduler_adopts_what_answers_and_outdates_its_former_self(cast, autojump_clock):
    async with cast.worker("w") as worker:
        async with cast.scheduler(job_epoch=1) as scheduler:
            former = await scheduler.lease_from(worker)
        async with cast.scheduler(job_epoch=2) as scheduler:
            adopted = await adopt(scheduler, worker, former.member)
            assert (adopted.member, scheduler.pool.live()) == (former.member, [adopted])
            await trio.sleep(HOUR_S)
            assert (scheduler.deaths, worker.leases()) == ([], [("s", "renewable")])
        async with cast.scheduler(job_epoch=1) as ghost:
            outcome = await adopt(ghost, worker, former.member)
            assert outcome == NotHeld(f"job epoch 1 is over: lease {former.member.lease_id} is held in 2")
            assert worker.leases() == [("s", "renewable")]


async def test_a_journaled_lease_that_does_not_answer_is_tried_twice_only(cast, autojump_clock):
    async with cast.worker("w") as worker, cast.scheduler() as scheduler:
        member = (await scheduler.lease_from(worker)).member
        cast.fabric.partition("w", "s")
        began = trio.current_time()
        outcome = await adopt(scheduler, worker, member)
        assert outcome == NotHeld("no answer to 2 attempts to accept the offer")
        assert trio.current_time() - began <= 0.25 * TTL_S


@pytest.mark.parametrize("seed", range(5))
async def test_in_a_bad_network_nothing_is_relied_on_that_the_worker_does_not_keep(autojump_clock, seed):
    profile = FaultProfile(latency_s=0.05, jitter_s=0.1, loss=0.2, duplication=0.2, reordering=0.2, late_s=2.0)
    cast = Cast(MemoryFabric(f"storm-{seed}", profile))
    async with cast.worker("w", rate=0.95) as worker, cast.scheduler(rate=1.05) as scheduler:
        leased, moments = 0, 0
        for _ in range(200):
            if not worker.leases():
                leased += isinstance(await scheduler.lease_from(worker), LeasedWorker)
            await trio.sleep(TTL_S / 7)
            relied_on = {each.member.lease_id for each in scheduler.pool.live()}
            kept = {lease.lease_id for lease in worker.ledger.leases(worker.runtime.now())}
            assert relied_on <= kept
            moments += bool(relied_on)
        # One message in five is lost: leases die now and then, each is told of, and others take their place.
        assert len(scheduler.deaths) == leased - len(scheduler.pool.live())
        assert moments > 150


@pytest.mark.parametrize("share", [0.05, 0.12, 0.22])
async def test_a_lease_lives_where_an_answer_takes_longer_than_an_attempt_has(cast, autojump_clock, share):
    async with cast.worker("w") as worker, cast.scheduler() as scheduler:
        leased = await scheduler.lease_from(worker)
        # Both directions take so long: the first attempt is answered while the second or third is under way.
        cast.fabric.calm(FaultProfile(latency_s=share * TTL_S / 2))
        await trio.sleep(HOUR_S)
        assert (scheduler.pool.live(), scheduler.deaths) == ([leased], [])
        assert worker.leases() == [("s", "renewable")]
