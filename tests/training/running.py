"""Executors as threads: the parameter server first, then the workers, then everything in its order to the end."""

import threading

from hypha.errors import HyphaError
from hypha.training import aggregate, executor, train
from hypha.training.session import Session

JOIN_S = 60
WORK = {"aggregate": aggregate.work, "train": train.work}


class Executor(threading.Thread):
    """One executor's `work`, behind a session of its own; `error` is what it ended with."""

    def __init__(self, job, machine, kind):
        super().__init__(name=machine.name, daemon=True)
        self.job, self.machine, self.kind = job, machine, kind
        self.error = None

    def run(self):
        spec = executor.load_job(self.job.write_job(self.machine, self.kind))
        try:
            with Session(self.machine.socket) as session:
                WORK[self.kind](session, spec, self.machine.dir)
        except HyphaError as error:
            self.error = error


def start_server(job):
    """Its initial weights come from the process-wide generator: nobody else builds a model meanwhile."""
    server = Executor(job, job.server, "aggregate")
    server.start()
    wait(job, lambda: job.base is not None)
    return server


def start_workers(job, machines=None):
    workers = [Executor(job, machine, "train") for machine in machines or job.workers]
    for worker in workers:
        worker.start()
    return workers


def wait(job, condition):
    """Wait until something that is noted under the job's lock has happened."""
    with job.lock:
        assert job.changed.wait_for(lambda: condition() or job.failures, JOIN_S), "it never happened"
        assert job.failures == []


def finish(job, server, workers, *, evaluations=frozenset()):
    """Let the workers end at the final view, stop the server once these models are evaluated."""
    for worker in workers:
        worker.join(JOIN_S)
        assert not worker.is_alive()
    wait(job, lambda: evaluations <= job.evaluations.keys())
    job.stop_server()
    server.join(JOIN_S)
    assert not server.is_alive()
    assert [one.error for one in [server, *workers]] == [None] * (1 + len(workers))
