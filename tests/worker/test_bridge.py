"""The job bridge over its real socket: who may connect, what is understood, and how a no comes back."""

import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import msgspec
import pytest
import trio

from hypha.errors import JobFailed, LocalProtocolError, PeerUnreachable, Refused, StoreError
from hypha.protocol.bridge import BridgeError, FetchBase, GoOn, NoSamples, Stop, TrainProgress, ViewChanged
from hypha.worker.bridge import BODY_BYTES_MAX, SOCKET_PATH_BYTES_MAX, serve_bridge

pytestmark = pytest.mark.slow

PATIENCE_S = 10.0
VIEW = ViewChanged(view=1, round=1, base_digest="0" * 64, member=True, committed_round=0)
PROGRESS = TrainProgress(round=1, batches=1, samples=2, batch_size=2, batch_s=0.1, loss=3.0)


class Script:
    """A session that answers as it is told; an exception is raised."""

    def __init__(self) -> None:
        self.answer: object = NoSamples(round=1)
        self.asked: list[object] = []
        self.failures: list[str] = []
        self.events_in, self.events_out = trio.open_memory_channel[object](10)

    async def fetch(self, request):
        return self._answer(request)

    async def send(self, request):
        return self._answer(request)

    async def report(self, report):
        return self._answer(report)

    async def telemetry(self, kind, body):
        self._answer((kind, body))

    def fail(self, reason):
        self.failures.append(reason)

    async def events(self):
        async for event in self.events_out:
            yield event

    def _answer(self, request):
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@asynccontextmanager
async def bridge(directory) -> AsyncIterator[tuple[Script, httpx.AsyncClient]]:
    session = Script()
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            path = await nursery.start(serve_bridge, session, directory)
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            async with httpx.AsyncClient(transport=transport, base_url="http://bridge") as client:
                yield session, client
            nursery.cancel_scope.cancel()


def refusal(response: httpx.Response) -> BridgeError:
    return msgspec.json.decode(response.content, type=BridgeError)


async def test_the_socket_is_this_users_alone_and_goes_with_the_bridge(tmp_path):
    async with bridge(tmp_path) as (_, client):
        mode = (tmp_path / "bridge.sock").stat().st_mode
        assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)
        assert (await client.post("/resources/fetch", content=msgspec.json.encode(FetchBase()))).status_code == 200
    assert list(tmp_path.iterdir()) == []


async def test_a_path_too_long_for_a_socket_is_served_from_a_short_private_directory(tmp_path):
    deep = tmp_path / ("d" * SOCKET_PATH_BYTES_MAX)
    deep.mkdir()
    session = Script()
    async with trio.open_nursery() as nursery:
        path = await nursery.start(serve_bridge, session, deep)
        assert len(str(path)) <= SOCKET_PATH_BYTES_MAX
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) as client:
            assert (await client.post("http://b/status/send", content=msgspec.json.encode(PROGRESS))).is_success
        nursery.cancel_scope.cancel()
    assert not path.parent.exists()


async def test_no_bridge_where_there_can_be_no_socket_is_the_jobs_failure(tmp_path):
    with pytest.raises(JobFailed, match=r"no bridge at .*missing/bridge.sock: No such file"):
        await serve_bridge(Script(), tmp_path / "missing")


async def test_a_question_reaches_the_session_and_its_answer_the_executor(tmp_path):
    async with bridge(tmp_path) as (session, client):
        session.answer = GoOn()
        response = await client.post("/status/send", content=msgspec.json.encode(PROGRESS))
        assert (response.status_code, response.json()) == (200, {"type": "GoOn", "traceparent": None})
        assert session.asked == [PROGRESS]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/resources/fetch", b"{", "/resources/fetch: Input data was truncated"),
        ("/resources/fetch", b"\xff\xfe", "/resources/fetch: "),
        ("/resources/fetch", b'{"type": "FetchSource", "what": "\xff"}', "/resources/fetch: "),
        ("/resources/fetch", b'{"type": "FetchMoney"}', "/resources/fetch: Invalid value 'FetchMoney' - at `$.type`"),
        ("/resources/fetch", b"[" * 100_000, "/resources/fetch: "),
        ("/resources/send", b'{"type": "SendUpdate"}', "/resources/send: Object missing required field `round`"),
        ("/status/send", b'{"type": "FetchBase"}', "/status/send: Invalid value 'FetchBase' - at `$.type`"),
    ],
)
async def test_what_is_not_understood_is_refused_with_what_is_wrong(tmp_path, path, body, said):
    async with bridge(tmp_path) as (session, client):
        response = await client.post(path, content=body)
        assert response.status_code == 400
        assert refusal(response).reason.startswith(said)
        assert (session.asked, session.failures) == ([], [])


@pytest.mark.parametrize("path", ["/resources/fetch", "/telemetry?kind=traces"])
async def test_a_body_without_end_is_cut_off(tmp_path, path):
    async with bridge(tmp_path) as (session, client):
        response = await client.post(path, content=b" " * (BODY_BYTES_MAX + 1))
        assert (response.status_code, session.asked) == (413, [])
        assert f"body exceeds {BODY_BYTES_MAX} bytes" in refusal(response).reason


@pytest.mark.parametrize(
    ("method", "path", "status"), [("POST", "/resources/steal", 404), ("GET", "/resources/fetch", 405)]
)
async def test_other_paths_and_methods_are_refused_in_the_same_form(tmp_path, method, path, status):
    async with bridge(tmp_path) as (_, client):
        response = await client.request(method, path)
        assert (response.status_code, path in refusal(response).reason) == (status, True)


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (Refused("no such lease"), 409, False),
        (Refused("not closed yet", "retry"), 409, True),
        (LocalProtocolError("out of turn"), 409, False),
        (PeerUnreachable("nobody provides it"), 503, True),
        (StoreError("disk full"), 507, False),
    ],
)
async def test_a_no_carries_its_reason_and_whether_to_ask_again(tmp_path, error, status, retry):
    async with bridge(tmp_path) as (session, client):
        session.answer = error
        response = await client.post("/resources/fetch", content=msgspec.json.encode(FetchBase()))
        assert response.status_code == status
        assert (refusal(response).reason, refusal(response).retry) == (str(error), retry)
        assert session.failures == []


async def test_a_bug_fails_the_job_and_is_logged_with_its_traceback(tmp_path, caplog):
    async with bridge(tmp_path) as (session, client):
        session.answer = KeyError("view")
        response = await client.post("/resources/fetch", content=msgspec.json.encode(FetchBase()))
        assert (response.status_code, refusal(response).retry) == (500, False)
        assert session.failures == ["internal error at /resources/fetch: KeyError: 'view'"]
        session.answer = GoOn()
        assert (await client.post("/status/send", content=msgspec.json.encode(PROGRESS))).is_success
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info is not None


async def test_events_stream_until_the_session_ends(tmp_path):
    async with bridge(tmp_path) as (session, client), client.stream("POST", "/resources/receive") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.aiter_lines()
        assert (await anext(lines)).startswith(":")  # subscribed, before there is any event
        await session.events_in.send(VIEW)
        await session.events_in.send(Stop(reason="done"))
        session.events_in.close()
        data = [line.removeprefix("data: ") async for line in lines if line.startswith("data: ")]
        assert [msgspec.json.decode(each)["type"] for each in data] == ["ViewChanged", "Stop"]


async def test_events_have_one_reader(tmp_path):
    async with bridge(tmp_path) as (_, client), client.stream("POST", "/resources/receive") as response:
        assert response.is_success
        second = await client.post("/resources/receive")
        assert (second.status_code, refusal(second).reason) == (409, "/resources/receive: there was a reader before")


async def test_telemetry_is_handed_over_as_it_came(tmp_path):
    async with bridge(tmp_path) as (session, client):
        response = await client.post("/telemetry", params={"kind": "traces"}, content=b"\x00otlp\xff")
        assert (response.status_code, session.asked) == (204, [("traces", b"\x00otlp\xff")])
        session.answer = Refused("telemetry of unknown kind")
        assert (await client.post("/telemetry", content=b"")).status_code == 409
