"""Updates merged while they still arrive: the same bits as afterwards, and nothing where something else happens."""

import threading

import pytest
import torch

from hypha.errors import RemoteProtocolError
from hypha.protocol.bridge import Merge, MergeDone, MergeInput, Prepare, Screen, Screened
from hypha.protocol.compression import Compression
from hypha.training import aggregate, ahead, coded, outer, tensors
from hypha.training.arriving import Arriving
from tests.training.test_aggregate import NoEvaluation, Reports
from tests.training.tiny_network import job_spec

# More than a piece, so that a file has a middle.
SHAPES = {"a": (tensors.PIECE_ELEMENTS + 5,), "b": (2, 2)}


class Transfer:
    """One update on its way: `more` lets some of its bytes arrive."""

    def __init__(self, server, number, *, round_=1, values=None):
        self.path = server.work_dir / f"spool-{round_}-{number}"
        whole = server.work_dir / f"sent-{round_}-{number}"
        given = made(100 * round_ + number) if values is None else values
        with coded.CodedWriter(whole, SHAPES, server.job.compression.upward) as out:
            for piece in tensors.pieces_of(SHAPES):
                out.append(piece, piece.of(given[piece.name]))
            written = out.finish()
        self.data = whole.read_bytes()
        self.file = tensors.Written(self.path, written.bytes, written.digest).ref(server.work_dir)
        self.input = MergeInput(peer_id=f"peer-{number}", fence=1, samples=10 + 7 * number, file=self.file)
        self.part = self.path.with_name(f"{self.path.name}.part")
        self.part.touch()

    def more(self, share):
        with self.part.open("ab") as file:
            file.write(self.data[file.tell() : int(len(self.data) * share)])

    def land(self):
        self.more(1)
        self.part.rename(self.path)

    def break_off(self):
        self.part.unlink()


def made(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def server_of(tmp_path, **job):
    theta = tensors.save(tmp_path / "model-0-0.safetensors", made(0))
    momentum = outer.zeros(tmp_path / "momentum-0-0.safetensors", SHAPES)
    state = aggregate.State(0, theta.ref(tmp_path), momentum.ref(tmp_path))
    return aggregate.Aggregator(Reports(), job_spec(**job), tmp_path, state, NoEvaluation())


@pytest.fixture
def server(tmp_path):
    made_up = server_of(tmp_path)
    with made_up.ahead:
        yield made_up


def prepare(server, transfers, *, round_=1, base=None):
    digest = base or server.state.model.digest
    server.take(Prepare(round=round_, base_digest=digest, inputs=tuple(one.input for one in transfers)))


def merge(server, transfers, *, close=1, round_=1, base=None):
    digest = base or server.state.model.digest
    server.take(Merge(round=round_, close=close, base_digest=digest, inputs=tuple(one.input for one in transfers)))
    return server.session[-1]


def digests(done):
    return [getattr(done, part).digest for part in outer.PARTS]


@pytest.mark.parametrize("codec", ["none", "int8", "topk"])
def test_what_is_merged_on_its_way_has_the_bits_of_what_is_merged_afterwards(tmp_path, codec):
    server = server_of(tmp_path, compression=Compression(pseudo_gradients=codec, outer_updates=codec))
    transfers = [Transfer(server, number) for number in range(3)]
    with server.ahead:
        prepare(server, transfers)
        for share in (0.001, 0.3, 0.9):
            for one in transfers:
                one.more(share)
        for one in transfers:
            one.land()
        # In another order than they were foreseen in: it says nothing.
        early = merge(server, transfers[::-1], close=1)
        assert early.update.path.startswith("update-1-ahead-")
        late = merge(server, transfers, close=2)
    assert isinstance(late, MergeDone)
    assert digests(early) == digests(late)


def test_one_that_is_here_already_is_merged_with_one_that_arrives(server):
    here, coming = Transfer(server, 1), Transfer(server, 2)
    here.land()
    prepare(server, [here, coming])
    coming.land()
    early = merge(server, [here, coming])
    assert "ahead" in early.update.path
    assert digests(early) == digests(merge(server, [here, coming], close=2))


def test_a_close_with_others_gives_up_what_was_begun(server):
    transfers = [Transfer(server, number) for number in range(2)]
    prepare(server, transfers)
    transfers[0].land()  # the other one never comes
    done = merge(server, transfers[:1])
    assert isinstance(done, MergeDone)
    assert done.update.path == "update-1-1.safetensors"
    assert [path.name for path in server.work_dir.glob("*ahead*")] == []


@pytest.mark.parametrize(("sound", "failed"), [(True, False), (False, True)])
def test_only_what_went_wrong_by_itself_shows_as_failed_in_the_trace(server, exported, sound, failed):
    nonsense = {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()}
    one = Transfer(server, 0, values=None if sound else nonsense)
    prepare(server, [one])
    if not sound:
        one.land()
        assert server.ahead.found_sound(one.file) is False
    server.ahead.give_up()
    (span,) = [span for span in exported() if span.name == "merge_ahead"]
    assert span.status.is_ok is not failed
    assert ("given_up" in span.attributes) is not failed


@pytest.mark.parametrize("samples", [24, 0])
def test_another_weight_is_another_merge(server, samples):
    transfers = [Transfer(server, number) for number in range(2)]
    prepare(server, transfers)
    for one in transfers:
        one.land()
    first = transfers[0].input
    transfers[0].input = MergeInput(peer_id=first.peer_id, fence=first.fence, samples=samples, file=first.file)
    assert merge(server, transfers).update.path == "update-1-1.safetensors"
    assert list(server.work_dir.glob("*ahead*")) == []


def test_a_transfer_that_breaks_ends_it_and_the_next_attempt_begins_anew(server):
    steady, broken, again = Transfer(server, 1), Transfer(server, 2), Transfer(server, 3)
    prepare(server, [steady, broken])
    broken.more(0.5)
    broken.break_off()
    prepare(server, [steady, again])
    steady.land()
    again.land()
    assert "ahead" in merge(server, [steady, again]).update.path


def test_bytes_that_are_no_update_are_found_out_by_screening_as_ever(server):
    wrong = Transfer(server, 1, values={name: torch.full(shape, float("inf")) for name, shape in SHAPES.items()})
    sound = Transfer(server, 2)
    prepare(server, [wrong, sound])
    wrong.land()
    sound.land()
    for ticket, one in enumerate((wrong, sound)):
        server.take(Screen(ticket=ticket, round=1, file=one.file))
    assert server.session == [Screened(ticket=0, refusal="tensor 'a' is not finite"), Screened(ticket=1)]
    assert merge(server, [sound]).update.path == "update-1-1.safetensors"


def test_a_header_that_lies_about_the_file_begins_nothing(server):
    liar, sound = Transfer(server, 1), Transfer(server, 2)
    liar.data = b"\xff" * len(liar.data)
    prepare(server, [liar, sound])
    liar.land()
    sound.land()
    server.take(Screen(ticket=1, round=1, file=liar.file))
    assert "spool-1-1: header" in server.session[-1].refusal
    assert merge(server, [sound]).update.path == "update-1-1.safetensors"


def test_what_was_read_to_its_end_is_not_screened_again(server, monkeypatch):
    transfers = [Transfer(server, number) for number in range(2)]
    prepare(server, transfers)
    for one in transfers:
        one.land()
    screened = []
    monkeypatch.setattr(coded, "screen", lambda path, *_: screened.append(path.name))
    server.take(Screen(ticket=1, round=1, file=transfers[1].file))
    server.take(Screen(ticket=2, round=1, file=Transfer(server, 5).file))
    assert server.session == [Screened(ticket=1), Screened(ticket=2)]
    assert screened == ["spool-1-5"]


def test_while_others_still_arrive_screening_does_not_wait_for_them(server):
    here, coming = Transfer(server, 1), Transfer(server, 2)
    prepare(server, [here, coming])
    here.land()
    server.take(Screen(ticket=1, round=1, file=here.file))  # would never return
    assert server.session == [Screened(ticket=1)]


def test_the_next_round_may_begin_on_what_is_not_committed_yet(server):
    first, second = Transfer(server, 1), Transfer(server, 2, round_=2)
    first.land()
    done = merge(server, [first])
    prepare(server, [second], round_=2, base=done.model.digest)
    second.land()
    assert "ahead" in merge(server, [second], round_=2, base=done.model.digest).update.path


def test_a_base_that_gives_way_to_another_close_takes_what_was_begun_on_it_along(server):
    transfers, second = [Transfer(server, number) for number in range(2)], Transfer(server, 2, round_=2)
    for one in transfers:
        one.land()
    done = merge(server, transfers)
    prepare(server, [second], round_=2, base=done.model.digest)
    other = merge(server, transfers[:1], close=2)
    assert isinstance(other, MergeDone)
    assert list(server.work_dir.glob("*ahead*")) == []
    second.land()
    after = merge(server, [second], round_=2, base=other.model.digest)
    assert after.update.path == "update-2-1.safetensors"


def test_an_unknown_base_begins_nothing_and_ends_what_was_begun(server):
    transfers = [Transfer(server, number) for number in range(2)]
    prepare(server, transfers)
    prepare(server, transfers, base="0" * 64)
    for one in transfers:
        one.land()
    assert merge(server, transfers).update.path == "update-1-1.safetensors"


def test_more_updates_than_may_be_open_at_once_are_merged_at_the_close(server, monkeypatch):
    monkeypatch.setattr(ahead, "INPUTS_MAX", 1)
    transfers = [Transfer(server, number) for number in range(2)]
    prepare(server, transfers)
    for one in transfers:
        one.land()
    assert merge(server, transfers).update.path == "update-1-1.safetensors"


def test_leaving_ends_every_wait(tmp_path):
    server = server_of(tmp_path)
    with server.ahead:
        prepare(server, [Transfer(server, 1)])
    assert [thread.name for thread in threading.enumerate() if "ahead" in thread.name] == []


@pytest.mark.parametrize("other", [{"round": 2}, {"base_digest": "1" * 64}])
def test_another_round_or_base_is_not_what_was_begun(server, other):
    one = Transfer(server, 1)
    prepare(server, [one])
    one.land()
    asked = {"round": 1, "base_digest": server.state.model.digest, "close": 1, "inputs": (one.input,)}
    assert server.ahead.take(Merge(**asked | other)) is None
    assert server.ahead.take(Merge(**asked)) is None  # it was given up


def test_a_file_that_is_removed_is_not_waited_for(tmp_path):
    part = tmp_path / "update.part"
    part.write_bytes(b"12345")
    arriving = Arriving(tmp_path / "update", 8, threading.Event())
    assert arriving.until(5) >= 0
    part.unlink()
    with pytest.raises(RemoteProtocolError, match="update is gone after 5 of 8 bytes"):
        arriving.until(6)
    arriving.close()


def test_what_is_given_up_is_not_read_on_though_it_is_here(tmp_path):
    (tmp_path / "update").write_bytes(b"12345678")
    given_up = threading.Event()
    arriving = Arriving(tmp_path / "update", 8, given_up)
    assert arriving.until(8) >= 0
    given_up.set()
    with pytest.raises(RemoteProtocolError, match="update is not awaited any longer"):
        arriving.until(8)
    arriving.close()


def test_a_file_that_stands_still_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("hypha.training.arriving.STALL_S", 0.01)
    arriving = Arriving(tmp_path / "never", 8, threading.Event())
    with pytest.raises(RemoteProtocolError, match="never is not awaited any longer"):
        arriving.until(1)
    arriving.close()
