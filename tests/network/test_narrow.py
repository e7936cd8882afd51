"""Renewals on a link that bulk bytes fill: they are answered long before a lease of the usual 30 s is lost."""

import pytest
import trio

from hypha.network.retry import attempt
from hypha.network.seam import Stream
from hypha.protocol.messages import Ack, FetchSlice
from tests.network.cast import fetch, status
from tests.network.libp2p_nodes import Nodes, answering, until
from tests.network.narrow import BEHIND, narrow

# Answers take half a second, on a busy machine more. In 256 KiB frames, with as much again in the kernel, they took
# 10 to 13 s.
ATTEMPT_S = 6.0
BYTES_PER_S = 80e3
TRANSFERS = 3
RENEWALS = 4


async def _pour(stream: Stream, _header: FetchSlice) -> None:
    while True:
        await stream.send_all(bytes(1 << 20))


@pytest.mark.slow
async def test_answers_overtake_transfers_that_fill_the_link(pki):
    nodes, behind, answers = Nodes(pki), [], []
    async with narrow(BYTES_PER_S, behind) as (link, port):
        own, near = f"/ip4/{BEHIND}/tcp/0", f"/ip4/127.0.0.1/tcp/{port}"
        async with (
            nodes.alone("worker", "worker", listen_addresses=(own,), external_addresses=(near,)) as worker,
            nodes.alone("scheduler", "scheduler", exclude_cidr=(f"{BEHIND}/32",)) as scheduler,
        ):
            behind.append(int(worker.listen_addresses()[0].split("/")[4]))
            answering(worker).accept_streams(FetchSlice, _pour)
            scheduler.learn(worker.peer_id, worker.signed_addresses())

            async def pull() -> None:
                stream = await scheduler.open_stream(worker.peer_id, fetch())
                while True:
                    await stream.receive_some(1 << 20)

            async with trio.open_nursery() as nursery:
                for _ in range(TRANSFERS):
                    nursery.start_soon(pull)
                await until(lambda: link.passed > 2 * BYTES_PER_S)
                while len(answers) < RENEWALS:
                    answers += [await attempt(scheduler, worker.peer_id, status(), patience_s=ATTEMPT_S)]
                nursery.cancel_scope.cancel()
    assert answers == [Ack()] * RENEWALS
