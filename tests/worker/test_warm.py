"""The spare executor: who gets it, what it knows before and after, and that nothing of it is left."""

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from hypha.protocol.warm import WarmStart
from hypha.worker import warm
from hypha.worker.config import ExecutorConfig
from hypha.worker.environment import executor_environment
from hypha.worker.process import (
    LEASE_VARIABLE,
    Launch,
    ProcessLauncher,
    ProcessRecord,
    birth_of,
    end_group,
    group_members,
)
from hypha.worker.warm import Warm
from tests.worker.cast import job_spec
from tests.worker.test_bridge import Script

pytestmark = pytest.mark.slow

PATIENCE_S = 60.0
# The real process but for what takes long: it imports nothing and says what it was given instead of training.
QUICK = """
import os, sys
from hypha.training import warm
warm.MODULES = ()
def begin(job):
    os.environ.update(job.environment)
    print(job.work, job.directory, os.environ["HYPHA_LEASE_ID"], os.environ["HYPHA_THREADS"], job.arguments[0])
    return 0
warm.begin = begin
sys.exit(warm.main())
"""


class Machine:
    """A worker's part that keeps a spare, in a directory of its own."""

    def __init__(self, directory: Path, *, has_gpu: bool = False) -> None:
        self.records = directory / "processes"
        self.records.mkdir()
        self.job_dir = directory / "job"
        self.job_dir.mkdir()
        environment = executor_environment(os.environ)
        self.warm = Warm(self.records, environment, has_gpu=has_gpu)
        self.launcher = ProcessLauncher(self.records, environment, self.warm)
        self.room = True

    def what(self, *, has_gpu: bool = False, cmd: str | None = None) -> Launch:
        executor = ExecutorConfig(work="train", name="x", cmd=cmd, args=("-c", "print('cold')") if cmd else ())
        return Launch(
            job=job_spec(),
            lease_id="lease-1",
            executor=executor,
            session=Script(),
            directory=self.job_dir,
            threads=2,
            has_gpu=has_gpu,
        )

    @asynccontextmanager
    async def running(self):
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.warm.run, lambda: self.room)
                yield
                nursery.cancel_scope.cancel()

    async def spare(self, *, besides: int = 0) -> int:
        """The pid of the idle process, once there is a record of another than `besides`."""
        while True:
            for path in self.records.glob("warm-*.json"):
                pid = msgspec.json.decode(path.read_bytes(), type=ProcessRecord).pgid
                if pid != besides:
                    return pid
            await trio.sleep(0.01)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(warm, "COMMAND", (sys.executable, "-c", QUICK))
    monkeypatch.setattr(warm, "LOOK_S", 0.01)
    monkeypatch.setattr(warm, "FULL_S", 0.1)
    monkeypatch.setattr(warm, "AFTER_JOB_S", 0.0)


@pytest.fixture
def machine(tmp_path, quick):
    return Machine(tmp_path)


async def until_gone(pid: int) -> None:
    while group_members(pid):  # noqa: ASYNC110 - the end of a group is no event
        await trio.sleep(0.01)


async def test_a_job_that_fills_the_worker_has_time_to_take_it(machine, monkeypatch):
    monkeypatch.setattr(warm, "FULL_S", PATIENCE_S)
    async with machine.running():
        pid = await machine.spare()
        machine.room = False
        await trio.sleep(10 * warm.LOOK_S)
        async with machine.launcher.launch(machine.what()) as executor:
            assert executor.pgid == pid


async def test_a_job_gets_the_spare_with_its_own_environment_and_is_recorded_under_its_lease(machine):
    async with machine.running():
        pid = await machine.spare()
        async with machine.launcher.launch(machine.what()) as executor:
            machine.room = False
            record = msgspec.json.decode((machine.records / "lease-1.json").read_bytes(), type=ProcessRecord)
            assert (record.pgid, record.birth) == (pid, birth_of(pid))
            assert record.mark.startswith("warm-")
            assert not list(machine.records.glob(f"{record.mark}.json"))
            assert await executor.wait() == 0
        assert executor.last_lines() == (f"train {machine.job_dir} lease-1 2 --socket",)
        assert list(machine.records.iterdir()) == []


async def test_it_is_used_once_and_another_follows_while_there_is_room(machine):
    async with machine.running():
        first = await machine.spare()
        async with machine.launcher.launch(machine.what()) as executor:
            assert executor.pgid == first
            second = await machine.spare(besides=first)
            assert await executor.wait() == 0
        assert group_members(first) == []
        assert group_members(second) == [second]
    assert group_members(second) == []
    assert list(machine.records.iterdir()) == []


async def test_without_room_it_is_ended(machine):
    async with machine.running():
        pid = await machine.spare()
        machine.room = False
        await until_gone(pid)
        assert machine.warm.take(start(), has_gpu=False) is None


async def test_another_waits_until_the_job_that_took_the_last_has_begun(machine, monkeypatch):
    monkeypatch.setattr(warm, "AFTER_JOB_S", PATIENCE_S)
    async with machine.running():
        first = await machine.spare()
        async with machine.launcher.launch(machine.what()) as executor:
            assert executor.pgid == first
            with trio.move_on_after(0.2):
                raise AssertionError(f"process {await machine.spare(besides=first)} was started at once")


async def test_before_its_job_it_knows_of_none(machine):
    async with machine.running():
        pid = await machine.spare()
        environment = await trio.Path(f"/proc/{pid}/environ").read_text()
        assert f"{LEASE_VARIABLE}=warm-" in environment
        assert "CUDA_VISIBLE_DEVICES=\0" in environment
        assert os.readlink(f"/proc/{pid}/cwd") == str(machine.records)
        assert (os.getsid(pid), os.getpgid(pid)) == (pid, pid)


async def test_a_lease_with_a_device_is_not_served_by_one_that_sees_none_nor_the_other_way_round(tmp_path, quick):
    for name, sees in (("without", False), ("with", True)):
        (tmp_path / name).mkdir()
        machine = Machine(tmp_path / name, has_gpu=sees)
        async with machine.running():
            pid = await machine.spare()
            assert machine.warm.take(start(), has_gpu=not sees) is None
            taken = machine.warm.take(start(), has_gpu=sees)
            assert taken is not None
            process, mark = taken
            assert (process.pid, mark[:5]) == (pid, "warm-")
            await end_group(pid)
            await process.wait()


async def test_a_program_of_the_operators_own_is_started_anew(machine):
    async with machine.running():
        await machine.spare()
        async with machine.launcher.launch(machine.what(cmd=sys.executable)) as executor:
            assert await executor.wait() == 0
        assert executor.last_lines() == ("cold",)


async def test_one_that_ended_by_itself_is_not_given_out_and_not_replaced_at_once(machine):
    async with machine.running():
        pid = await machine.spare()
        os.kill(pid, signal.SIGKILL)
        await until_gone(pid)
        assert machine.warm.take(start(), has_gpu=False) is None
        while list(machine.records.iterdir()):  # noqa: ASYNC110 - a file that goes is no event
            await trio.sleep(0.01)
        with trio.move_on_after(0.2):
            raise AssertionError(f"process {await machine.spare()} was started at once")


async def test_it_ends_when_its_worker_is_killed_even_while_it_imports(tmp_path):
    code = (
        "import os, sys, trio\n"
        "from pathlib import Path\n"
        "from hypha.worker.warm import Warm\n"
        "trio.run(Warm(Path(sys.argv[1]), os.environ, has_gpu=False).run, lambda: True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])  # noqa: ASYNC220 - it is to be killed
    try:
        with trio.fail_after(PATIENCE_S):
            while not (found := list(tmp_path.glob("warm-*.json"))):  # noqa: ASYNC110 - a file is no event
                await trio.sleep(0.01)
            pid = msgspec.json.decode(found[0].read_bytes(), type=ProcessRecord).pgid
            child.kill()
            child.wait()
            await until_gone(pid)
    finally:
        child.kill()
        child.wait()
    assert group_members(pid) == []


async def test_what_a_spare_left_is_known_by_its_mark_when_it_had_a_job(machine):
    parent = (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], stdout=subprocess.DEVNULL)\n"
    )
    left = subprocess.Popen(  # noqa: ASYNC220 - nobody here is to wait for it in trio's manner
        [sys.executable, "-c", parent], start_new_session=True, env={**os.environ, LEASE_VARIABLE: "warm-1-1"}
    )
    left.wait()
    record = machine.records / "lease-9.json"
    record.write_bytes(msgspec.json.encode(ProcessRecord(left.pid, "some birth", "warm-1-2")))
    assert await machine.launcher.end_leftovers() == 0
    record.write_bytes(msgspec.json.encode(ProcessRecord(left.pid, "some birth", "warm-1-1")))
    assert await machine.launcher.end_leftovers() == 1
    assert group_members(left.pid) == []


async def test_the_real_one_does_the_jobs_work(tmp_path):
    machine = Machine(tmp_path)
    async with machine.running():
        pid = await machine.spare()
        async with machine.launcher.launch(machine.what()) as executor:
            # The bridge's script answers NoSamples to everything, which the trainer takes for a fault of the worker's.
            assert (executor.pgid, await executor.wait()) == (pid, 1)
        assert "RemoteProtocolError: worker answered" in executor.last_lines()[-1]


@pytest.mark.parametrize("line", [b"no json\n", b"{}\n", b"x" * (1 << 17)])
def test_what_is_no_job_ends_it(line):
    done = subprocess.run([sys.executable, "-c", QUICK], input=line, capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == (0 if len(line) > 1 << 16 else 1)
    assert done.stdout == b""


def start() -> WarmStart:
    return WarmStart(work="train", arguments=("--socket",), directory="/", environment={"HYPHA_THREADS": "1"})
