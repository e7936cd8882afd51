"""Any number of parameter servers makes the same model, to the last bit, whatever the codec and the fragments."""

import threading

import msgspec
import pytest
import torch

from hypha.errors import JobFailed, RemoteProtocolError
from hypha.protocol.bridge import Merge, MergeDone, MergeInput, RoundCommitted, Screen, Screened
from hypha.protocol.compression import Coding, Compression
from hypha.protocol.fragments import Fragments, Streaming
from hypha.protocol.messages import Interval
from hypha.scheduler.whole import join
from hypha.training import aggregate, models, shares, tensors
from tests.training.test_aggregate import NoEvaluation, Reports
from tests.training.tiny_network import job_spec, ref

ROUNDS = 3
WORKERS = 2
CODED = {
    "none": Compression(),
    "int8": Compression(pseudo_gradients="int8", outer_updates="int8"),
    "int4": Compression(pseudo_gradients="int4", outer_updates="int4"),
    "stochastic": Compression(pseudo_gradients="int4", rounding="stochastic"),
    "topk": Compression(pseudo_gradients="topk", outer_updates="bf16"),
}


def trained(base, number, round_):
    """What a worker's inner steps made of the base: the same whoever has which tensors."""
    moved = {}
    for name, tensor in base.items():
        generator = torch.Generator().manual_seed(hash_of(name) + 31 * number + 7 * round_)
        moved[name] = tensor - 0.01 * torch.randn(tensor.shape, generator=generator)
    return moved


def hash_of(name):
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(name))


class Worker:
    def __init__(self, place, number, spec, servers):
        self.place, self.number, self.spec = place / f"worker-{number}", number, spec
        self.place.mkdir()
        self.bases = [server.work_dir / server.state.model.path for server in servers]
        self.owed = {}

    def contribute(self, round_, moved):
        coding = self.spec.compression.upward
        base = {}
        for path in self.bases:
            file = tensors.Reader(path)
            base |= {name: file.read(name) for name in file.names}
        turn = self.spec.streaming.turn(round_)
        lost = [self.place / f"lost-{round_}-{n}" for n in range(len(self.bases))] if coding.feedback else ()
        files = shares.pseudo_gradients(
            self.bases,
            trained(base, self.number, round_),
            round_=round_,
            used=[Interval(epoch=0, slice=self.number, start=0, stop=4)],
            coding=coding,
            owed=self.owed.get(turn, ()),
            lost=lost,
            fragment=moved,
            work_dir=self.place,
        )
        self.owed[turn] = lost
        return [self.place / file.path for file in files]

    def apply(self, round_, done, servers, moved):
        updates = [server.work_dir / one.update.path for server, one in zip(servers, done, strict=True)]
        outs = [self.place / f"model-{round_}-{n}" for n in range(len(updates))]
        coding = self.spec.compression.downward
        written = shares.subtract(outs, self.bases, updates, coding=coding, fragment=moved)
        assert [each.digest for each in written] == [one.model.digest for one in done]
        self.bases = outs


def serving(place, spec, shard):
    mine = msgspec.structs.replace(spec, work="aggregate", shard=shard)
    place = place / f"server-{shard}"
    place.mkdir()
    state = aggregate.initial_state(None, mine, place)
    fragments = aggregate.fragments_of(None, mine, place, state)
    return aggregate.Aggregator(Reports(), mine, place, state, NoEvaluation(), fragments)


def run(place, shards, compression, fragments):
    """A job of ROUNDS rounds; returns the digests of model, momentum and records as one server would have them."""
    place.mkdir()
    spec = msgspec.structs.replace(
        job_spec(), shards=shards, compression=compression, streaming=Streaming(fragments=fragments)
    )
    servers = [serving(place, spec, shard) for shard in range(shards)]
    workers = [Worker(place, number, spec, servers) for number in range(WORKERS)]
    whole = Fragments(models.parameters_of(models.build(spec.model)), spec.streaming)
    found = []
    for round_ in range(1, ROUNDS + 1):
        moved = whole.of(round_)
        pushes = [worker.contribute(round_, moved) for worker in workers]
        done = []
        for shard, server in enumerate(servers):
            inputs = []
            for number in range(WORKERS):
                spooled = server.work_dir / f"spool-{round_}-{number}"
                pushes[number][shard].replace(spooled)
                file = ref(spooled, server.work_dir)
                server.take(Screen(ticket=number, round=round_, file=file))
                assert server.session[-1] == Screened(ticket=number)
                inputs.append(MergeInput(peer_id=f"peer-{number}", fence=1, samples=3 + number, file=file))
            base = server.state.model.digest
            server.take(Merge(round=round_, close=round_, base_digest=base, inputs=tuple(inputs)))
            done.append(server.session[-1])
            assert isinstance(done[-1], MergeDone)
        for worker in workers:
            worker.apply(round_, done, servers, moved)
        for part in ("model", "momentum", "record", "update"):
            paths = [server.work_dir / getattr(one, part).path for server, one in zip(servers, done, strict=True)]
            found.append(join(paths, place / "joined"))
        for server, one in zip(servers, done, strict=True):
            server.take(RoundCommitted(round=round_, digest=one.model.digest))
    return found


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("codec", CODED)
def test_one_two_and_four_servers_make_the_same_model_to_the_last_bit(tmp_path, codec, fragments):
    made = {shards: run(tmp_path / f"{shards}", shards, CODED[codec], fragments) for shards in (1, 2, 4)}
    assert len(set(made[1])) > ROUNDS
    assert made[1] == made[2] == made[4]


def test_the_servers_have_every_tensor_once_and_about_as_many_bytes(tmp_path):
    spec = msgspec.structs.replace(job_spec(), shards=4)
    whole = models.parameters_of(models.build(spec.model))
    mine = [aggregate.share_of(msgspec.structs.replace(spec, shard=shard), whole) for shard in range(4)]
    assert sorted(name for share in mine for name in share) == sorted(whole)
    sizes = [sum(tensor.numel() for tensor in share.values()) for share in mine]
    assert max(sizes) - min(sizes) <= max(tensor.numel() for tensor in whole.values())


def test_more_servers_than_tensors_are_refused_with_both_numbers():
    spec = msgspec.structs.replace(job_spec(), shards=3)
    with pytest.raises(JobFailed, match=r"parameter_servers = 3, but the model has only 2 tensors"):
        aggregate.share_of(spec, {"a": torch.zeros(1), "b": torch.zeros(1)})


def test_parts_that_are_not_the_whole_are_not_loaded(tmp_path):
    one = tensors.save(tmp_path / "one", {"a": torch.ones(2)}).path
    two = tensors.save(tmp_path / "two", {"a": torch.ones(2), "b": torch.ones(1)}).path
    mine = {"a": torch.zeros(2), "b": torch.zeros(1)}
    with pytest.raises(RemoteProtocolError, match=r"tensor 'b' is missing \(1 in all\)"):
        tensors.load_parts([one], mine)
    with pytest.raises(RemoteProtocolError, match="two: tensor 'a' is in one, too"):
        tensors.load_parts([one, two], mine)
    tensors.load_parts([two], mine)
    assert torch.equal(mine["a"], torch.ones(2))


def test_a_base_is_written_while_its_values_are_in_use_and_needs_nothing_that_is_removed(tmp_path):
    before, change = {"a": torch.arange(6.0)}, {"a": torch.ones(6)}
    base, update = tensors.save(tmp_path / "base", before).path, tensors.save(tmp_path / "update", change).path
    held = threading.Event()
    tensors.aside(held.wait)  # what is to be written waits for what was given before
    parameters = {"a": torch.arange(6.0)}
    moved = shares.move(
        [tmp_path / "moved"], [base], [update], (tensors.digest({"a": before["a"] - 1}),), coding=Coding(),
        fragment={"a"}, into=parameters,
    )  # fmt: skip
    base.unlink()
    update.unlink()
    assert parameters["a"].tolist() == [-1, 0, 1, 2, 3, 4]
    assert not (tmp_path / "moved").exists()
    parameters["a"].zero_()
    held.set()
    assert [tensors.Reader(path).read("a").tolist() for path in moved] == [[-1, 0, 1, 2, 3, 4]]
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


@pytest.mark.parametrize("whole", [True, False])
def test_an_update_that_leads_elsewhere_moves_nobody(tmp_path, whole):
    values = {"a": torch.arange(6.0)}
    base, update = tensors.save(tmp_path / "base", values).path, tensors.save(tmp_path / "update", values).path
    moved = shares.move(
        [tmp_path / "moved"], [base], [update], ("0" * 64,), coding=Coding(), fragment={"a"},
        into={"a": torch.zeros(6)} if whole else None,
    )  # fmt: skip
    assert not moved
    assert update.exists()
