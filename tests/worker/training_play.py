"""A training session in its play: the worker's half, a scripted parameter server, and the view they share."""

import trio

from hypha.errors import Refused
from hypha.network.artifacts import serve_artifact
from hypha.protocol.messages import (
    Accepted,
    FetchModel,
    Message,
    OuterUpdate,
    PushUpdate,
)
from tests.worker.cast import (
    SCHEDULER,
    Listener,
    digest_of,
    file_ref,
    update_of,
    view,
)

MODEL = b"model 0" * 1000
BASE = digest_of(MODEL)
UPDATE = b"update 1" * 1000


def opened(number: int = 1, **changes):
    return view(number, **{"base_digest": BASE, "committed_digest": BASE} | changes)


class Server:
    """A parameter server that holds MODEL and answers pushes by its script."""

    def __init__(self, network, runtime, path) -> None:
        self.script: list[Message | Exception] = []
        self.pushed: list[PushUpdate] = []
        self.fetched: list[FetchModel] = []
        self.silent = False
        self._runtime = runtime
        self._path = path
        path.write_bytes(MODEL)
        network.accept_streams(FetchModel, self._fetch)
        network.accept_streams(PushUpdate, self._push)

    async def _fetch(self, stream, header):
        self.fetched.append(header)
        if self.silent:
            await trio.sleep_forever()
        if header.digest != BASE:
            raise Refused("not held here", "retry")
        await serve_artifact(stream, header, self._path, size=len(MODEL), runtime=self._runtime)

    async def _push(self, stream, header):
        self.pushed.append(header)
        if self.silent:
            await trio.sleep_forever()
        while await stream.receive_some(1 << 16):
            pass
        answer = self.script.pop(0) if self.script else Accepted(digest=header.contribution.digest)
        if isinstance(answer, Exception):
            raise answer
        await stream.send_message(answer)


async def send_outer(network, header: OuterUpdate, data: bytes = UPDATE) -> Message:
    stream = await network.open_stream("work", header)
    try:
        await stream.send_all(data)
        await stream.send_eof()
        return await stream.receive_message(Message)
    finally:
        await stream.aclose()


def outer(**changes) -> OuterUpdate:
    known = {
        "job_id": "job-1", "job_epoch": 1, "view": 1, "round": 1, "lease_id": "lease-work", "close": 1,
        "base_digest": BASE, "model_digest": digest_of("model 1"), "digest": digest_of(UPDATE), "bytes": len(UPDATE),
    }  # fmt: skip
    return OuterUpdate(**known | changes)


class Play:
    def __init__(self, here) -> None:
        self.here = here
        self.server = Server(here.server, here.runtime, here.directory / "held")
        self.session = here.train()
        self.ear = Listener(here, self.session)
        here.network.accept_streams(OuterUpdate, self.session.receive_update)

    def see(self, newest) -> None:
        self.session.observe(newest, SCHEDULER)

    def update(self, **changes):
        return update_of(file_ref(self.session.context.directory, "delta", b"delta"), **{"base": MODEL} | changes)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.session.context.directory.iterdir())
