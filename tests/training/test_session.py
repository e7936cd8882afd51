"""The bridge's client: typed answers, typed refusals, and an end when the worker goes."""

import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from hypha.errors import RemoteProtocolError
from hypha.protocol.bridge import FetchBase, Finish, NoSamples, Screened, Stop
from hypha.telemetry import bridge_path
from hypha.training.session import BridgeClosed, BridgeRefused, Session
from tests.training.fake_bridge import FakeBridge, Refusal


class Answers:
    """Scripted answers, and what was asked."""

    def __init__(self):
        self.fetches, self.otlp = [], []
        self.answer = Finish()

    def fetch(self, message):
        answer = self.fetches.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def report(self, _message):
        return self.answer

    def telemetry(self, kind, body):
        self.otlp.append((kind, body))


@pytest.fixture
def bridge():
    directory = Path(tempfile.mkdtemp(prefix="hypha-"))
    with FakeBridge(directory / "s", Answers()) as bridge:
        yield bridge
    shutil.rmtree(directory)


def test_answers_are_typed(bridge):
    bridge.answers.fetches = [NoSamples(round=3)]
    with Session(bridge.path) as session:
        assert session.fetch(FetchBase()) == NoSamples(round=3)
        assert session.report(Screened(ticket=1)) == Finish()


def test_a_refusal_carries_its_reason_and_whether_to_try_again(bridge):
    bridge.answers.fetches = [Refusal("no dataset of that name"), Refusal("no view yet", retry=True)]
    with Session(bridge.path) as session:
        with pytest.raises(BridgeRefused, match="no dataset of that name") as never:
            session.fetch(FetchBase())
        with pytest.raises(BridgeRefused, match="no view yet") as later:
            session.fetch(FetchBase())
    assert (never.value.retry, later.value.retry) == (False, True)


def test_patience_asks_again_while_the_worker_says_later(bridge):
    bridge.answers.fetches = [Refusal("no view yet", retry=True), NoSamples(round=1)]
    with Session(bridge.path) as session:
        assert session.fetch_patiently(FetchBase()) == NoSamples(round=1)


def test_patience_ends_at_a_final_refusal_and_when_no_longer_wanted(bridge):
    bridge.answers.fetches = [Refusal("never"), Refusal("later", retry=True)]
    with Session(bridge.path) as session:
        with pytest.raises(BridgeRefused, match="never"):
            session.fetch_patiently(FetchBase())
        with pytest.raises(BridgeRefused, match="later"):
            session.fetch_patiently(FetchBase(), leave=lambda: True)


def test_events_come_in_order(bridge):
    with Session(bridge.path) as session:
        for number in range(5):
            bridge.push(Stop(reason=str(number)))
        assert [session.next_event(5).reason for _ in range(5)] == list("01234")
        assert session.next_event(0.0) is None
        assert session.drain() == []


def test_an_answer_that_is_no_answer_is_their_fault(bridge):
    bridge.answers.answer = Stop(reason="not an instruction")
    with Session(bridge.path) as session, pytest.raises(RemoteProtocolError, match="worker answered /status/send"):
        session.report(Screened(ticket=1))


def test_when_the_worker_goes_waiting_and_asking_end(bridge):
    lost = threading.Event()
    with Session(bridge.path, on_lost=lost.set) as session:
        bridge.push(Stop(reason="last words"))
        bridge.hang_up()
        assert lost.wait(5)
        assert session.next_event(5) == Stop(reason="last words")
        with pytest.raises(BridgeClosed):
            session.next_event(5)
        with pytest.raises(BridgeClosed):
            session.drain()
        with pytest.raises(BridgeClosed):
            session.fetch(FetchBase())


def test_hanging_up_ourselves_is_no_loss(bridge):
    lost = threading.Event()
    with Session(bridge.path, on_lost=lost.set):
        pass
    assert not lost.is_set()


def test_a_socket_that_is_not_there_is_a_closed_bridge(tmp_path):
    with pytest.raises(BridgeClosed, match="nothing is not a socket"):
        Session(tmp_path / "nothing").__enter__()


def test_telemetry_is_posted_by_kind(bridge):
    with Session(bridge.path) as session:
        session.post_otlp(bridge_path("traces"), b"\x00bytes")
    assert bridge.answers.otlp == [("traces", b"\x00bytes")]
