"""A job's chain is replayed to the bit, and every way of not being what it must be is told in words."""

import pytest
import torch
from msgspec.structs import replace

from hypha.dataset import open_dataset
from hypha.protocol.job import ModelSpec
from hypha.protocol.messages import Contribution, Interval, Merged
from hypha.scheduler.settings import Settings
from hypha.scheduler.store import open_store
from hypha.store.disk import RealDisk
from hypha.store.objects import open_objects
from hypha.training.outer import PARTS, Share, Step, zeros
from hypha.training.tensors import save
from tests.chaos import dataset
from tests.chaos.record import OUTER, Archive, judge
from tests.chaos.story import Finished, Resumed, Story

ROUNDS, SAMPLES = 4, 100
SHAPES = {"a": (5, 3), "b": (7,)}


def random(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def contribution_of(round_made, base, delta):
    start = SAMPLES * (round_made - 1)
    return Contribution(
        peer_id="worker",
        fence=1,
        lease_id="lease",
        round=round_made,
        base_digest=base,
        digest=delta.digest,
        bytes=delta.bytes,
        samples=SAMPLES,
        intervals=(Interval(epoch=0, slice=0, start=start, stop=start + SAMPLES),),
    )


def merged_of(round_made, base, stepped):
    written = {part: getattr(stepped, part) for part in PARTS}
    digests = {f"{part}_digest": file.digest for part, file in written.items()}
    sizes = {f"{part}_bytes": file.bytes for part, file in written.items()}
    return Merged(round=round_made, close=round_made, base_digest=base, **digests, **sizes)


class Job:
    """A job of ROUNDS rounds on disk, led by two schedulers one after the other."""

    def __init__(self, place):
        self.dataset, self.state, self.kept = place / "dataset", place / "state", place / "kept"
        self.story = Story()
        dataset.write(self.dataset, 0)
        self.archive = Archive(self.state, self.kept)
        self.work = place / "work"
        self.work.mkdir()
        with self._store() as store:
            store.load()
            self.train(store)
            end = store.state
        self.story.finished = Finished(1.0, end.samples, end.round, end.model_digest, "", 1.0)

    def _store(self):
        return open_store(
            RealDisk(self.state),
            open_objects(str(self.state)),
            job_id="job-1",
            settings=Settings(name="job", manifest_digest="d" * 64, model=ModelSpec(type="torch", config={})),
            slices=open_dataset(self.dataset).manifest.train,
        )

    def train(self, store):
        self.begin(store)
        model = save(self.work / "model-0", random(0))
        momentum = zeros(self.work / "momentum-0", SHAPES)
        store.put("model", 0, model.digest, model.path)
        store.put("momentum", 0, momentum.digest, momentum.path)
        for number in range(1, ROUNDS + 1):
            delta = save(self.work / f"delta-{number}", random(number))
            outs = {part: self.work / f"{part}-{number}" for part in PARTS}
            share = Share(delta.path, SAMPLES, "worker")
            stepped = Step(outs, model=model.path, momentum=momentum.path, shares=[share], outer=OUTER).take()
            store.put("record", number, stepped.record.digest, stepped.record.path)
            entry = store.round_entry(
                (merged_of(number, model.digest, stepped),),
                (contribution_of(number, model.digest, delta),),
                job_epoch=store.state.job_epoch,
                nonce=f"n{number}",
            )
            store.commit(entry)
            model, momentum = stepped.model, stepped.momentum
            if number == 2:
                self.begin(store)
        self.archive.keep()

    def begin(self, store):
        at = store.state
        epoch = store.begin_epoch(scheduler="s", nonce=f"begin-{at.round}")
        self.story.starts.append(Resumed(at.round, at.samples, at.model_digest or "", epoch))

    def judge(self):
        return judge(self.state, self.kept, self.dataset, self.story)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # a link: the store's own stays sound
    path.write_bytes(data)


def test_a_sound_chain_replays_to_its_last_model(job):
    verdict = job.judge()
    assert (verdict.faults, verdict.resume_faults) == ((), ())
    assert (verdict.rounds, verdict.samples) == (ROUNDS, ROUNDS * SAMPLES)


def test_one_bit_of_a_record_is_noticed(job):
    (record,) = job.kept.glob("record-00000003-*")
    damage(record)
    assert job.judge().faults == ("round 3 replayed is not what was committed",)


def test_a_start_with_other_rounds_or_another_model_is_noticed(job):
    sound = job.story.starts[1]
    job.story.starts[1] = replace(sound, round=1)
    assert len(job.judge().resume_faults) == 1
    job.story.starts[1] = replace(sound, model_digest="0" * 64)
    assert job.judge().resume_faults == ("job epoch 2 began with another model than round 2 left",)
    job.story.starts[1] = replace(sound, job_epoch=3)
    assert job.judge().resume_faults == ("job epoch 3 is not in the chain",)


def test_a_missing_entry_is_noticed(job):
    (job.state / "chain" / "00000002").unlink()
    assert job.judge().faults[0].startswith("chain: ")


def test_another_final_model_is_noticed(job):
    job.story.finished = replace(job.story.finished, model_digest="0" * 64)
    assert job.judge().faults == ("the final model is not the one of the last commit",)
