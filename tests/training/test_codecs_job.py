"""Coded updates in outer steps and in whole jobs: both sides stand on the same bits, and nothing owed is lost."""

import shutil

import msgspec
import pytest
import torch

from hypha.errors import RemoteProtocolError
from hypha.protocol.bridge import Merge, MergeDone, MergeFailed, MergeInput, ResumeFetched, Screen, Screened
from hypha.protocol.compression import CODECS, PLAIN, Coding, Compression
from hypha.protocol.job import JobSpec, OuterOptimizer, ResumePoint, Rounds
from hypha.protocol.messages import Interval
from hypha.scheduler.config import JobConfig
from hypha.training import aggregate, kept, outer, shares, tensors
from hypha.training.coded import CodedReader
from tests.training.running import finish, start_server, start_workers
from tests.training.test_aggregate import NoEvaluation, Reports
from tests.training.test_job import Lossy, SameRows, outcome, stood_on
from tests.training.tiny_network import Job, job_spec, ref

SHAPES = {"a": (70, 130), "b": (3,), "c": ()}
OUTER = OuterOptimizer(learning_rate=0.7, momentum=0.9)
LOSSY = [codec for codec in CODECS if codec != "none"]
FEEDBACK = ["int4", "topk"]


def values(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}


def outs(directory, tag):
    return {part: directory / f"{part}-{tag}" for part in outer.PARTS}


def read(path):
    file = tensors.Reader(path)
    return {name: file.read(name) for name in file.names}


def steps(directory, downward, *, tag, count=4):
    """Outer steps on the same pseudo-gradients, whatever the coding of updates."""
    model = tensors.save(directory / f"start-{tag}", values(0)).path
    momentum = outer.zeros(directory / f"zeros-{tag}", SHAPES).path
    done = []
    for number in range(count):
        delta = tensors.save(directory / f"delta-{number}", values(number + 1, 0.1)).path
        done.append(
            outer.Step(
                outs(directory, f"{tag}-{number}"),
                model=model,
                momentum=momentum,
                shares=[outer.Share(delta, 5, "peer-1")],
                outer=OUTER,
                downward=downward,
            ).take()
        )
        model, momentum = done[-1].model.path, done[-1].momentum.path
    return done


def job_with(compression, **changes):
    return job_spec(compression=compression, **changes)


def both(codec, **options):
    return Compression(pseudo_gradients=codec, outer_updates=codec, **options)


# --- outer steps ---


@pytest.mark.parametrize("codec", CODECS)
def test_workers_subtract_a_coded_update_and_stand_on_the_servers_bits(tmp_path, codec):
    coding = Coding(codec=codec)
    base = tmp_path / "start-x"
    for number, stepped in enumerate(steps(tmp_path, coding, tag="x")):
        mine = outer.subtract(tmp_path / f"mine-{number}", base, stepped.update.path, coding=coding)
        assert mine.digest == stepped.model.digest
        base = mine.path


@pytest.mark.parametrize("codec", CODECS)
def test_replaying_records_codes_the_updates_again_to_the_same_bits(tmp_path, codec):
    coding = Coding(codec=codec)
    model, momentum = tmp_path / "start-x", tmp_path / "zeros-x"
    for number, one in enumerate(steps(tmp_path, coding, tag="x")):
        again = outer.replay(
            outs(tmp_path, f"again-{number}"),
            model=model,
            momentum=momentum,
            record=one.record.path,
            outer=OUTER,
            downward=coding,
        )
        assert [getattr(again, part).digest for part in outer.PARTS] == [
            getattr(one, part).digest for part in outer.PARTS
        ]
        model, momentum = again.model.path, again.momentum.path


@pytest.mark.parametrize("codec", FEEDBACK)
def test_what_outer_updates_owe_is_what_the_model_lacks_of_the_uncoded_one(tmp_path, codec):
    coded, plain = steps(tmp_path, Coding(codec=codec), tag="coded")[-1], steps(tmp_path, PLAIN, tag="plain")[-1]
    model, truth, momentum = read(coded.model.path), read(plain.model.path), read(coded.momentum.path)
    for name in SHAPES:
        assert torch.equal(momentum[name][..., 0], read(plain.momentum.path)[name])
        torch.testing.assert_close(model[name] - momentum[name][..., 1], truth[name], atol=1e-5, rtol=1e-5)
    assert not torch.equal(model["a"], truth["a"])


@pytest.mark.parametrize("codec", ["none", "fp16", "bf16", "int8"])
def test_without_feedback_the_momentum_is_the_plain_one(tmp_path, codec):
    done = steps(tmp_path, Coding(codec=codec), tag="x")[-1]
    assert done.momentum.digest == steps(tmp_path, PLAIN, tag="y")[-1].momentum.digest


def test_a_job_may_go_on_with_another_coding_from_a_momentum_with_debts(tmp_path):
    one = steps(tmp_path, Coding(codec="topk"), tag="x")[-1]
    share = outer.Share(tmp_path / "delta-0", 1, "peer-1")
    for downward in (PLAIN, Coding(codec="int4")):
        outs_ = outs(tmp_path, f"next-{downward.codec}")
        options = {"momentum": one.momentum.path, "shares": [share], "outer": OUTER, "downward": downward}
        after = outer.Step(outs_, model=one.model.path, **options).take()
        assert read(after.momentum.path)["a"].shape == ((70, 130, 2) if downward.feedback else (70, 130))


def test_a_momentum_of_another_model_is_refused(tmp_path):
    model = tensors.save(tmp_path / "model", values(0)).path
    momentum = outer.zeros(tmp_path / "momentum", {**SHAPES, "b": (4,)}).path
    share = outer.Share(model, 1, "peer-1")
    with pytest.raises(RemoteProtocolError, match=r"momentum: tensor 'b' is F32\[4\], expected F32\[3\]"):
        outer.Step(outs(tmp_path, 1), model=model, momentum=momentum, shares=[share], outer=OUTER).take()


@pytest.mark.parametrize("codec", FEEDBACK)
def test_a_pseudo_gradient_carries_what_the_last_one_lost(tmp_path, codec):
    coding = Coding(codec=codec)
    base, end = tensors.save(tmp_path / "base", values(1)).path, values(2)
    owed, sent = None, torch.zeros(70, 130)
    for number in range(5):
        lost = tmp_path / f"lost-{number}"
        written = outer.pseudo_gradient(tmp_path / f"delta-{number}", base, end, coding=coding, owed=owed, lost=lost)
        file = CodedReader(written.path, SHAPES, coding)
        sent += torch.cat([file.part(piece) for piece in tensors.pieces_of({"a": SHAPES["a"]})]).view(70, 130)
        owed = lost
    truth = 5 * (values(1)["a"] - end["a"])
    torch.testing.assert_close(sent + read(owed)["a"], truth, atol=1e-4, rtol=1e-4)


# --- the parameter server ---


@pytest.fixture
def server(tmp_path):
    theta = tensors.save(tmp_path / "model-0-0.safetensors", values(0))
    momentum = outer.zeros(tmp_path / "momentum-0-0.safetensors", SHAPES)
    state = aggregate.State(0, theta.ref(tmp_path), momentum.ref(tmp_path))
    spec = job_with(Compression(pseudo_gradients="int8", outer_updates="int4"))
    return aggregate.Aggregator(Reports(), spec, tmp_path, state, NoEvaluation())


def test_an_update_coded_otherwise_is_refused_by_name_and_a_right_one_merged(server):
    base, directory = server.work_dir / server.state.model.path, server.work_dir
    for ticket, codec in enumerate(CODECS):
        written = outer.pseudo_gradient(directory / f"spool-1-{codec}", base, values(3), coding=Coding(codec=codec))
        server.take(Screen(ticket=ticket, round=1, file=written.ref(directory)))
    refusals = {codec: report.refusal for codec, report in zip(CODECS, server.session, strict=True)}
    assert refusals.pop("int8") is None
    assert refusals.pop("none") == "spool-1-none: tensor 'int8:a' is missing (3 in all)"
    assert refusals == {
        codec: f"spool-1-{codec}: tensor 'a' is coded {codec!r}, expected 'int8'"
        for codec in ("fp16", "bf16", "int4", "topk")
    }
    file = ref(directory / "spool-1-int8", directory)
    inputs = (MergeInput(peer_id="peer-1", fence=1, samples=3, file=file),)
    server.take(Merge(round=1, close=1, base_digest=server.state.model.digest, inputs=inputs))
    done = server.session[-1]
    assert isinstance(done, MergeDone)
    assert tensors.layout_of(directory / done.update.path).tensors.keys() == {f"int4:{name}" for name in SHAPES}


def test_an_update_too_large_for_its_codec_fails_the_merge_and_leaves_no_file(server):
    directory = server.work_dir
    file = directory / "spool"
    # Two contributions that can be coded, with a momentum that cannot be.
    large = {name: torch.full(shape, 3e38) for name, shape in SHAPES.items()}
    server.state = aggregate.State(0, server.state.model, tensors.save(directory / "momentum", large).ref(directory))
    outer.pseudo_gradient(file, directory / server.state.model.path, values(3), coding=Coding(codec="int8"))
    before = set(directory.iterdir())
    inputs = (MergeInput(peer_id="peer-1", fence=1, samples=3, file=ref(file, directory)),)
    server.take(Merge(round=1, close=1, base_digest=server.state.model.digest, inputs=inputs))
    assert server.session == [
        MergeFailed(round=1, close=1, reason="tensor 'a': elements are not finite, or too large to be coded")
    ]
    assert set(directory.iterdir()) == before


# --- whole jobs ---


@pytest.mark.parametrize(
    "compression",
    [*(both(codec) for codec in CODECS), both("int4", rounding="stochastic"), Compression(pseudo_gradients="topk")],
    ids=lambda one: f"{one.pseudo_gradients}-{one.outer_updates}-{one.rounding}",
)
def test_a_job_learns_and_all_stand_on_the_same_bits(tmp_path, compression):
    # Cut to 2 %, more rounds are needed than this test wants to wait for.
    wanted = 0.98 if "topk" in (compression.pseudo_gradients, compression.outer_updates) else 0.7
    with Job(tmp_path, job_with(compression), workers=2, sync_after=4) as job:
        finish(job, start_server(job), start_workers(job), evaluations={0, 3})
        assert [done.round for done in job.rounds] == [1, 2, 3]
        assert job.evaluations[3].loss < wanted * job.evaluations[0].loss
        for machine in job.workers:
            assert stood_on(machine)[1:3] == [outcome(done) for done in job.rounds[:2]]


def test_a_job_without_compression_is_the_one_it_always_was(tmp_path):
    digests = []
    for name, spec in (("plain", job_spec()), ("none", job_with(both("none", density=0.03)))):
        (tmp_path / name).mkdir()
        with SameRows(tmp_path / name, spec, workers=2, sync_after=4) as job:
            finish(job, start_server(job), start_workers(job))
            digests.append([(done.model.digest, done.momentum.digest, done.update.digest) for done in job.rounds])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("codec", FEEDBACK)
def test_what_is_owed_goes_back_with_a_round_that_is_undone(tmp_path, codec):
    (tmp_path / "lossy").mkdir()
    (tmp_path / "calm").mkdir()
    spec = job_with(both(codec, density=0.03))
    with Lossy(tmp_path / "lossy", spec, workers=2, sync_after=4) as job:
        finish(job, start_server(job), start_workers(job))
        assert job.rounds[1].close > job.lost.close
    with SameRows(tmp_path / "calm", spec, workers=2, sync_after=4) as calm:
        finish(calm, start_server(calm), start_workers(calm))
        assert [done.model.digest for done in calm.rounds] == [done.model.digest for done in job.rounds]


@pytest.mark.parametrize("codec", ["int8", "topk"])
def test_a_server_that_resumes_replays_coded_records_to_the_same_bits(tmp_path, codec):
    class Keeping(Job):
        """Everything a store would have kept."""

        def report(self, machine, report):
            for name in ("model", "momentum", "record"):
                if hasattr(report, name):
                    shutil.copyfile(machine.dir / getattr(report, name).path, self.root / f"{name}-{report.round}")
            return super().report(machine, report)

    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with Keeping(tmp_path / "first", job_with(both(codec)), workers=1, sync_after=4) as first:
        finish(first, start_server(first), start_workers(first))
    point = ResumePoint(round=1, model_digest="0" * 64, momentum_digest="0" * 64)
    rounds = Rounds(updates=3, samples_between_updates=64, max_batch_size=8)
    with Job(tmp_path / "second", job_with(both(codec), resume=point, rounds=rounds), workers=1) as second:

        def bring(name):
            shutil.copyfile(first.root / name, second.server.dir / name)
            return ref(second.server.dir / name, second.server.dir)

        second.resume = ResumeFetched(
            round=1,
            model=bring("model-1"),
            momentum=bring("momentum-1"),
            records=(bring("record-2"), bring("record-3")),
        )
        server = start_server(second)
        assert second.base.digest == first.rounds[2].model.digest
        finish(second, server, [])


def test_of_what_was_lost_only_what_is_still_owed_stays_on_disk(tmp_path):
    spec = job_with(both("topk"), rounds=Rounds(updates=5, samples_between_updates=64, max_batch_size=8))
    with Job(tmp_path, spec, workers=1, sync_after=2) as job:
        finish(job, start_server(job), start_workers(job))
        assert {path.name for path in job.workers[0].dir.glob("lost-*")} <= {
            "lost-4-0.safetensors",
            "lost-5-0.safetensors",
        }
        assert (job.workers[0].dir / "lost-5-0.safetensors").exists()


def test_a_worker_adds_what_it_owes_to_its_next_update(tmp_path, monkeypatch):
    rounds = []
    for forgetful in (False, True):
        (tmp_path / str(forgetful)).mkdir()
        if forgetful:  # as one that restarts after every round
            monkeypatch.setattr(kept.Book, "owed", lambda _self, _round: {})
        spec = job_with(Compression(pseudo_gradients="topk"))
        with SameRows(tmp_path / str(forgetful), spec, workers=1, sync_after=4) as job:
            finish(job, start_server(job), start_workers(job))
            rounds.append([done.record.digest for done in job.rounds])
    assert rounds[0][0] == rounds[1][0]
    assert rounds[0][1] != rounds[1][1]


def test_only_an_accepted_update_changes_what_is_owed_and_of_its_fragment_alone(tmp_path):
    old, other, lost = ((tmp_path / f"lost-{n}",) for n in (2, 3, 4))
    book = kept.Book(tmp_path)
    book[4] = kept.Kept((tmp_path / "base",), "d", inner=None, fragment=1, owed={0: other, 1: old}, lost=lost)
    assert book.owed(5) == {0: other, 1: old}
    book[4].contributed = True
    assert book.owed(5) == {0: other, 1: lost}
    assert book.owed(7) == {0: other, 1: lost}  # fetched, after rounds it had no part in
    assert book.owed(4) == {0: other, 1: old}  # the same round again, on another base
    assert book.owed(3) == {}  # nothing kept says what was owed then


def test_no_two_workers_round_alike():
    mine, theirs = (Interval(epoch=0, slice=1, start=start, stop=start + 8) for start in (0, 8))
    first, again, other, later = (
        torch.rand(4, generator=shares.generator_of(round_, used, "w"))
        for round_, used in ((1, [mine]), (1, [mine]), (1, [theirs]), (2, [mine]))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, later)


# --- the table ---


def test_a_job_says_how_its_updates_travel_and_old_ones_say_nothing():
    spec = job_with(Compression(pseudo_gradients="topk", density=0.01, outer_updates="topk", outer_density=0.12))
    again = msgspec.json.decode(msgspec.json.encode(spec), type=JobSpec)
    assert again.compression.upward == Coding(codec="topk", density=0.01)
    assert again.compression.downward == Coding(codec="topk", density=0.12)
    plain = msgspec.json.decode(msgspec.json.encode(job_spec()))
    del plain["compression"]
    assert msgspec.convert(plain, JobSpec).compression == Compression()


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"pseudo_gradients": "int3"}, "Invalid enum value 'int3' - at `\\$.pseudo_gradients`"),
        ({"outer_updates": "zip"}, "Invalid enum value 'zip' - at `\\$.outer_updates`"),
        ({"density": 0.5}, "Expected `float` <= 0.03 - at `\\$.density`"),
        ({"outer_density": 0.5}, "Expected `float` <= 0.2 - at `\\$.outer_density`"),
        ({"rounding": "stochastic"}, "rounding 'stochastic' is for pseudo_gradients 'int4', not 'none'"),
        ({"codec": "int8"}, "unknown field `codec`"),
    ],
)
def test_a_codec_named_wrong_is_refused_with_its_key(table, reason):
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert(table, Compression)


def scheduler_job(momentum, outer_updates):
    return {
        "model": {"config": {"layers": []}, "type": "torch"},
        "dataset": "points",
        "rounds": {"updates": 1, "samples_between_updates": 1},
        "outer_optimizer": {"momentum": momentum},
        "compression": {"pseudo_gradients": "topk", "outer_updates": outer_updates},
    }


def test_outer_updates_with_momentum_are_not_cut_to_the_largest():
    with pytest.raises(msgspec.ValidationError, match=r"outer_updates 'topk' needs outer_optimizer\.momentum 0"):
        msgspec.convert(scheduler_job(0.9, "topk"), JobConfig)
    assert msgspec.convert(scheduler_job(0.0, "topk"), JobConfig).compression.downward.codec == "topk"
    assert msgspec.convert(scheduler_job(0.9, "int4"), JobConfig).compression.upward.codec == "topk"


def test_screened_is_what_a_server_answers(server):
    (server.work_dir / "short").write_bytes(b"\x00")
    server.take(Screen(ticket=1, round=1, file=ref(server.work_dir / "short", server.work_dir)))
    assert server.session == [Screened(ticket=1, refusal="short: not SafeTensors: 1 bytes are too few for a header")]
