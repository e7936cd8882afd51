"""A parameter server's session in its play: an executor that screens, workers that push, a scheduler that hears."""

from pathlib import Path

import trio

from hypha.errors import JobFailed
from hypha.protocol import bridge
from hypha.protocol.messages import (
    Accepted,
    Ack,
    CloseRound,
    Collected,
    Contribution,
    Evaluated,
    FetchModel,
    Interval,
    Merged,
    Message,
    PushUpdate,
    Ready,
)
from tests.worker.cast import (
    SCHEDULER,
    Heard,
    Listener,
    digest_of,
    file_ref,
    member,
    view,
)

BASE = digest_of(b"model 0")
A, B = "push-a", "push-b"


def opened(number: int = 1, **changes):
    known = {"base_digest": BASE, "members": (member(A), member(B)), "servers": (member("work"),)}
    return view(number, **known | changes)


def push(peer_id: str = A, data: bytes = b"delta", *, round: int = 1, base: str = BASE, number: int = 1) -> PushUpdate:
    lease, fence = f"lease-{peer_id}", 1
    interval = Interval(epoch=0, slice=0, start=0, stop=2)
    described = Contribution(
        peer_id=peer_id, fence=fence, lease_id=lease, round=round, base_digest=base, digest=digest_of(data),
        bytes=len(data), samples=2, intervals=(interval,),
    )  # fmt: skip
    return PushUpdate(
        job_id="job-1", job_epoch=1, round=round, lease_id=lease, fence=fence, view=number, contribution=described
    )


async def sent(network, header: PushUpdate, data: bytes = b"delta") -> Message:
    stream = await network.open_stream("work", header)
    try:
        await stream.send_all(data)
        await stream.send_eof()
        return await stream.receive_message(Message)
    finally:
        await stream.aclose()


class Play:
    """The session with an executor that has its state, screens everything `sound`, and merges when the test says."""

    def __init__(self, here) -> None:
        self.here = here
        self.ready, self.collected, self.evaluated = Heard(Ack()), Heard(Ack()), Heard(Ack())
        here.scheduler.serve(Ready, self.ready)
        here.scheduler.serve(Collected, self.collected)
        here.scheduler.serve(Evaluated, self.evaluated)
        self.session = here.aggregate()
        self.ear = Listener(here, self.session)
        self.refusals: dict[int, str] = {}
        self.screens = True
        here.network.accept_streams(PushUpdate, self.session.receive_push)
        here.network.accept_streams(FetchModel, self.session.serve_model)
        here.start_soon(self._screen)

    @property
    def directory(self) -> Path:
        return self.session.context.directory

    async def _screen(self) -> None:
        number = 0
        while True:
            screen = await self.ear.next(bridge.Screen, after=number)
            assert self.session.file(screen.file.path).stat().st_size == screen.file.bytes
            if self.screens:
                await self.session.report(
                    bridge.Screened(ticket=screen.ticket, refusal=self.refusals.get(screen.ticket))
                )
            number += 1

    async def state(self) -> None:
        model, momentum = file_ref(self.directory, "m-0", b"model 0"), file_ref(self.directory, "v-0", b"v 0")
        await self.session.report(bridge.StateReady(round=0, model=model, momentum=momentum))

    def see(self, newest) -> None:
        self.session.observe(newest, SCHEDULER)

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.directory / "spool").iterdir())

    def close(self, number: int = 1, *digests: str) -> CloseRound:
        return CloseRound(
            job_id="job-1", job_epoch=1, round=1, lease_id="lease-work", fence=1, view=1, close=number,
            base_digest=BASE, contributors=tuple((peer, 1, digest_of(b"delta")) for peer in digests or (A, B)),
        )  # fmt: skip

    def done(self, close: int = 1) -> bridge.MergeDone:
        made = {
            part: file_ref(self.directory, f"{part}-1-{close}", f"{part} 1 {close}".encode())
            for part in ("model", "momentum", "record", "update")
        }
        return bridge.MergeDone(round=1, close=close, **made)

    async def pushed(self) -> None:
        """Both push."""
        for peer_id in (A, B):
            assert isinstance(await sent(self.here.peers[peer_id], push(peer_id)), Accepted)

    async def merged(self) -> Merged:
        """Both push, the scheduler closes, the executor merges."""
        await self.pushed()
        answers = []

        async def close() -> None:
            answers.append(await self.session.close_round(self.close(), SCHEDULER))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            await self.ear.next(bridge.Merge)
            await self.session.report(self.done())
        return answers[0]


class Caught:
    """A nursery whose sessions may fail."""

    def __init__(self, nursery) -> None:
        self._nursery = nursery
        self.failures: list[str] = []

    def start_soon(self, function, *arguments) -> None:
        async def run() -> None:
            try:
                await function(*arguments)
            except* JobFailed as errors:
                self.failures += [repr(errors)]

        self._nursery.start_soon(run)
