"""`hypha-scheduler run`, with real certificates, files and network: who leads at once, and who waits for whom."""

import logging

import pytest
import trio
from msgspec.structs import replace

from hypha.protocol.job import ModelSpec, Rounds
from hypha.runtime import RealRuntime
from hypha.scheduler.config import Config, JobConfig, SchedulerTable
from hypha.scheduler.hold import Hold
from hypha.scheduler.place import job_objects
from hypha.scheduler.service import run

pytestmark = pytest.mark.slow

HOLD_S = 0.25
JOB = JobConfig(
    name="demo",
    model=ModelSpec(path="/model"),
    dataset="text",
    rounds=Rounds(updates=1, samples_between_updates=1),
)
STANDING_BY = "Another scheduler leads the job: standing by"


@pytest.fixture
def config(tmp_path, pki):
    files = pki.node("scheduler", ["scheduler"])
    return Config(
        cert_pem=files.cert_pem,
        key_pem=files.key_pem,
        trust_pem=files.trust_pem,
        listen_addresses=("/ip4/127.0.0.1/tcp/0",),
        state_dir=tmp_path / "state",
        checkpoint_url=str(tmp_path / "shared"),
        scheduler=SchedulerTable(job=JOB, hold_s=HOLD_S),
    )


async def turn(config, caplog):
    """Run it until it is its turn; returns what it said before."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        async with trio.open_nursery() as nursery:
            await nursery.start(run, config)
            said = [record.getMessage() for record in caplog.records]
            nursery.cancel_scope.cancel()
    return said


async def test_the_only_scheduler_starts_and_starts_again_without_waiting_for_anybody(config, caplog):
    for _ in range(2):
        assert not any("tanding by" in said for said in await turn(config, caplog))


async def test_whoever_starts_while_another_holds_the_store_stands_by_until_that_has_lapsed(config, pki, caplog):
    Hold(job_objects(config), RealRuntime(), scheduler="other", hold_s=HOLD_S).take()
    said = await turn(config, caplog)
    assert said.index(STANDING_BY) < said.index("Standing by") < said.index("The hold on the job's store has lapsed")
    # What it is started from does not matter: with another key it is another scheduler.
    other = pki.node("other", ["scheduler"])
    theirs = replace(config, cert_pem=other.cert_pem, key_pem=other.key_pem)
    assert STANDING_BY in await turn(theirs, caplog)
