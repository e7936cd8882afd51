"""A whole job over real bridges: two training executors and a parameter server learn, and agree to the last bit."""

import threading

from hypha.protocol.bridge import BaseReady
from hypha.training import aggregate, tensors, train
from hypha.training.session import Session
from tests.training.tiny_network import Job

JOIN_S = 60


class Executor(threading.Thread):
    """One executor's `work` in a thread, behind its own session."""

    def __init__(self, job, machine, kind):
        super().__init__(name=machine.name, daemon=True)
        self.job, self.machine, self.kind = job, machine, kind
        self.error = None

    def run(self):
        spec = train.executor.load_job(self.job.write_job(self.machine, self.kind.__name__.rsplit(".", 1)[-1]))
        try:
            with Session(self.machine.socket) as session:
                self.kind.work(session, spec, self.machine.dir)
        except Exception as error:
            self.error = error
            raise


def start_all(job):
    """The parameter server first: its initial weights come from the process-wide generator."""
    server = Executor(job, job.server, aggregate)
    server.start()
    with job.lock:
        assert job.changed.wait_for(lambda: job.base is not None, JOIN_S)
    workers = [Executor(job, machine, train) for machine in job.workers]
    for worker in workers:
        worker.start()
    return server, workers


def finish(job, server, workers, evaluations):
    for worker in workers:
        worker.join(JOIN_S)
        assert not worker.is_alive()
    job.stop_server_after(evaluations)
    server.join(JOIN_S)
    assert not server.is_alive()
    assert [one.error for one in [server, *workers]] == [None] * (1 + len(workers))
    assert job.failures == []


def test_two_workers_and_a_parameter_server_learn_and_agree_to_the_last_bit(tmp_path):
    with Job(tmp_path, workers=2, sync_after=4) as job:
        server, workers = start_all(job)
        finish(job, server, workers, {0, 3})
        assert [done.round for done in job.rounds] == [1, 2, 3]
        assert job.evaluations[3].loss < 0.7 * job.evaluations[0].loss
        model = tensors.Reader(job.server.dir / job.rounds[-1].model.path)
        for machine in job.workers:
            stood = [(report.round, report.digest) for report in machine.reports if isinstance(report, BaseReady)]
            assert stood[1:3] == [(done.round + 1, done.model.digest) for done in job.rounds[:2]]
        assert model.names == ["layers.0.bias", "layers.0.weight", "layers.2.bias", "layers.2.weight"]
