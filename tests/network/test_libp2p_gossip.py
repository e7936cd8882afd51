"""Announcements reach everybody who is connected to a gateway, however many they are."""

from collections import Counter
from contextlib import AsyncExitStack

import pytest
import trio

from hypha.network.gossip import DEGREE_HIGH
from hypha.protocol.messages import TOPIC_WORKER
from tests.network.cast import advertisement
from tests.network.libp2p_nodes import PATIENCE_S, Nodes, until

pytestmark = pytest.mark.slow
LISTENERS = DEGREE_HIGH + 3


@pytest.fixture
def nodes(pki):
    return Nodes(pki)


class Ears:
    """Who has heard how often, among nodes that listen in the background."""

    def __init__(self, nursery):
        self.heard = Counter()
        self.nursery = nursery

    async def add(self, network):
        await self.nursery.start(self._listen, network)

    async def _listen(self, network, *, task_status):
        async with network.subscribe(TOPIC_WORKER) as announcements:
            task_status.started()
            async for _ in announcements:
                self.heard[network.peer_id] += 1


async def test_a_gateway_passes_on_to_all_its_nodes_though_its_mesh_is_small(nodes):
    with trio.fail_after(PATIENCE_S):
        async with AsyncExitStack() as stack:
            gateway = await stack.enter_async_context(nodes.alone("gateway", "gateway"))
            names = [f"w-{number}" for number in range(LISTENERS)]
            workers = [await stack.enter_async_context(nodes.joined(gateway, name, "worker")) for name in names]
            scheduler = await stack.enter_async_context(nodes.joined(gateway, "s", "scheduler"))
            async with trio.open_nursery() as nursery:
                ears = Ears(nursery)
                for worker in workers:
                    await ears.add(worker)
                mesh = gateway._gossip._router.mesh
                await until(lambda: len(gateway._gossip._pubsub.peer_topics.get(TOPIC_WORKER, ())) == LISTENERS)
                # From then on the heartbeat has thinned the mesh: some of them are not in it.
                await until(lambda: 0 < len(mesh[TOPIC_WORKER]) <= DEGREE_HIGH)
                await until(lambda: len(scheduler._gossip._pubsub.peer_topics.get(TOPIC_WORKER, ())) > 0)
                await scheduler.publish(TOPIC_WORKER, advertisement(1))
                await until(lambda: len(ears.heard) == LISTENERS)
                assert set(ears.heard.values()) == {1}
                nursery.cancel_scope.cancel()


async def test_every_gateway_is_told_at_once(nodes):
    with trio.fail_after(PATIENCE_S):
        async with (
            nodes.alone("gateway", "gateway") as gateway,
            nodes.joined(gateway, "other", "gateway") as other,
            nodes.joined(gateway, "w", "worker") as worker,
            nodes.joined(other, "s", "scheduler") as scheduler,
            trio.open_nursery() as nursery,
        ):
            ears = Ears(nursery)
            await ears.add(worker)
            await until(lambda: worker.peer_id in map(str, gateway._gossip._pubsub.peer_topics[TOPIC_WORKER]))
            for a, b in ((gateway, other), (scheduler, other)):
                await until(lambda a=a, b=b: b.peer_id in map(str, a._gossip._pubsub.peer_topics.get(TOPIC_WORKER, ())))
            await until(lambda: gateway.peer_id in map(str, other._gossip._pubsub.peer_topics[TOPIC_WORKER]))
            await scheduler.publish(TOPIC_WORKER, advertisement(1))
            await until(lambda: ears.heard[worker.peer_id] == 1)
            assert len(ears.heard) == 1
            nursery.cancel_scope.cancel()
