"""One seed, one history: the in-memory network repeats itself byte for byte, whatever Python's hashing does."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import trio

from hypha.errors import PeerUnreachable
from hypha.network.memory import MemoryFabric
from hypha.network.memory_faults import FaultProfile
from hypha.protocol.messages import TOPIC_WORKER, Ack, FetchSlice
from tests.network.cast import ack, advertisement, fetch, receive_all, status
from tests.sim.virtual import Clock, VirtualRuntime, run_seeded

ROOT = Path(__file__).parent.parent.parent
STORMY = FaultProfile(
    latency_s=0.02,
    jitter_s=0.05,
    loss=0.05,
    duplication=0.1,
    reordering=0.1,
    bandwidth=1e6,
    stream_break=0.05,
    break_after_s=2.0,
    gossip_loss=0.1,
    gossip_duplication=0.2,
    dht_delay_s=1.0,
)
NAMES = [f"node-{number}" for number in range(6)]


async def live(fabric: MemoryFabric, name: str, log: list[str]) -> None:
    """Everything a node can do, at moments that its own seeded chance picks."""
    runtime = VirtualRuntime(fabric.seed, name, clock=Clock(rate=1.02), gate=fabric.gate(name))

    async def echo(stream, _header) -> None:
        await stream.send_all(await receive_all(stream))

    async def stream_to(peer_id: str) -> None:
        stream = await network.open_stream(peer_id, fetch())
        try:
            await stream.send_all(bytes(50_000))
            await stream.send_eof()
            log.append(f"{name} {runtime.now():.6f} echoed {len(await receive_all(stream))}")
        finally:
            await stream.aclose()

    async def listen() -> None:
        async with network.subscribe(TOPIC_WORKER) as announcements:
            async for signer, message in announcements:
                log.append(f"{name} {runtime.now():.6f} heard {message.advertisement_id} of {signer.peer_id}")

    async with fabric.node(name, {"worker"}) as network, trio.open_nursery() as nursery:
        network.serve(type(status()), ack)
        network.accept_streams(FetchSlice, echo)
        nursery.start_soon(listen)
        await network.provide("dataset")
        for number in range(20):
            await runtime.sleep(runtime.random.random())
            peer_id = runtime.random.choice([other for other in NAMES if other != name])
            with suppress(PeerUnreachable):
                assert await network.request(peer_id, status(runtime.new_id())) == Ack()
                await stream_to(peer_id)
            await network.publish(TOPIC_WORKER, advertisement(number))
            log.append(f"{name} found {await network.find_providers('dataset', wanted=3)}")
        nursery.cancel_scope.cancel()


async def history(seed: int) -> list[str]:
    """What observers and nodes saw of six nodes' lives, with a crash, a stop and a partition in them."""
    log: list[str] = []
    fabric = MemoryFabric(seed, STORMY)
    fabric.on_event(lambda event: log.append(str(event)))
    async with trio.open_nursery() as nursery:
        for name in NAMES:
            nursery.start_soon(live, fabric, name, log)
        await trio.sleep(2)
        fabric.partition("node-0", "node-1")
        await trio.sleep(1)
        fabric.crash("node-2")
        fabric.stop("node-3")
        await trio.sleep(3)
        fabric.go("node-3")
        fabric.heal()
        nursery.start_soon(live, fabric, "node-2", log)
    return log


def elsewhere(seed: int, hash_seed: str) -> str:
    """The same history told by another interpreter that hashes otherwise."""
    code = f"from tests.network.test_memory_replay import *; print(*run_seeded({seed}, history, {seed}), sep=chr(10))"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_the_same_seed_gives_the_same_history_twice():
    first, again = run_seeded(7, history, 7), run_seeded(7, history, 7)
    assert first == again
    outcomes = {line.split()[-1] for line in first if len(line.split()) == 5}
    assert {"arrived", "lost", "cut"} <= outcomes
    assert any("echoed 50000" in line for line in first)


def test_another_seed_gives_another_history():
    assert run_seeded(7, history, 7) != run_seeded(8, history, 8)


def test_hashing_decides_nothing():
    told = elsewhere(9, "1")
    assert told.count("\n") > 500
    assert told == elsewhere(9, "2")
    assert told.splitlines() == run_seeded(9, history, 9)
