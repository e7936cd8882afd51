"""Whole jobs over real bridges: calm ones, and the ones in which something happens between rounds."""

import shutil
from typing import ClassVar

import numpy as np
from safetensors.numpy import load_file, save_file

from hypha.protocol.bridge import BaseReady, NoSamples, ResumeFetched, SendUpdate, TrainProgress
from hypha.protocol.job import ResumePoint, Rounds
from hypha.training import tensors, train
from tests.training.running import finish, start_server, start_workers, wait
from tests.training.tiny_network import Job, job_spec, ref


def stood_on(machine):
    return [(report.round, report.digest) for report in machine.reports if isinstance(report, BaseReady)]


def outcome(done):
    return (done.round + 1, done.model.digest)


def test_two_workers_and_a_parameter_server_learn_and_agree_to_the_last_bit(tmp_path):
    with Job(tmp_path, workers=2, sync_after=4) as job:
        server, workers = start_server(job), start_workers(job)
        finish(job, server, workers, evaluations={0, 3})
        assert [done.round for done in job.rounds] == [1, 2, 3]
        assert job.evaluations[3].loss < 0.7 * job.evaluations[0].loss
        for machine in job.workers:
            assert stood_on(machine)[1:3] == [outcome(done) for done in job.rounds[:2]]


def test_the_same_job_gives_the_same_bits_again(tmp_path):
    digests = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        with Job(tmp_path / str(number), workers=1, sync_after=4) as job:
            server, workers = start_server(job), start_workers(job)
            finish(job, server, workers)
            digests.append([done.model.digest for done in job.rounds])
    assert digests[0] == digests[1]
    assert len(digests[0]) == 3


def test_contributions_name_exactly_the_samples_trained_on(tmp_path):
    class Recorded(Job):
        sent: ClassVar[list[SendUpdate]] = []

        def send(self, machine, update):
            self.sent.append(update)
            return super().send(machine, update)

    with Recorded(tmp_path, workers=1, sync_after=3) as job:
        finish(job, start_server(job), start_workers(job))
        assert [update.samples for update in job.sent] == [24, 24, 24]
        assert all(sum(one.samples for one in update.intervals) == 24 for update in job.sent)
        rows = [row for update in job.sent for one in update.intervals for row in range(one.start, one.stop)]
        assert len(rows) == len(set(rows))
        assert all(np.isfinite(update.loss) and update.loss > 0 for update in job.sent)


def test_progress_counts_from_the_rounds_start(tmp_path):
    with Job(tmp_path, workers=1, sync_after=2) as job:
        finish(job, start_server(job), start_workers(job))
        said = [report for report in job.workers[0].reports if isinstance(report, TrainProgress)]
        assert [(one.round, one.batches, one.samples) for one in said] == [
            (round_, batches, 8 * batches) for round_ in (1, 2, 3) for batches in (1, 2)
        ]
        assert all(one.batch_s > 0 for one in said)


def test_without_instruction_a_worker_contributes_once_the_round_has_all_its_samples(tmp_path):
    with Job(tmp_path, workers=1) as job:
        finish(job, start_server(job), start_workers(job))
        last = [report for report in job.workers[0].reports if isinstance(report, TrainProgress)][-1]
        assert (last.round, last.samples) == (3, 64)


def test_a_worker_without_samples_contributes_nothing_and_keeps_up(tmp_path):
    class Starving(Job):
        def grant(self, machine, round_, wanted):
            return NoSamples(round=round_) if machine.name == "worker-1" else super().grant(machine, round_, wanted)

        def merge(self):
            self.empty = tensors.Reader(self.server.dir / self.held["worker-1"][1].path)
            super().merge()

    with Starving(tmp_path, workers=2, sync_after=2) as job:
        finish(job, start_server(job), start_workers(job))
        assert all(not job.empty.read(name).any() for name in job.empty.names) or not job.empty.path.exists()
        assert stood_on(job.workers[1])[1:3] == [outcome(done) for done in job.rounds[:2]]


class SameRows(Job):
    """Every grant is of the same rows, so that what a round gives does not depend on what was asked for before."""

    def grant(self, machine, round_, wanted):
        self.next_row = 0
        return super().grant(machine, round_, wanted)


class Lossy(SameRows):
    """The outcome of round 2's first close is trained on by everyone, and is lost before it is committed."""

    lost = None
    opened_again = False

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.sent = []

    def send(self, machine, update):
        if update.round == 2:
            self.sent.append((machine.name, update))
        elif update.round == 3:  # a fast worker waits: told to rebase now, it would send before the round is open again
            assert self.changed.wait_for(lambda: self.opened_again, 30)
        return super().send(machine, update)

    def merged(self, done):
        if done.round != 2 or self.lost is not None:
            return super().merged(done)
        self.deliver(done)
        self.lost = done
        return None

    def report(self, machine, report):
        answer = super().report(machine, report)
        if self.lost and not self.opened_again:
            self.opened_again = all(self.went_on(one) for one in self.workers)
            if self.opened_again:
                self.open_round(2, self.base)  # a new view with the old base; the held updates are forgotten
        return answer

    def went_on(self, machine):
        return any(isinstance(report, TrainProgress) and report.round == 3 for report in machine.reports)

    def grant(self, machine, round_, wanted):
        if round_ == 3 and self.round == 2:
            self.round = 3  # as if a view of round 3 had been out
            granted = super().grant(machine, round_, wanted)
            self.round = 2
            return granted
        return super().grant(machine, round_, wanted)


def test_a_close_that_was_lost_is_undone_and_the_update_sent_again(tmp_path):
    (tmp_path / "lossy").mkdir()
    (tmp_path / "calm").mkdir()
    with Lossy(tmp_path / "lossy", workers=2, sync_after=4) as job:
        finish(job, start_server(job), start_workers(job))
        assert [done.round for done in job.rounds] == [1, 2, 3]
        assert job.rounds[1].model.digest == job.lost.model.digest
        assert job.rounds[1].close > job.lost.close
        for name in ("worker-0", "worker-1"):
            first, again = [update for sender, update in job.sent if sender == name]
            assert (first.files, first.intervals) == (again.files, again.intervals)
    # Round 3 begins with the inner state that round 2 left, although round 3 had been begun before.
    with SameRows(tmp_path / "calm", workers=2, sync_after=4) as calm:
        finish(calm, start_server(calm), start_workers(calm))
        assert [done.model.digest for done in calm.rounds] == [done.model.digest for done in job.rounds]


def test_an_update_that_is_damaged_is_replaced_by_the_whole_model(tmp_path):
    class Damaging(Job):
        def deliver(self, done):
            if done.round == 1:
                path = self.server.dir / done.update.path
                values = load_file(path)
                save_file({name: value + 1 for name, value in values.items()}, path)
            super().deliver(done)

    with Damaging(tmp_path, workers=1, sync_after=2) as job:
        finish(job, start_server(job), start_workers(job))
        assert outcome(job.rounds[0]) in stood_on(job.workers[0])
        assert [done.round for done in job.rounds] == [1, 2, 3]


def test_a_round_closed_without_a_worker_is_followed_by_it(tmp_path):
    class Hasty(Job):
        """Round 1 closes when worker-0 has contributed; worker-1 never hears that it should."""

        def report(self, machine, report):
            if machine.name == "worker-1" and isinstance(report, TrainProgress) and report.round == 1:
                return None
            return super().report(machine, report)

        def grant(self, machine, round_, wanted):
            return super().grant(machine, round_, min(wanted, 8) if machine.name == "worker-1" else wanted)

        def judged(self, report):
            self.screened += 1
            if self.screened == (1 if self.round == 1 else 2):
                self.merge()

        def send(self, machine, update):
            if machine.name == "worker-1" and update.round == 1:
                wait_done = self.changed.wait_for(lambda: self.round > 1, 30)
                assert wait_done
            return super().send(machine, update)

    with Hasty(tmp_path, workers=2, sync_after=2) as job:
        finish(job, start_server(job), start_workers(job))
        assert [done.round for done in job.rounds] == [1, 2, 3]
        assert outcome(job.rounds[1]) in stood_on(job.workers[1])


def test_a_late_joiner_stands_on_the_newest_base_and_contributes(tmp_path):
    class Growing(Job):
        def judged(self, report):
            self.screened += 1
            if self.screened == (1 if self.round == 1 else 2):
                self.merge()

    with Growing(tmp_path, workers=2, sync_after=2) as job:
        server, early = start_server(job), start_workers(job, job.workers[:1])
        wait(job, lambda: job.round == 2)
        late = start_workers(job, job.workers[1:])
        finish(job, server, [*early, *late])
        assert stood_on(job.workers[1])[0] == outcome(job.rounds[0])
        assert [done.round for done in job.rounds] == [1, 2, 3]


def test_a_follower_follows_says_that_it_is_there_and_then_contributes(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(train, "IDLE_S", 0.01)

    class Following(Job):
        """worker-1 is no member of round 1, which closes once it was heard of again."""

        def members(self):
            return self.workers[:1] if self.round == 1 else self.workers

        def judged(self, report):
            self.screened += 1
            if self.round == 1:
                assert self.changed.wait_for(lambda: len(stood_on(self.workers[1])) > 1, 30)
            if self.screened == len(self.members()):
                self.merge()

    with Following(tmp_path, workers=2, sync_after=2) as job:
        finish(job, start_server(job), start_workers(job))
        trained = [one.round for one in job.workers[1].reports if isinstance(one, TrainProgress)]
        assert trained == [2, 2, 3, 3]
        assert outcome(job.rounds[0]) in stood_on(job.workers[1])


class Unsettled(SameRows):
    """Where `disturb`, the worker is no member for a while in the middle of a round."""

    disturb = False
    excluded = False

    def members(self):
        return [] if self.excluded else self.workers

    def report(self, machine, report):
        if self.disturb and isinstance(report, TrainProgress) and report.batches == 5:
            self.disturb, self.excluded = False, True
            self.show_view()
        elif self.excluded and isinstance(report, BaseReady):
            self.excluded = False
            self.show_view()
        return super().report(machine, report)


def test_a_round_that_was_left_is_trained_again_from_its_base(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(train, "IDLE_S", 0.01)
    rounds = Rounds(updates=1, samples_between_updates=512, max_batch_size=8)
    digests = []
    for disturb in (False, True):
        (tmp_path / str(disturb)).mkdir()
        with Unsettled(tmp_path / str(disturb), job_spec(rounds=rounds), workers=1) as job:
            job.disturb = disturb
            finish(job, start_server(job), start_workers(job))
            digests.append(job.rounds[0].model.digest)
            begun = [one.batches for one in job.workers[0].reports if isinstance(one, TrainProgress)].count(1)
            assert begun == (2 if disturb else 1)
    assert digests[0] == digests[1]


def test_a_server_that_resumes_replays_records_to_the_same_bits(tmp_path):
    class Keeping(Job):
        """Everything a store would have kept."""

        def report(self, machine, report):
            for name in ("model", "momentum", "record"):
                if hasattr(report, name):
                    shutil.copyfile(machine.dir / getattr(report, name).path, self.root / f"{name}-{report.round}")
            return super().report(machine, report)

    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with Keeping(tmp_path / "first", workers=1, sync_after=4) as first:
        finish(first, start_server(first), start_workers(first))
    zeros = "0" * 64
    point = ResumePoint(round=0, model_digest=zeros, momentum_digest=zeros)
    rounds = Rounds(updates=3, samples_between_updates=64, max_batch_size=8)
    with Job(tmp_path / "second", job_spec(resume=point, rounds=rounds), workers=1) as second:

        def bring(name):
            shutil.copyfile(first.root / name, second.server.dir / name)
            return ref(second.server.dir / name, second.server.dir)

        second.resume = ResumeFetched(
            round=0,
            model=bring("model-0"),
            momentum=bring("momentum-0"),
            records=(bring("record-1"), bring("record-2")),
        )
        server = start_server(second)
        assert second.round == 3
        assert second.base.digest == first.rounds[1].model.digest
        finish(second, server, [])


def test_files_of_committed_rounds_are_removed(tmp_path):
    with Job(tmp_path, workers=2, sync_after=2) as job:
        finish(job, start_server(job), start_workers(job), evaluations={3})
        at_server = {path.name for path in job.server.dir.glob("*-*.safetensors")}
        assert {name for name in at_server if "-3-" not in name} == set()
        at_worker = {path.name for path in job.workers[0].dir.glob("*.safetensors")}
        gone = ("update-1", "inner-1", "base-1", "arrived-1", "arrived-2")
        assert {name for name in at_worker if name.startswith(gone)} == set()


def test_the_next_update_says_as_well_that_a_round_was_committed(tmp_path):
    with Job(tmp_path, workers=1, sync_after=2) as job:
        job.tells_commits = False
        finish(job, start_server(job), start_workers(job))
        assert list(job.workers[0].dir.glob("update-1.safetensors")) == []
        assert list(job.workers[0].dir.glob("inner-1.safetensors")) == []
