"""kill -9 of the leading scheduler: the standby, with a certificate and a state directory of its own, ends the job.

A worker that gets SIGTERM meanwhile leaves politely, and is replaced without its lease running out.
"""

import json
import signal

import pytest

from hypha.protocol.manifest import JobEpochStarted, from_bytes
from hypha.store.chain import Chain
from hypha.store.objects import open_objects
from tests.e2e.programs import stage
from tests.e2e.test_recovery import JOB, ROUNDS, TRAINS, WORKER, Town, committed, rounds_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SHARED = JOB.replace('state_dir = "state"', 'state_dir = "{name}-state"\ncheckpoint_url = "shared"').replace(
    "[scheduler]\n", "[scheduler]\nhold_s = 4.0\n"
)


def test_a_standby_ends_the_job_of_a_killed_scheduler(tmp_path, pki):
    with stage(tmp_path) as opened:
        town = Town(opened, pki)
        town.begin()
        for name in ("leader", "standby"):
            town.node(name, "scheduler", SHARED.replace("{name}", name))
        town.node("spare", "worker", f'work_dir = "spare"\n{WORKER}{TRAINS}')

        leader = opened.start("leader", ["hypha-scheduler", "run", "-c", "leader.toml"])
        leader.wait_for('"message": "Round opened"')
        standby = opened.start("standby", ["hypha-scheduler", "run", "-c", "standby.toml", "--standby"])
        standby.wait_for('"message": "Standing by"')
        town.start("spare", "worker").wait_for("Worker ready")
        leader.wait_for(committed(2))
        assert opened.programs["train-1"].stop(signal.SIGTERM) == 0
        left = json.loads(leader.wait_for('"message": "Worker left"'))
        assert left["work"] == "train"
        opened.programs["spare"].wait_for('"message": "Job started"')
        leader.wait_for(committed(3))
        leader.kill()

        started = json.loads(standby.wait_for('"message": "Job started"'))
        assert started["job_epoch"] == 2
        assert standby.wait(200) == 0, "\n".join(standby.lines[-30:])
        chain = [from_bytes(link.payload) for link in Chain(open_objects(str(tmp_path / "shared" / "demo"))).load()]
        assert [entry.merged.round for entry in rounds_of(chain)] == list(range(1, ROUNDS + 1))
        epochs = [entry for entry in chain if isinstance(entry, JobEpochStarted)]
        assert len({entry.scheduler for entry in epochs}) == len(epochs) == 2
        assert standby.errors() == []
