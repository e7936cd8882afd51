"""One scheduler at a time leads a job, and starting over destroys nothing."""

from pathlib import Path

import pytest
import trio

from hypha.config import load_config
from hypha.errors import ConfigError
from hypha.protocol.job import ModelSpec, Rounds
from hypha.scheduler.config import Config, JobConfig
from hypha.scheduler.hold import Hold
from hypha.scheduler.place import InUse, job_objects, open_place
from hypha.scheduler.settings import settings_of
from hypha.scheduler.standby import await_turn, open_hold
from hypha.scheduler.standing import Standing
from hypha.scheduler.store import open_store
from tests.sim.virtual import VirtualRuntime

ONE = Rounds(updates=1, samples_between_updates=1)
TEXT = """
cert_pem = "a.pem"
key_pem = "a-key.pem"
trust_pem = "trust.pem"
state_dir = "state"
[scheduler.job]
name = "demo"
dataset = "text"
model = { path = "/model" }
rounds = { updates = 1, samples_between_updates = 1 }
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "scheduler.toml"

    def make(extra="", **environ: str):
        path.write_text(extra + TEXT)
        return load_config(Config, path, environ)

    return make


def begin(place):
    job = JobConfig(model=ModelSpec(path="/model"), dataset="text", rounds=ONE, name="demo")
    settings = settings_of(job, manifest_digest="d" * 64)
    with open_store(place.disk, place.objects, job_id="demo-1", settings=settings, slices=()) as store:
        store.begin_epoch(scheduler="s", nonce="n")


def test_a_second_scheduler_on_the_same_job_is_refused_with_the_first_ones_pid(config):
    with (
        open_place(config()),
        pytest.raises(ConfigError, match=r"state_dir: .*demo\.lock: in use by another process \(pid \d+\)"),
        open_place(config()),
    ):
        pass


@pytest.mark.parametrize("key", ["state_dir", "checkpoint_url"])
def test_a_directory_that_cannot_be_is_refused_by_key_and_path(config, tmp_path, key):
    (tmp_path / "file").write_text("in the way")
    environ = {f"HYPHA_{key.upper()}": str(tmp_path / "file" / "below")}
    with pytest.raises(ConfigError, match=rf"^{key}: .*file/below") as refused, open_place(config(**environ)):
        pass
    assert not isinstance(refused.value, InUse)


def test_what_the_last_run_left_is_touched_only_once_the_job_is_known_to_be_the_same(config):
    with open_place(config()) as place:
        begin(place)
        (place.directory / "job.json").write_bytes(b"{}")
    other = config(HYPHA_SCHEDULER__JOB__MODEL__PATH="/another")
    with (
        pytest.raises(ConfigError, match=r"scheduler\.job\.model\.path was '/model', is '/another'"),
        open_place(other),
    ):
        pass
    assert (place.directory / "job.json").exists()
    with pytest.raises(ConfigError, match="the checkpoint store"):
        job_objects(other)
    with open_place(other, fresh=True) as place:
        assert place.objects.names("chain") == []


def test_what_a_killed_scheduler_was_writing_is_removed(config, tmp_path):
    with open_place(config()) as place:
        place.objects.create("model/1-x", [b"whole"])
    half = tmp_path / "state/demo/model/2-y.0123.part"
    half.write_bytes(b"half")
    with open_place(config()) as place:
        assert not half.exists()
        assert place.objects.read("model/1-x") == b"whole"


def test_it_may_come_once_the_first_is_gone(config, tmp_path):
    with open_place(config()) as place:
        (place.directory / "half").write_bytes(b"x")
    with open_place(config()) as place:
        assert place.directory == tmp_path / "state/demo/downloads"
        assert list(place.directory.iterdir()) == []


def test_starting_over_sets_aside_what_there_was(config, tmp_path):
    for kept in ("first", "second"):
        with open_place(config()) as place:
            place.objects.create("record/1-x", [kept.encode()])
        with open_place(config(), fresh=True) as place:
            assert place.objects.names("record") == []
    found = {path.parts[-3]: path.read_text() for path in tmp_path.glob("state/*/record/1-x")}
    assert found == {"demo.before-1": "first", "demo.before-2": "second"}


def test_starting_over_sets_aside_the_checkpoints_elsewhere_too(config, tmp_path):
    elsewhere = config(f'checkpoint_url = "{tmp_path}/shared"\n')
    with open_place(elsewhere) as place:
        place.objects.create("chain/00000000", [b"x"])
    with open_place(elsewhere, fresh=True) as place:
        assert place.objects.names("chain") == []
    assert Path(tmp_path / "shared/demo.before-1/chain/00000000").read_bytes() == b"x"


def test_what_cannot_be_set_aside_is_refused(config):
    remote = config('checkpoint_url = "memory://place-test"\n')
    with open_place(remote) as place:
        place.objects.create("chain/00000000", [b"x"])
    with (
        pytest.raises(ConfigError, match="memory://place-test/demo holds a job that cannot be set aside"),
        open_place(remote, fresh=True),
    ):
        pass


def test_a_state_directory_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(ConfigError, match=r"state_dir: .*/state"), open_place(config()):
        pass


async def test_a_standby_waits_until_the_hold_has_lapsed_and_the_directory_is_free(autojump_clock, config):
    turned = []

    async def stand_by() -> None:
        runtime = VirtualRuntime(1, "standby")
        await await_turn(config(), runtime, await open_hold(config(), runtime, scheduler="standby"))
        turned.append(trio.current_time())

    began, hold_s = trio.current_time(), config().scheduler.hold_s
    async with trio.open_nursery() as nursery:
        with open_place(config()):
            nursery.start_soon(stand_by)
            await trio.sleep(3.5 * hold_s)
            assert turned == []
    assert len(turned) == 1
    assert turned[0] - began <= 5 * hold_s


async def test_a_standby_looks_where_the_leader_keeps_its_chain(autojump_clock, config, tmp_path):
    shared = f"file://{tmp_path}/shared"
    leader, follower = (
        config(HYPHA_CHECKPOINT_URL=shared, HYPHA_STATE_DIR=str(tmp_path / name)) for name in ("leader", "follower")
    )
    hold_s, turned = leader.scheduler.hold_s, []

    async def stand_by() -> None:
        runtime = VirtualRuntime(1, "standby")
        await await_turn(follower, runtime, await open_hold(follower, runtime, scheduler="standby"))
        turned.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        with open_place(leader) as place:
            hold = Hold(place.objects, VirtualRuntime(1, "leader"), scheduler="leader", hold_s=hold_s)
            nursery.start_soon(stand_by)
            with trio.move_on_after(10 * hold_s):
                await hold.keep(lambda: None, Standing())
            assert turned == []
            ended = trio.current_time()
            await trio.sleep(2 * hold_s)
    assert 0.7 * hold_s < turned[0] - ended <= hold_s
