"""Jobs that synchronise a fragment at a time, against the slow and obvious loop, and when something happens."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from hypha.errors import ConfigError
from hypha.protocol.bridge import MergeDone, Screen, Screened, TrainProgress
from hypha.protocol.compression import CODECS, Coding, Compression
from hypha.protocol.fragments import Fragments, Streaming
from hypha.protocol.job import DatasetRef, HeldOutSlice, InnerOptimizer, ModelSpec, OuterOptimizer, Rounds
from hypha.training import aggregate, arithmetic, executor, local, models, outer, tensors
from hypha.training.batches import Rows
from hypha.training.inner import InnerLoop
from tests.training.running import Executor, finish, start_server, start_workers, wait
from tests.training.test_aggregate import NoEvaluation, Reports
from tests.training.test_job import Lossy, SameRows, Unsettled, outcome, stood_on
from tests.training.tiny_network import Job, job_spec, ref

TOKENS = 16
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": TOKENS,
}


def streamed(fragments=2, **more):
    return Streaming(fragments=fragments, **more)


def write_text(path, *, rows, seed):
    """Counting by ones from anywhere, modulo 32: a small Llama learns it fast."""
    starts = np.random.default_rng(seed).integers(0, 32, size=(rows, 1))
    save_file({"input_ids": ((starts + np.arange(TOKENS)) % 32).astype(np.uint8)}, str(path))


def llama_spec(**changes):
    fields = {
        "model": ModelSpec(type="causal-lm", config=LLAMA, seed=3),
        "dataset": DatasetRef(
            name="counting",
            manifest_digest="0" * 64,
            schema={"input_ids": f"U8[{TOKENS}]"},
            held_out=(HeldOutSlice(name="held", samples=32, bytes=1, digest="0" * 64),),
        ),
        "rounds": Rounds(updates=8, samples_between_updates=64, max_batch_size=8, evaluate_every=8),
        **changes,
    }
    return job_spec(**fields)


class Counting(Job):
    """A job over text."""

    def __init__(self, root, spec, **options):
        super().__init__(root, spec, **options)
        write_text(self.slice, rows=512, seed=0)
        write_text(self.held_out, rows=32, seed=1)


def digests(job):
    return [(done.model.digest, done.momentum.digest) for done in job.rounds]


def ran(directory, spec, kind=SameRows, **options):
    """The job after its last round."""
    directory.mkdir()
    with kind(directory, spec, **{"workers": 2, "sync_after": 4, **options}) as job:
        finish(job, start_server(job), start_workers(job))
        return job


# --- against what it must be ---


@pytest.mark.parametrize("codec", ["none", "int4"])
def test_one_fragment_without_overlap_and_mixing_is_diloco_to_the_last_bit(tmp_path, monkeypatch, codec):
    spec = job_spec(compression=Compression(pseudo_gradients=codec, outer_updates=codec))
    plain = ran(tmp_path / "plain", spec)
    # Own parameters are kept, put back and mixed although the base alone would do.
    monkeypatch.setattr(Streaming, "plain", property(lambda _: False))
    general = ran(tmp_path / "general", spec)
    assert list(general.workers[0].dir.glob("local-*"))
    assert not list(plain.workers[0].dir.glob("local-*"))
    assert digests(general) == digests(plain)


def slowly(spec, slice_path, rounds, batches):
    """Streaming DiLoCo by one worker on the same rows again and again: models after each round, by the book."""
    device = torch.device("cpu")
    loop = InnerLoop(models.build(spec.model), spec.inner, device)
    mine = models.parameters_of(loop.model)
    model = {name: value.detach().clone() for name, value in mine.items()}
    momentum = {name: torch.zeros_like(value) for name, value in model.items()}
    fragments, after = Fragments(model, spec.streaming), []
    for number in range(1, rounds + 1):
        rows = Rows(slice_path, spec.dataset.schema)
        for batch in range(batches):
            loop.step(rows.read(8 * batch, 8 * batch + 8), round_=number)
        for name in sorted(fragments.of(number)):
            gradient = model[name] - mine[name].detach()
            momentum[name], update = arithmetic.nesterov(momentum[name], gradient, spec.outer)
            model[name] = model[name] - update
            with torch.no_grad():
                mine[name].lerp_(model[name], spec.streaming.mixing)
        after.append(tensors.digest(model))
    return after


@pytest.mark.parametrize("mixing", [1.0, 0.5])
def test_a_worker_does_what_the_slow_obvious_loop_does(tmp_path, mixing):
    rounds = Rounds(updates=5, samples_between_updates=64, max_batch_size=8)
    spec = job_spec(streaming=streamed(mixing=mixing), rounds=rounds)
    job = ran(tmp_path / "job", spec, workers=1)
    assert [done.model.digest for done in job.rounds] == slowly(spec, job.slice, 5, 4)


def test_a_round_moves_its_fragment_and_nothing_else(tmp_path):
    spec = job_spec(streaming=streamed())
    fragments = Fragments(models.parameters_of(models.build(spec.model)), spec.streaming)

    class Watched(Job):
        models: list[dict[str, torch.Tensor]]

        def open_round(self, round_, base):
            file = tensors.Reader(self.server.dir / base.path)
            self.__dict__.setdefault("models", []).append({name: file.read(name) for name in file.names})
            super().open_round(round_, base)

        def merged(self, done):
            for part in (done.update, done.record):
                assert tensors.layout_of(self.server.dir / part.path).tensors.keys() == fragments.of(done.round)
            super().merged(done)

    job = ran(tmp_path / "job", spec, Watched)
    for number, (before, after) in enumerate(zip(job.models, job.models[1:], strict=False), 1):
        assert {name for name in before if not torch.equal(before[name], after[name])} == fragments.of(number)
    assert len(job.models) == 4
    for machine in job.workers:
        assert stood_on(machine)[1:3] == [outcome(done) for done in job.rounds[:2]]


@pytest.mark.parametrize(
    ("fragments", "codec", "mixing"), [(1, "none", 1.0), (2, "none", 1.0), (4, "int8", 1.0), (4, "int4", 0.5)]
)
def test_a_small_llama_learns_in_fragments(tmp_path, fragments, codec, mixing):
    spec = llama_spec(
        streaming=streamed(fragments, mixing=mixing),
        compression=Compression(pseudo_gradients=codec, outer_updates=codec),
        inner=InnerOptimizer(learning_rate=1e-2, weight_decay=0.0),
    )
    with Counting(tmp_path, spec, workers=2, sync_after=8) as job:
        finish(job, start_server(job), start_workers(job), evaluations={0, 8})
        assert job.evaluations[8].loss < 0.8 * job.evaluations[0].loss
        for machine in job.workers:
            assert stood_on(machine)[1:8] == [outcome(done) for done in job.rounds[:7]]


# --- when something happens ---


@pytest.mark.parametrize("options", [{}, {"mixing": 0.5}])
@pytest.mark.parametrize("codec", ["none", "topk"])
def test_a_close_that_was_lost_is_undone_with_ones_own_parameters(tmp_path, codec, options):
    spec = job_spec(streaming=streamed(**options), compression=Compression(pseudo_gradients=codec))
    lossy, calm = ran(tmp_path / "lossy", spec, Lossy), ran(tmp_path / "calm", spec)
    assert lossy.rounds[1].close > lossy.lost.close
    assert digests(lossy) == digests(calm)


def test_a_round_that_was_left_is_trained_again_from_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr("hypha.training.train.HEARTBEAT_S", 0.0)
    monkeypatch.setattr("hypha.training.train.IDLE_S", 0.01)

    class Later(Unsettled):
        """Disturbed in round 2, whose beginning is not its base any more."""

        def report(self, machine, report):
            self.disturb = self.disturb and not self.excluded
            if self.round != 2:
                disturb, self.disturb = self.disturb, False
                answer = super().report(machine, report)
                self.disturb = disturb
                return answer
            return super().report(machine, report)

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.disturb = self.root.name == "disturbed"

    rounds = Rounds(updates=3, samples_between_updates=64, max_batch_size=8)
    spec = job_spec(rounds=rounds, streaming=streamed(mixing=0.75))
    disturbed = ran(tmp_path / "disturbed", spec, Later, workers=1, sync_after=8)
    assert not disturbed.disturb
    assert digests(disturbed) == digests(ran(tmp_path / "calm", spec, Later, workers=1, sync_after=8))


class Closing(SameRows):
    """Round 1 closes without worker-1, which has trained one batch of it."""

    began = None

    def grant(self, machine, round_, wanted):
        if machine.name == "worker-1" and round_ == 1:
            if any(isinstance(report, TrainProgress) for report in machine.reports):
                assert self.changed.wait_for(lambda: self.round > 1, 30)
            return super().grant(machine, round_, 8)
        if machine.name == "worker-1" and self.began is None:
            self.began = ref(machine.dir / "local-2.safetensors", machine.dir).digest
        return super().grant(machine, round_, wanted)

    def judged(self, report):
        self.screened += 1
        if self.screened == (1 if self.round == 1 else 2):
            assert self.round > 1 or self.changed.wait_for(self.has_trained, 30)
            self.merge()

    def report(self, machine, report):
        answer = super().report(machine, report)
        self.changed.notify_all()
        return answer

    def has_trained(self):
        return any(isinstance(report, TrainProgress) for report in self.workers[1].reports)


def test_what_was_trained_and_not_contributed_is_void(tmp_path):
    job = ran(tmp_path / "job", job_spec(streaming=streamed()), Closing)
    assert outcome(job.rounds[1]) in stood_on(job.workers[1])
    assert job.began == stood_on(job.workers[1])[0][1]


def test_a_late_joiner_begins_from_the_global_model_on_all_fragments(tmp_path):
    class Growing(Job):
        def judged(self, report):
            self.screened += 1
            if self.screened == (1 if self.round == 1 else 2):
                self.merge()

    with Growing(tmp_path, job_spec(streaming=streamed()), workers=2, sync_after=2) as job:
        server, early = start_server(job), start_workers(job, job.workers[:1])
        wait(job, lambda: job.round == 2)
        late = start_workers(job, job.workers[1:])
        finish(job, server, [*early, *late])
        assert stood_on(job.workers[1])[0] == outcome(job.rounds[0])
        assert [done.round for done in job.rounds] == [1, 2, 3]


def test_files_of_rounds_that_are_committed_are_removed(tmp_path):
    rounds = Rounds(updates=6, samples_between_updates=64, max_batch_size=8)
    spec = job_spec(rounds=rounds, streaming=streamed(), compression=Compression(pseudo_gradients="topk"))
    job = ran(tmp_path / "job", spec, workers=1, sync_after=2)
    names = {path.name for path in job.workers[0].dir.glob("*-*.safetensors")}
    assert {name for name in names if name.startswith("local")} <= {f"local-{n}.safetensors" for n in (5, 6, 7)}
    # A debt waits for its fragment's next turn: the newest of both fragments, and what an undone round would owe.
    assert {name for name in names if name.startswith("lost")} <= {f"lost-{n}-0.safetensors" for n in (3, 4, 5, 6)}
    assert {"lost-5-0.safetensors", "lost-6-0.safetensors"} <= names


# --- the parameter server ---


@pytest.fixture
def server(tmp_path):
    spec = job_spec(streaming=streamed(), outer=OuterOptimizer(momentum=0.9))
    torch.manual_seed(0)
    parameters = models.parameters_of(models.build(spec.model))
    theta = tensors.save(tmp_path / "model-0-0.safetensors", parameters)
    momentum = outer.zeros(tmp_path / "momentum-0-0.safetensors", tensors.shapes_of(parameters))
    state = aggregate.State(0, theta.ref(tmp_path), momentum.ref(tmp_path))
    return aggregate.Aggregator(Reports(), spec, tmp_path, state, NoEvaluation())


def test_an_update_of_another_rounds_fragment_is_refused_by_name_and_never_decoded(server, monkeypatch):
    directory, base = server.work_dir, server.work_dir / server.state.model.path
    file = tensors.Reader(base)
    changed = {name: file.read(name) + 1 for name in file.names}
    written = [
        outer.pseudo_gradient(directory / f"spool-{n}", base, changed, fragment=server.fragments.of(n)) for n in (1, 2)
    ]
    monkeypatch.setattr(tensors.Reader, "part", lambda *_: pytest.fail("something was read"))
    server.take(Screen(ticket=1, round=1, file=written[1].ref(directory)))
    monkeypatch.undo()
    server.take(Screen(ticket=2, round=1, file=written[0].ref(directory)))
    server.take(Screen(ticket=3, round=2, file=written[0].ref(directory)))
    reason = "round 1 synchronises fragment 1 of 2: tensor 'layers.0.bias' is missing (2 in all)"
    assert server.session[:2] == [Screened(ticket=1, refusal=reason), Screened(ticket=2)]
    assert server.session[2].refusal.startswith("round 2 synchronises fragment 2 of 2: tensor 'layers.2.bias'")


@pytest.mark.parametrize("codec", CODECS)
def test_the_momentum_of_other_fragments_stays_whatever_is_owed_to_them(server, codec):
    directory, coding = server.work_dir, Coding(codec=codec)
    model, momentum = directory / server.state.model.path, directory / server.state.momentum.path
    for number in (1, 2, 3, 4):
        moved = server.fragments.of(number)
        file = tensors.Reader(model)
        ends = {name: file.read(name) - 0.1 * torch.randn(file.read(name).shape) for name in file.names}
        delta = outer.pseudo_gradient(directory / f"delta-{number}", model, ends, fragment=moved)
        stepped = outer.Step(
            {part: directory / f"{part}-{codec}-{number}" for part in outer.PARTS},
            model=model,
            momentum=momentum,
            shares=[outer.Share(delta.path, 1, "peer-1")],
            outer=server.job.outer,
            downward=coding,
            fragment=moved,
        ).take()
        before, after = tensors.Reader(momentum), tensors.Reader(stepped.momentum.path)
        if number > 1:
            same = {name for name in before.names if torch.equal(before.read(name), after.read(name))}
            assert same == set(before.names) - moved
        mine = outer.subtract(directory / f"mine-{number}", model, stepped.update.path, coding=coding, fragment=moved)
        assert mine.digest == stepped.model.digest
        model, momentum = stepped.model.path, stepped.momentum.path


def test_a_server_that_resumes_replays_each_record_on_its_fragment(tmp_path):
    kept = {}

    class Keeping(SameRows):
        def report(self, machine, report):
            for name in ("model", "momentum", "record"):
                if isinstance(report, MergeDone) or (hasattr(report, name) and report.round == 0):
                    kept[name, report.round] = (machine.dir / getattr(report, name).path).read_bytes()
            return super().report(machine, report)

    spec = job_spec(streaming=streamed(), compression=Compression(pseudo_gradients="int8", outer_updates="int4"))
    job = ran(tmp_path / "job", spec, Keeping)
    paths = {part: tmp_path / part for part in ("model", "momentum", "record")}
    for part in ("model", "momentum"):
        paths[part].write_bytes(kept[part, 0])
    fragments = Fragments(tensors.layout_of(paths["model"]).tensors, spec.streaming)
    for number in (1, 2, 3):
        paths["record"].write_bytes(kept["record", number])
        stepped = outer.replay(
            {part: tmp_path / f"{part}-{number}" for part in outer.PARTS},
            **paths,
            outer=spec.outer,
            downward=spec.compression.downward,
            fragment=fragments.of(number),
        )
        assert stepped.model.digest == job.rounds[number - 1].model.digest
        assert stepped.momentum.digest == job.rounds[number - 1].momentum.digest
        paths |= {"model": stepped.model.path, "momentum": stepped.momentum.path}


@pytest.mark.parametrize("kind", ["aggregate", "train"])
def test_more_fragments_than_layers_end_the_executor_with_the_reason(tmp_path, kind):
    with Job(tmp_path, job_spec(streaming=streamed(3)), workers=1) as job:
        one = Executor(job, job.server if kind == "aggregate" else job.workers[0], kind)
        one.start()
        one.join(60)
        assert isinstance(one.error, ConfigError)
        assert str(one.error) == "streaming.fragments 3 exceeds the 2 layers of this model"
    assert executor.load_job(job.server.dir / "job.json" if kind == "aggregate" else one.machine.dir / "job.json")


def test_mixing_goes_part_of_the_way_and_only_in_the_fragment(tmp_path):
    base = tensors.save(tmp_path / "base", {"a": torch.ones(3), "b": torch.ones(2)}).path
    mine = {"a": torch.zeros(3), "b": torch.zeros(2)}
    local.mix(mine, [base], fragment={"a"}, weight=0.25)
    assert torch.equal(mine["a"], torch.full((3,), 0.25))
    assert torch.equal(mine["b"], torch.zeros(2))
    local.mix(mine, [base], fragment={"b"}, weight=1.0)
    assert torch.equal(mine["b"], torch.ones(2))
