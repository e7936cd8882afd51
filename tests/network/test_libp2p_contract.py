"""py-libp2p over mutual TLS keeps the contract of the seam: real sockets, nodes that know only a gateway."""

import itertools

import pytest
import trio

from hypha.protocol.messages import TOPIC_WORKER
from tests.network.cast import advertisement, two
from tests.network.contract import NetworkContract
from tests.network.libp2p_nodes import Nodes

pytestmark = pytest.mark.slow


@pytest.fixture
async def make_network(pki):
    nodes = Nodes(pki)
    async with nodes.alone("gateway", "gateway") as gateway:
        yield lambda name, *roles: nodes.joined(gateway, name, *roles)


class TestLibp2p(NetworkContract):
    """Everything in `contract`."""

    async def test_a_reader_that_lags_loses_the_oldest(self, make_network):
        """As in the contract, but waiting for the last announcement: real gossip takes a few milliseconds for each."""
        async with two(make_network) as (a, b), b.subscribe(TOPIC_WORKER) as lagging:
            async with b.subscribe(TOPIC_WORKER) as prompt:
                for number in itertools.count():
                    await a.publish(TOPIC_WORKER, advertisement(number))
                    with trio.move_on_after(0.2) as silence:
                        await anext(prompt)
                    if not silence.cancelled_caught:
                        break
                for number in range(400):
                    await a.publish(TOPIC_WORKER, advertisement(10_000 + number))
                    await trio.lowlevel.checkpoint()
                async for _, message in prompt:
                    if message.advertisement_id == "ad-10399":
                        break
            kept = []
            with trio.move_on_after(0.1):
                async for _, message in lagging:
                    kept.append(int(message.advertisement_id.removeprefix("ad-")))
            assert 0 < len(kept) < 400
            assert max(kept) == 10_399
            assert 10_000 not in kept
