"""Executors as real processes: what they write, how they end, and that nothing of them is left."""

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from hypha.errors import JobFailed, StoreError
from hypha.worker import process
from hypha.worker.config import ExecutorConfig
from hypha.worker.environment import executor_environment
from hypha.worker.process import (
    LAST_LINES_KEPT,
    LEASE_VARIABLE,
    LINE_BYTES_MAX,
    Launch,
    ProcessLauncher,
    ProcessRecord,
    birth_of,
    command_of,
    end_group,
    group_members,
)
from tests.worker.cast import job_spec
from tests.worker.test_bridge import Script

PATIENCE_S = 20.0
FOREVER = "import signal\nwhile True: signal.pause()\n"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\n" + FOREVER
# Starts a child of its own in the same group, which ignores the polite signal, and says its pid.
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
"""


class Machine:
    """A worker's part that starts executors, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.records = directory / "processes"
        self.records.mkdir(exist_ok=True)
        self.job_dir = directory / "job"
        self.job_dir.mkdir(exist_ok=True)
        self.launcher = ProcessLauncher(self.records, executor_environment(os.environ))

    def what(self, code: str | None = None, *, cmd: str = sys.executable, args: tuple[str, ...] = ()) -> Launch:
        args = ("-c", code) if code is not None else args
        return Launch(
            job=job_spec(),
            lease_id="lease-1",
            executor=ExecutorConfig(work="train", name="x", cmd=cmd, args=args),
            session=Script(),
            directory=self.job_dir,
            threads=2,
        )

    @asynccontextmanager
    async def run(self, code: str):
        with trio.fail_after(PATIENCE_S):
            async with self.launcher.launch(self.what(code)) as running:
                yield running

    async def ends(self, code: str):
        """(exit code, last lines) of an executor that ends by itself."""
        async with self.run(code) as running:
            ended = await running.wait()
        return ended, running.last_lines()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


async def said(running, word: str) -> str:
    """The first line that it writes with this word in it."""
    while True:
        for line in running.last_lines():
            if word in line:
                return line
        await trio.sleep(0.01)


def alive(pid: int) -> bool:
    return bool(birth_of(pid)) and process.psutil.Process(pid).status() != process.psutil.STATUS_ZOMBIE


# --- what it is given -------------------------------------------------------------------------------------------------


def test_placeholders_are_filled_in_and_the_built_in_executors_need_no_command():
    paths = {"socket_path": Path("/s"), "work_dir": Path("/w"), "job_json": Path("/j")}
    own = ExecutorConfig(
        work="train", name="x", cmd="/bin/x", args=("--at={WORK_DIR}/y", "{JOB_JSON}", "{SOCKET_PATH}")
    )
    assert command_of(own, **paths) == ["/bin/x", "--at=/w/y", "/j", "/s"]
    module = "hypha.training.aggregate"
    built_in = command_of(ExecutorConfig(work="aggregate", name="x"), **paths)
    assert built_in == [sys.executable, "-m", module, "--socket", "/s", "--work-dir", "/w", "--job", "/j"]


def test_the_environment_holds_what_torch_needs_and_no_secret():
    ours = {"PATH": "/bin", "HOME": "/h", "HYPHA_KEY_PEM": "k", "OTEL_EXPORTER_OTLP_HEADERS": "token", "HF_TOKEN": "t"}
    given = executor_environment(ours)
    assert {key: given[key] for key in ours if key in given} == {"PATH": "/bin", "HOME": "/h"}
    assert (given["HF_HUB_OFFLINE"], given["TRANSFORMERS_OFFLINE"]) == ("1", "1")


@pytest.mark.slow
async def test_it_finds_its_job_its_directory_and_its_threads(machine):
    code = (
        "import os\n"
        "print(os.getcwd(), os.environ['HYPHA_THREADS'], os.environ['OMP_NUM_THREADS'], os.getsid(0) == os.getpid())"
    )
    ended, lines = await machine.ends(code)
    assert (ended, lines) == (0, (f"{machine.job_dir} 2 2 True",))
    assert msgspec.json.decode((machine.job_dir / "job.json").read_bytes())["job_id"] == "job-1"


@pytest.mark.slow
@pytest.mark.parametrize(("has_gpu", "seen"), [(False, "''"), (True, "'0'")])
async def test_it_sees_a_gpu_only_under_a_lease_that_holds_one(tmp_path, monkeypatch, has_gpu, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    machine = Machine(tmp_path)
    what = msgspec.structs.replace(
        machine.what("import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"), has_gpu=has_gpu
    )
    with trio.fail_after(PATIENCE_S):
        async with machine.launcher.launch(what) as running:
            assert await running.wait() == 0
    assert running.last_lines() == (seen,)


# --- what it writes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "ended", "lines"),
    [
        ("print('a'); print(); print('b')", 0, ("a", "b")),
        ("import sys; sys.stderr.write('no newline'); sys.exit(3)", 3, ("no newline",)),
        ("import sys; sys.exit('at once')", 1, ("at once",)),
        ("import os; os.write(1, bytes(range(128, 256)) + b'\\n\\x00ok\\n')", 0, ("�" * 128, "\x00ok")),
        ("import os, signal; print('bye', flush=True); os.kill(os.getpid(), signal.SIGSEGV)", -11, ("bye",)),
    ],
)
async def test_how_it_ended_and_what_it_said_last(machine, code, ended, lines):
    assert await machine.ends(code) == (ended, lines)


@pytest.mark.slow
async def test_only_the_last_lines_are_kept_and_the_log_has_all(machine):
    ended, lines = await machine.ends("for n in range(5000): print('line', n)")
    assert ended == 0
    assert lines == tuple(f"line {n}" for n in range(5000 - LAST_LINES_KEPT, 5000))
    assert (machine.job_dir / "executor.log").read_text().count("\n") == 5000


@pytest.mark.slow
async def test_one_endless_line_costs_no_memory_and_no_disk(machine, monkeypatch):
    monkeypatch.setattr(process, "LOG_BYTES_MAX", 1 << 20)
    ended, lines = await machine.ends(
        "import os\nfor _ in range(4): os.write(1, b'x' * (1 << 20))\nos.write(1, b'end')"
    )
    assert ended == 0
    assert [len(line) for line in lines] == [LINE_BYTES_MAX]
    assert lines[0].endswith("xend")
    assert (machine.job_dir / "executor.log").stat().st_size == 1 << 20


@pytest.mark.slow
async def test_a_log_that_cannot_be_written_costs_the_log_alone(machine):
    (machine.job_dir / "executor.log").symlink_to("/dev/full")
    ended, lines = await machine.ends("import os\nfor _ in range(3): print('x', flush=True)")
    assert ended == 0
    assert "[executor.log: No space left on device]" in lines
    assert lines.count("x") == 3


# --- how it is ended --------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_leaving_ends_the_whole_group_and_the_grandchild_that_ignores_the_polite_signal(machine, monkeypatch):
    monkeypatch.setattr(process, "TERMINATE_GRACE_S", 0.1)
    async with machine.run(PARENT + FOREVER) as running:
        grandchild = int(await said(running, ""))
        assert sorted([running.pgid, grandchild]) == group_members(running.pgid)
    assert group_members(running.pgid) == []
    assert not alive(grandchild)
    assert list(machine.records.iterdir()) == []


@pytest.mark.slow
async def test_a_grandchild_that_outlives_its_parent_is_ended_too(machine, monkeypatch):
    monkeypatch.setattr(process, "TERMINATE_GRACE_S", 0.1)
    ended, lines = await machine.ends(PARENT)
    assert ended == 0
    assert not alive(int(lines[0]))


@pytest.mark.slow
async def test_cancellation_waits_until_the_group_is_gone(machine, monkeypatch):
    monkeypatch.setattr(process, "TERMINATE_GRACE_S", 0.1)
    with trio.CancelScope() as scope:
        async with machine.run(STUBBORN) as running:
            await said(running, "ready")
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert group_members(running.pgid) == []


@pytest.mark.slow
async def test_while_it_runs_its_group_and_birth_are_on_disk_with_the_lease_as_name(machine):
    async with machine.run(FOREVER) as running:
        record = msgspec.json.decode((machine.records / "lease-1.json").read_bytes(), type=ProcessRecord)
        assert record == ProcessRecord(running.pgid, birth_of(running.pgid))


@pytest.mark.slow
async def test_when_the_worker_dies_the_executor_sees_its_bridge_close(machine):
    code = (
        "import socket, sys\n"
        "bridge = socket.socket(socket.AF_UNIX)\n"
        "bridge.connect('bridge.sock')\n"
        "sys.stdout.write('+')\n"
        "sys.stdout.flush()\n"
        "sys.stdout.write('closed' if bridge.recv(1) == b'' else 'data')\n"
    )
    async with trio.open_nursery() as nursery:
        bridge = await nursery.start(process.serve_bridge, Script(), machine.job_dir)
        child = await trio.lowlevel.open_process(
            [sys.executable, "-c", code], cwd=bridge.parent, stdout=subprocess.PIPE
        )
        assert await child.stdout.receive_some() == b"+"
        nursery.cancel_scope.cancel()
    with trio.fail_after(PATIENCE_S):
        assert await child.stdout.receive_some() == b"closed"
        await child.wait()
        await child.stdout.aclose()


async def stop_for(machine: Machine, limit_s: float, *, ends) -> Script:
    """The session of an executor that was stopped once it was up, when `ends(session, pgid)` is true."""
    what = msgspec.structs.replace(machine.what("print('up', flush=True)\n" + FOREVER), stopped_max_s=limit_s)
    with trio.fail_after(PATIENCE_S):
        async with machine.launcher.launch(what) as running:
            await said(running, "up")
            os.kill(running.pgid, signal.SIGSTOP)
            while not ends(what.session, running.pgid):  # noqa: ASYNC110 - states of processes are no events
                await trio.sleep(0.01)
            os.kill(running.pgid, signal.SIGCONT)
    return what.session


@pytest.mark.slow
async def test_one_that_stands_still_for_too_long_has_failed(machine, monkeypatch):
    monkeypatch.setattr(process, "STOPPED_POLL_S", 0.05)
    session = await stop_for(machine, 0.2, ends=lambda session, _pgid: session.failures)
    assert session.failures == ["the executor was stopped for 0 s (a stop signal)"]


@pytest.mark.slow
async def test_one_that_goes_on_in_time_has_not_failed(machine, monkeypatch):
    monkeypatch.setattr(process, "STOPPED_POLL_S", 0.05)
    session = await stop_for(
        machine, PATIENCE_S, ends=lambda _session, pgid: process.psutil.Process(pgid).status() == "stopped"
    )
    assert session.failures == []


# --- what does not start ----------------------------------------------------------------------------------------------


async def enter(machine: Machine, what: Launch) -> None:
    async with machine.launcher.launch(what):
        raise AssertionError("it started")


@pytest.mark.slow
async def test_a_program_that_is_not_there_is_named(machine):
    failure = pytest.RaisesExc(JobFailed, match="executor '/no/such/program' did not start: .*No such file")
    with pytest.RaisesGroup(failure, flatten_subgroups=True):
        await enter(machine, machine.what(cmd="/no/such/program"))
    assert list(machine.records.iterdir()) == []


async def test_a_job_that_cannot_be_written_is_named(machine):
    (machine.job_dir / "job.json").symlink_to("/dev/full")
    with pytest.raises(StoreError, match=r"job/job\.json: No space left on device"):
        await enter(machine, machine.what(FOREVER))


# --- what an earlier run left -----------------------------------------------------------------------------------------


@asynccontextmanager
async def left_behind(machine: Machine, code: str = FOREVER, **environment: str):
    """An executor whose worker died: a process group that is nobody's child to wait for, with a record."""
    child = subprocess.Popen(  # noqa: ASYNC220 - nobody here is to wait for it in trio's manner
        [sys.executable, "-c", "print('up', flush=True)\n" + code],
        start_new_session=True,
        stdout=subprocess.PIPE,
        env={**os.environ, LEASE_VARIABLE: "lease-9", **environment},
    )
    try:
        assert await trio.to_thread.run_sync(child.stdout.readline) == b"up\n"
        yield child
    finally:
        for pid in group_members(child.pid):
            os.kill(pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def remember(machine: Machine, pgid: int, birth: str | None) -> Path:
    record = machine.records / "lease-9.json"
    record.write_bytes(msgspec.json.encode(ProcessRecord(pgid, birth or "")))
    return record


@pytest.mark.slow
async def test_what_an_earlier_run_left_running_is_ended(machine):
    async with left_behind(machine) as child:
        record = remember(machine, child.pid, birth_of(child.pid))
        assert await machine.launcher.end_leftovers() == 1
        assert child.wait() == -signal.SIGTERM
        assert not record.exists()


@pytest.mark.slow
async def test_a_process_that_got_a_recycled_pid_is_left_alone(machine):
    async with left_behind(machine) as child:
        record = remember(machine, child.pid, birth_of(os.getpid()))
        assert await machine.launcher.end_leftovers() == 0
        assert (child.poll(), record.exists()) == (None, False)


@pytest.mark.slow
@pytest.mark.parametrize(("lease_id", "ended"), [("lease-9", 1), ("lease-8", 0)])
async def test_without_a_leader_a_group_is_known_by_its_lease(machine, lease_id, ended):
    async with left_behind(machine, PARENT, **{LEASE_VARIABLE: lease_id}) as child:
        orphan = int(await trio.to_thread.run_sync(child.stdout.readline))
        child.wait()
        remember(machine, child.pid, "some birth")
        assert await machine.launcher.end_leftovers() == ended
        assert alive(orphan) == (not ended)


async def test_records_of_the_gone_and_garbage_are_removed(machine):
    remember(machine, 2**22 + 1, "some birth")
    (machine.records / "lease-0.json").write_bytes(b"\x00garbage")
    assert await machine.launcher.end_leftovers() == 0
    assert list(machine.records.iterdir()) == []


async def test_ending_a_group_that_is_gone_is_no_error():
    await end_group(2**22 + 1)
    assert group_members(2**22 + 1) == []


def test_a_birth_is_the_same_whenever_it_is_asked_for():
    assert birth_of(os.getpid()) == birth_of(os.getpid()) != birth_of(1)
    assert birth_of(2**22 + 1) is None
