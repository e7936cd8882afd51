"""What every `hypha.network.seam.Network` must do, whatever carries the bytes.

Run it for an implementation by subclassing and giving a fixture:

    from tests.network.contract import NetworkContract

    @pytest.fixture
    def make_network() -> MakeNetwork: ...

    class TestMine(NetworkContract): ...

`make_network(name, *roles)` returns an async context manager that runs a node holding these roles and yields its
Network. Nodes made by one fixture can reach each other, by peer id alone, as soon as they are up. The same name gives
the same peer id again, after the first node of that name has ended: that is a restart. Leaving the context ends the
node as a killed process would, from its peers' point of view.

Decisions that the suite fixes where the seam leaves room:
a publisher does not hear itself · nobody finds itself among providers · kinds nobody serves, forbidden roles and
handlers that fail are Refused with the codes unknown, forbidden and internal · `send_eof` twice is fine · a request to
a node that is gone raises PeerUnreachable within the caller's patience or waits until the caller loses it.
"""

import pytest
import trio

from hypha.errors import LocalProtocolError, PeerUnreachable, Refused, RemoteProtocolError
from hypha.network.seam import Network, Peer
from hypha.protocol.messages import TOPIC_WORKER, Ack, Health, HealthReport, JobStatus, NoMore, TaskAdvertisement
from tests.network.cast import PATIENCE_S, ack, advertisement, eventually_answers, status, two
from tests.network.contract_streams import StreamContract


class NetworkContract(StreamContract):
    # --- requests ----------------------------------------------------------------------------------------------------

    async def test_a_request_is_answered_and_the_handler_knows_who_asked(self, make_network):
        async with two(make_network) as (a, b):

            async def report(peer: Peer, _: Health) -> HealthReport:
                return HealthReport(peer_id=peer.peer_id, role=",".join(sorted(peer.roles)), version="1", uptime_s=0.0)

            b.serve(Health, report)
            answer = await a.request(b.peer_id, Health())
            assert (answer.peer_id, answer.role) == (a.peer_id, "scheduler")

    async def test_a_refusal_carries_the_handlers_reason(self, make_network):
        async with two(make_network) as (a, b):

            async def refuse(_peer: Peer, message: JobStatus) -> Ack:
                raise Refused(f"no: {message.reason}")

            b.serve(JobStatus, refuse)
            with pytest.raises(Refused, match=r"^no: because$"):
                await a.request(b.peer_id, status("because"))

    async def test_a_role_that_may_not_ask_is_refused(self, make_network):
        async with two(make_network) as (a, b):
            called = []

            async def note(_peer: Peer, _message: JobStatus) -> Ack:
                called.append(1)
                return Ack()

            a.serve(JobStatus, note, roles=frozenset({"scheduler"}))
            b.serve(JobStatus, note, roles=frozenset({"scheduler", "gateway"}))
            with pytest.raises(Refused, match="scheduler") as refusal:
                await b.request(a.peer_id, status())
            assert refusal.value.code == "forbidden"
            assert called == []
            assert await a.request(b.peer_id, status()) == Ack()

    async def test_a_kind_that_nobody_serves_is_refused_by_name(self, make_network):
        async with two(make_network) as (a, b):
            with pytest.raises(Refused, match="JobStatus") as refusal:
                await a.request(b.peer_id, status())
            assert refusal.value.code == "unknown"

    async def test_a_request_beyond_the_limit_never_leaves(self, make_network):
        async with two(make_network) as (a, b):
            b.serve(JobStatus, ack)
            with pytest.raises(LocalProtocolError, match="JobStatus of"):
                await a.request(b.peer_id, status("x" * (1 << 20)))
            assert await a.request(b.peer_id, status()) == Ack()

    async def test_a_large_request_and_answer_arrive_whole(self, make_network):
        async with two(make_network) as (a, b):

            async def echo(_peer: Peer, message: Health) -> HealthReport:
                detail = {str(i): "y" * 1000 for i in range(800)}
                return HealthReport(peer_id="p", role="r", version="1", uptime_s=1.0, detail=detail)

            b.serve(Health, echo)
            b.serve(JobStatus, ack)
            assert sum(map(len, (await a.request(b.peer_id, Health())).detail.values())) == 800_000
            assert await a.request(b.peer_id, status(last_lines=("z" * 2048,) * 64)) == Ack()

    async def test_requests_in_both_directions_run_at_the_same_time(self, make_network):
        async with two(make_network) as (a, b):
            everybody_asks, waiting = trio.Event(), []

            async def meet(_peer: Peer, message: JobStatus) -> Ack:
                waiting.append(message.reason)
                if len(waiting) == 20:
                    everybody_asks.set()
                await everybody_asks.wait()
                return Ack()

            a.serve(JobStatus, meet)
            b.serve(JobStatus, meet)
            async with trio.open_nursery() as nursery:
                for i in range(10):
                    nursery.start_soon(a.request, b.peer_id, status(f"a{i}"))
                    nursery.start_soon(b.request, a.peer_id, status(f"b{i}"))
            assert sorted(waiting) == sorted(f"{name}{i}" for name in "ab" for i in range(10))

    async def test_a_handler_that_fails_is_told_without_details_and_harms_nothing(self, make_network, caplog):
        async with two(make_network) as (a, b):

            async def fail(_peer: Peer, message: JobStatus) -> Ack:
                if message.reason == "good":
                    return Ack()
                raise ZeroDivisionError("secret")

            b.serve(JobStatus, fail)
            with pytest.raises(Refused) as refusal:
                await a.request(b.peer_id, status("bad"))
            assert refusal.value.code == "internal"
            assert "secret" not in str(refusal.value)
            assert "ZeroDivisionError: secret" in caplog.text
            assert await a.request(b.peer_id, status("good")) == Ack()

    async def test_a_handler_that_answers_with_the_wrong_kind_is_a_bug_there(self, make_network):
        async with two(make_network) as (a, b):

            async def answer(_peer: Peer, _message: JobStatus) -> NoMore:
                return NoMore(round=1)

            b.serve(JobStatus, answer)
            with pytest.raises(Refused) as refusal:
                await a.request(b.peer_id, status())
            assert refusal.value.code == "internal"

    async def test_a_cancelled_request_leaves_the_network_working(self, make_network):
        async with two(make_network) as (a, b):
            entered = trio.Event()

            async def slow(_peer: Peer, message: JobStatus) -> Ack:
                if message.reason == "slow":
                    entered.set()
                    await trio.sleep(0.2)
                return Ack()

            b.serve(JobStatus, slow)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.request, b.peer_id, status("slow"))
                await entered.wait()
                nursery.cancel_scope.cancel()
            assert await a.request(b.peer_id, status()) == Ack()

    # --- peers that vanish -------------------------------------------------------------------------------------------

    async def test_a_peer_that_vanished_is_unreachable_and_others_are_not(self, make_network):
        async with two(make_network) as (a, b):
            b.serve(JobStatus, ack)
            async with make_network("c", "worker") as c:
                c.serve(JobStatus, ack)
                assert await a.request(c.peer_id, status()) == Ack()
            outcome = "waited"
            with trio.move_on_after(2.0):
                try:
                    await a.request(c.peer_id, status())
                except PeerUnreachable:
                    outcome = "unreachable"
            assert outcome in {"waited", "unreachable"}
            assert await a.request(b.peer_id, status()) == Ack()

    async def test_a_request_under_way_when_its_peer_vanishes_is_not_answered(self, make_network):
        with trio.fail_after(PATIENCE_S):
            async with make_network("a", "scheduler") as a, trio.open_nursery() as nursery:
                entered, settled, outcomes = trio.Event(), trio.Event(), []

                async def never(_peer: Peer, _message: JobStatus) -> Ack:
                    entered.set()
                    await trio.sleep_forever()
                    return Ack()

                async def ask(peer_id: str) -> None:
                    try:
                        outcomes.append(await a.request(peer_id, status()))
                    except PeerUnreachable:
                        outcomes.append("unreachable")
                    settled.set()

                async with make_network("b", "worker") as b:
                    b.serve(JobStatus, never)
                    nursery.start_soon(ask, b.peer_id)
                    await entered.wait()
                with trio.move_on_after(5.0):
                    await settled.wait()
                nursery.cancel_scope.cancel()
            assert outcomes in ([], ["unreachable"])

    async def test_a_restarted_peer_is_dialled_again(self, make_network):
        with trio.fail_after(PATIENCE_S):
            async with make_network("a", "scheduler") as a:
                ids = []
                for _ in range(2):
                    async with make_network("b", "worker") as b:
                        b.serve(JobStatus, ack)
                        assert await eventually_answers(a, b.peer_id) == Ack()
                        ids.append(b.peer_id)
                assert ids[0] == ids[1]

    async def test_connected_peers_are_those_spoken_with_and_their_roles(self, make_network):
        async with two(make_network) as (a, b):
            b.serve(JobStatus, ack)
            await a.request(b.peer_id, status())
            assert Peer(b.peer_id, frozenset({"worker"})) in a.connected_peers()
            assert Peer(a.peer_id, frozenset({"scheduler"})) in b.connected_peers()
            assert a.connected_peers() == sorted(a.connected_peers(), key=lambda peer: peer.peer_id)

    # --- gossip ------------------------------------------------------------------------------------------------------

    async def test_everybody_but_the_publisher_hears_an_announcement(self, make_network):
        with trio.fail_after(PATIENCE_S):
            async with make_network("c", "worker") as c, two(make_network) as (a, b):
                heard: dict[str, set[str]] = {network.peer_id: set() for network in (a, b, c)}
                signers: set[str] = set()

                async def listen(network: Network, *, task_status: trio.TaskStatus) -> None:
                    async with network.subscribe(TOPIC_WORKER) as announcements:
                        task_status.started()
                        async for signer, message in announcements:
                            assert isinstance(message, TaskAdvertisement)
                            signers.add(signer.peer_id)
                            heard[network.peer_id].add(message.advertisement_id)

                async with trio.open_nursery() as nursery:
                    for network in (a, b, c):
                        await nursery.start(listen, network)
                    number = 0
                    # Delivery is likely, never certain: announce until everybody has heard something.
                    while not (heard[b.peer_id] and heard[c.peer_id]):
                        number += 1
                        await a.publish(TOPIC_WORKER, advertisement(number))
                        await trio.sleep(0.2)
                    nursery.cancel_scope.cancel()
                assert signers == {a.peer_id}
                assert heard[a.peer_id] == set()

    async def test_an_announcement_beyond_the_limit_never_leaves(self, make_network):
        async with two(make_network) as (a, _):
            with pytest.raises(LocalProtocolError, match="65536"):
                await a.publish(TOPIC_WORKER, advertisement(padding=1 << 16))

    async def test_a_reader_that_lags_loses_the_oldest(self, make_network):
        async with two(make_network) as (a, b), b.subscribe(TOPIC_WORKER) as announcements:
            first = 0
            while True:
                await a.publish(TOPIC_WORKER, advertisement(first))
                with trio.move_on_after(0.2) as silence:
                    await anext(announcements)
                if not silence.cancelled_caught:
                    break
                first += 1
            for number in range(600):
                await a.publish(TOPIC_WORKER, advertisement(10_000 + number))
                if number % 50 == 0:
                    await trio.sleep(0.01)
            await trio.sleep(0.5)
            kept = []
            with trio.move_on_after(0.5):
                async for _, message in announcements:
                    kept.append(int(message.advertisement_id.removeprefix("ad-")))
            assert 0 < len(kept) < 600
            assert max(kept) == 10_599
            assert 10_000 not in kept

    # --- the DHT -----------------------------------------------------------------------------------------------------

    async def test_providers_are_found_by_others_and_at_most_as_many_as_wanted(self, make_network):
        with trio.fail_after(PATIENCE_S):
            async with make_network("c", "data") as c, two(make_network) as (a, b):
                await b.provide("dataset")
                await c.provide("dataset")
                found: set[str] = set()
                while found != {b.peer_id, c.peer_id}:
                    found = set(await a.find_providers("dataset", wanted=8))
                    await trio.sleep(0.1)
                assert len(await a.find_providers("dataset", wanted=1)) == 1
                assert await a.find_providers("nobody's", wanted=8) == []
                assert b.peer_id not in await b.find_providers("dataset", wanted=8)

    # --- addresses ---------------------------------------------------------------------------------------------------

    async def test_signed_addresses_are_learned_and_forged_ones_refused(self, make_network):
        async with two(make_network) as (a, b):
            signed = b.signed_addresses()
            assert 0 < len(signed) <= 8192
            a.learn(b.peer_id, signed)
            with pytest.raises(RemoteProtocolError, match=b.peer_id):
                a.learn(b.peer_id, a.signed_addresses())
            for position in (0, len(signed) // 2, len(signed) - 1):
                forged = bytearray(signed)
                forged[position] ^= 1
                with pytest.raises(RemoteProtocolError):
                    a.learn(b.peer_id, bytes(forged))
            with pytest.raises(RemoteProtocolError):
                a.learn(b.peer_id, b"")
