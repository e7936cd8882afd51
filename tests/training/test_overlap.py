"""Inner steps beside the transfer: when an update is applied, how far a worker runs ahead, and what undoes it."""

import pytest
import torch

from hypha.protocol.bridge import BaseReady, FetchSamples, NoSamples, SendRebase, SendRefused, TrainProgress
from hypha.protocol.compression import Compression
from hypha.protocol.fragments import Fragments
from hypha.protocol.job import InnerOptimizer, Rounds
from hypha.training import arithmetic, batches, models, tensors
from hypha.training.batches import Rows
from hypha.training.inner import InnerLoop
from tests.training.running import finish, start_server, start_workers
from tests.training.test_fragments import Counting, digests, llama_spec, ran, streamed
from tests.training.test_job import SameRows, outcome, stood_on
from tests.training.tiny_network import Job, job_spec

BATCHES = 4


class Ahead(SameRows):
    """Grants samples of the next round, has those of later ones wait, and takes its updates once it is open."""

    def grant(self, machine, round_, wanted):
        assert self.changed.wait_for(lambda: round_ <= self.round + 1, 30)
        if round_ != self.round + 1:
            return super().grant(machine, round_, wanted)
        self.round, opened = round_, self.round
        try:
            return super().grant(machine, round_, wanted)
        finally:
            self.round = opened

    def send(self, machine, update):
        if update.round == self.round + 1:
            assert self.changed.wait_for(lambda: self.round >= update.round, 30)
        return super().send(machine, update)

    def report(self, machine, report):
        answer = super().report(machine, report)
        self.changed.notify_all()
        return answer

    def has_done(self, count):
        """Whether every worker has done so many batches of the round after the open one."""
        return all(self.done(machine) >= count for machine in self.workers)

    def done(self, machine):
        said = [one for one in machine.reports if isinstance(one, TrainProgress) and one.round == self.round + 1]
        return max((one.batches for one in said), default=0)


class Slow(Ahead):
    """A round is merged only when all have run ahead as far as they may."""

    def judged(self, report):
        assert report.refusal is None
        self.screened += 1
        if self.screened == len(self.workers):
            if self.round < self.spec.rounds.updates:
                assert self.changed.wait_for(lambda: self.has_done(BATCHES), 30)
            self.merge()


def batches_before(machine, round_):
    """How many batches of a round were done before the worker stood on its base."""
    stood = next(n for n, one in enumerate(machine.reports) if isinstance(one, BaseReady) and one.round == round_)
    return sum(isinstance(one, TrainProgress) and one.round == round_ for one in machine.reports[:stood])


def slowly(spec, slice_path, rounds):
    """By the book, with updates that come at the next synchronisation: models after each round, by one worker."""
    loop = InnerLoop(models.build(spec.model), spec.inner, torch.device("cpu"))
    mine = models.parameters_of(loop.model)
    model = {name: value.detach().clone() for name, value in mine.items()}
    momentum = {name: torch.zeros_like(value) for name, value in model.items()}
    fragments, after, moved = Fragments(model, spec.streaming), [], frozenset()
    for number in range(1, rounds + 1):
        rows = Rows(slice_path, spec.dataset.schema)
        for batch in range(BATCHES):
            loop.step(rows.read(8 * batch, 8 * batch + 8), round_=number)
        with torch.no_grad():
            for name in moved:
                mine[name].lerp_(model[name], spec.streaming.mixing)
        moved = fragments.of(number)
        for name in sorted(moved):
            momentum[name], update = arithmetic.nesterov(momentum[name], model[name] - mine[name].detach(), spec.outer)
            model[name] = model[name] - update
        after.append(tensors.digest(model))
    return after


@pytest.mark.parametrize(("fragments", "mixing"), [(2, 1.0), (2, 0.5), (1, 0.5)])
def test_an_update_at_the_next_synchronisation_does_what_the_slow_loop_does(tmp_path, monkeypatch, fragments, mixing):
    monkeypatch.setattr(batches, "POLL_S", 30.0)  # nobody is taken to starve
    rounds = Rounds(updates=5, samples_between_updates=64, max_batch_size=8)
    streaming = streamed(fragments, overlap_steps=BATCHES, mixing=mixing)
    spec = job_spec(streaming=streaming, rounds=rounds)
    job = ran(tmp_path / "job", spec, Ahead, workers=1)
    assert [done.model.digest for done in job.rounds] == slowly(spec, job.slice, 5)
    assert [batches_before(job.workers[0], round_) for round_ in (2, 3, 4, 5)] == [BATCHES] * 4


def test_an_update_that_is_here_waits_for_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "POLL_S", 30.0)
    rounds = Rounds(updates=4, samples_between_updates=64, max_batch_size=8)
    job = ran(tmp_path / "job", job_spec(streaming=streamed(overlap_steps=2), rounds=rounds), Ahead)
    for machine in job.workers:
        assert all(batches_before(machine, round_) >= 2 for round_ in (2, 3, 4))
        assert stood_on(machine)[1:4] == [outcome(done) for done in job.rounds[:3]]


def test_without_its_update_a_worker_runs_on_to_the_next_synchronisation_and_waits_there(tmp_path):
    job = ran(tmp_path / "job", job_spec(streaming=streamed(overlap_steps=1)), Slow)
    for machine in job.workers:
        assert [batches_before(machine, round_) for round_ in (2, 3)] == [BATCHES, BATCHES]
    assert [done.round for done in job.rounds] == [1, 2, 3]


class Early(Ahead):
    """A round's first report is answered once the next round's first samples were asked for."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.asked = []

    def fetch(self, machine, message):
        if isinstance(message, FetchSamples):
            self.asked.append((message.round, message.request))
            self.changed.notify_all()
        return super().fetch(machine, message)

    def report(self, machine, report):
        if isinstance(report, TrainProgress) and report.batches == 1 and report.round < self.spec.rounds.updates:
            assert self.changed.wait_for(lambda: (report.round + 1, 0) in self.asked, 30)
        return super().report(machine, report)


def test_the_first_samples_of_a_round_are_asked_for_in_the_round_before_and_once(tmp_path):
    job = ran(tmp_path / "job", job_spec(streaming=streamed(overlap_steps=2)), Early, workers=1)
    assert {round_ for round_, _ in job.asked} == {1, 2, 3}, "and none beyond the last"
    assert sorted(set(job.asked)) == sorted(job.asked)
    assert [done.round for done in job.rounds] == [1, 2, 3]


def test_nobody_runs_ahead_of_the_last_round(tmp_path):
    job = ran(tmp_path / "job", job_spec(streaming=streamed(overlap_steps=2)), Ahead)
    assert {one.round for one in job.workers[0].reports if isinstance(one, TrainProgress)} == {1, 2, 3}


@pytest.mark.parametrize(("fragments", "codec", "mixing"), [(4, "int4", 0.5), (2, "none", 1.0)])
def test_a_small_llama_learns_with_overlap(tmp_path, fragments, codec, mixing):
    class CountingAhead(Counting, Ahead):
        def grant(self, machine, round_, wanted):
            row = self.next_row
            granted = Ahead.grant(self, machine, round_, wanted)
            self.next_row = (row + wanted) % 448
            return granted

    spec = llama_spec(
        streaming=streamed(fragments, overlap_steps=3, mixing=mixing),
        compression=Compression(pseudo_gradients=codec, outer_updates=codec),
        inner=InnerOptimizer(learning_rate=1e-2, weight_decay=0.0),
    )
    with CountingAhead(tmp_path, spec, workers=2, sync_after=8) as job:
        finish(job, start_server(job), start_workers(job), evaluations={0, 8})
        assert job.evaluations[8].loss < 0.85 * job.evaluations[0].loss
        for machine in job.workers:
            assert stood_on(machine)[1:8] == [outcome(done) for done in job.rounds[:7]]


# --- what undoes it ---


class LostAhead(Ahead):
    """Round 2's first outcome is joined by everyone, and is lost."""

    lost = None
    opened_again = False

    def merged(self, done):
        if done.round != 2 or self.lost is not None:
            return super().merged(done)
        self.deliver(done)
        self.lost = done
        return None

    def send(self, machine, update):
        if self.lost and not self.opened_again and update.round == 3:
            assert self.changed.wait_for(lambda: self.opened_again, 30)
            return SendRebase(round=self.round, base_digest=self.base.digest)
        return super().send(machine, update)

    def report(self, machine, report):
        answer = super().report(machine, report)
        if self.lost and not self.opened_again and all(3 in dict(stood_on(one)) for one in self.workers):
            self.opened_again = True
            self.open_round(2, self.base)
        return answer


@pytest.mark.parametrize("options", [{"mixing": 1.0}, {"mixing": 0.5}])
def test_a_round_that_is_lost_after_it_was_joined_is_sent_again_and_the_next_begun_anew(tmp_path, options):
    spec = job_spec(streaming=streamed(overlap_steps=BATCHES, **options))
    lost, calm = ran(tmp_path / "lost", spec, LostAhead), ran(tmp_path / "calm", spec, Ahead)
    assert lost.rounds[1].close > lost.lost.close
    assert lost.rounds[1].model.digest == lost.lost.model.digest
    assert digests(lost)[:2] == digests(calm)[:2]
    assert [done.round for done in lost.rounds] == [1, 2, 3]


def test_without_samples_ahead_an_update_is_applied_at_once(tmp_path):
    class Starving(Ahead):
        """No more is granted ahead of a base than the first batches; only then is the round before merged."""

        starved = 0

        def grant(self, machine, round_, wanted):
            if round_ > self.round and self.done(machine):
                self.starved = round_
                self.changed.notify_all()
                assert self.changed.wait_for(lambda: round_ in dict(stood_on(machine)), 30)
            return super().grant(machine, round_, 8)

        def judged(self, report):
            last = self.round == self.spec.rounds.updates
            assert last or self.changed.wait_for(lambda: self.starved > self.round, 30)
            super().judged(report)

    job = ran(tmp_path / "job", job_spec(streaming=streamed(overlap_steps=BATCHES)), Starving, workers=1)
    assert all(1 <= batches_before(job.workers[0], round_) < BATCHES for round_ in (2, 3))
    assert [done.round for done in job.rounds] == [1, 2, 3]


def test_who_is_granted_nothing_ahead_waits_and_contributes_nothing(tmp_path):
    class Refusing(Ahead):
        refused = False

        def grant(self, machine, round_, wanted):
            if round_ <= self.round:
                return super().grant(machine, round_, wanted)
            self.refused = True
            self.changed.notify_all()
            return NoSamples(round=round_)

        def judged(self, report):
            assert self.changed.wait_for(lambda: self.refused, 30)
            super().judged(report)

        def send(self, machine, update):
            self.__dict__.setdefault("samples", []).append(update.samples)
            return super().send(machine, update)

    with Refusing(tmp_path, job_spec(streaming=streamed(overlap_steps=1)), workers=1, sync_after=BATCHES) as job:
        start_server(job)
        start_workers(job)
        with job.lock:
            assert job.changed.wait_for(lambda: len(job.__dict__.get("samples", [])) > 1, 30)
        assert job.samples[:2] == [8 * BATCHES, 0]


class Straggling(Ahead):
    """Round 1 closes without worker-1, whose update comes late."""

    began = None

    def send(self, machine, update):
        if machine.name == "worker-1" and update.round == 1:
            assert self.changed.wait_for(lambda: self.round > 1, 30)
        return super().send(machine, update)

    def judged(self, report):
        self.screened += 1
        if self.screened == (1 if self.round == 1 else 2):
            if self.round == 1:
                assert self.changed.wait_for(lambda: self.done(self.workers[1]) >= 2, 30)
            self.merge()


def test_what_was_not_in_time_is_void_with_all_that_was_trained_on_it(tmp_path):
    job = ran(tmp_path / "job", job_spec(streaming=streamed(overlap_steps=1)), Straggling)
    said = [one for one in job.workers[1].reports if isinstance(one, TrainProgress) and one.round == 2]
    assert [one.batches for one in said].count(1) == 2  # round 2 was begun ahead, and again from round 1's beginning
    assert outcome(job.rounds[0]) in stood_on(job.workers[1])
    assert [done.round for done in job.rounds] == [1, 2, 3]


def test_an_update_that_is_refused_ends_the_run_ahead_and_is_made_anew(tmp_path):
    class Picky(Ahead):
        refused = 0

        def send(self, machine, update):
            if update.round == 2 and not self.refused:
                assert self.changed.wait_for(lambda: self.done(machine) >= 1, 30)
                self.refused += 1
                return SendRefused(reason="not like this")
            return super().send(machine, update)

    job = ran(tmp_path / "job", job_spec(streaming=streamed(overlap_steps=BATCHES)), Picky, workers=1)
    calm = ran(tmp_path / "calm", job_spec(streaming=streamed(overlap_steps=BATCHES)), Ahead, workers=1)
    assert job.refused == 1
    assert digests(job) != []
    assert [done.round for done in job.rounds] == [done.round for done in calm.rounds]


def test_a_damaged_update_is_replaced_by_the_whole_model(tmp_path):
    class Damaging(Ahead):
        def deliver(self, done):
            if done.round == 1:
                path = self.server.dir / done.update.path
                path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
            Job.deliver(self, done)

    job = ran(tmp_path / "job", job_spec(streaming=streamed(overlap_steps=1)), Damaging, workers=1)
    assert outcome(job.rounds[0]) in stood_on(job.workers[0])
    assert [done.round for done in job.rounds] == [1, 2, 3]
