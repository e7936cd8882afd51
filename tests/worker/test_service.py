"""The worker as a process: what of `work_dir` keeps it from starting, and that SIGTERM leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from hypha.store.disk import RealDisk
from hypha.store.fences import FenceFile
from hypha.worker.process import LEASE_VARIABLE, ProcessRecord, birth_of

pytestmark = pytest.mark.slow

PATIENCE_S = 60.0
PROGRAM = str(Path(sys.executable).with_name("hypha-worker"))


class Home:
    """One worker's configuration and work directory."""

    def __init__(self, directory: Path, files) -> None:
        self.work = directory / "work"
        self.peer_id = files.identity().peer_id
        self.config = directory / "worker.toml"
        self.config.write_text(
            files.toml() + 'work_dir = "work"\nlisten_addresses = ["/ip4/127.0.0.1/tcp/0"]\n[resources]\ngpu = 0\n'
        )

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, "run", "-c", str(self.config)], capture_output=True, text=True, timeout=PATIENCE_S
        )

    @contextmanager
    def running(self):
        """The process, once it says that it is ready, and its lines so far."""
        command = [PROGRAM, "run", "-c", str(self.config)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        lines: list[dict[str, object]] = []
        try:
            while not any(line["message"] == "Worker ready" for line in lines):
                lines.append(json.loads(process.stderr.readline()))
            yield process, lines
        finally:
            process.kill()
            process.wait()
            process.stderr.close()

    def stop(self, process, lines) -> int:
        process.send_signal(signal.SIGTERM)
        lines += [json.loads(line) for line in process.stderr.read().splitlines()]
        return process.wait(PATIENCE_S)


@pytest.fixture
def home(tmp_path, pki):
    return Home(tmp_path, pki.node("worker-1", ["worker"]))


def test_sigterm_ends_it_cleanly(home):
    with home.running() as (process, lines):
        assert (home.work / "fences").is_file()
        assert home.work.stat().st_mode & 0o777 == 0o700
        assert home.stop(process, lines) == 0
    assert [line for line in lines if line["level"] == "error"] == []
    assert sorted(path.name for path in home.work.iterdir()) == ["cache", "fences", "fences.lock", "processes"]


def test_what_an_earlier_run_left_is_gone_before_it_is_ready(home):
    FenceFile(RealDisk(home.work), home.peer_id).reserve(10)
    code = "import signal\nprint('up', flush=True)\nwhile True: signal.pause()"
    left = subprocess.Popen(
        [sys.executable, "-c", code],
        start_new_session=True,
        stdout=subprocess.PIPE,
        env={**os.environ, LEASE_VARIABLE: "lease-9"},
    )
    assert left.stdout.readline() == b"up\n"
    record = ProcessRecord(left.pid, birth_of(left.pid))
    (home.work / "processes").mkdir()
    (home.work / "processes" / "lease-9.json").write_bytes(msgspec.json.encode(record))
    (home.work / "hypha-job-9-0").mkdir()
    with home.running() as (process, lines):
        assert left.wait(PATIENCE_S) == -signal.SIGTERM
        assert not (home.work / "hypha-job-9-0").exists()
        assert home.stop(process, lines) == 0
    left.stdout.close()


def test_two_workers_never_share_a_work_dir(home):
    with home.running():
        second = home.run()
    assert second.returncode == 2
    assert "work_dir" in second.stderr
    assert "fences.lock" in second.stderr


def test_a_work_dir_that_is_a_file_is_named(home):
    home.work.write_text("in the way")
    refused = home.run()
    assert refused.returncode == 2
    assert f"`work_dir`: {home.work} is not a directory" in refused.stderr


def test_a_work_dir_restored_from_an_older_backup_is_refused(home):
    with home.running() as (process, lines):
        home.stop(process, lines)
    (home.work / "hypha-job-1-123456").mkdir()
    refused = home.run()
    assert refused.returncode == 2
    assert "`work_dir`: fences: reserves fences below 0 but 123456 was granted already" in refused.stderr


def test_a_work_dir_open_to_others_is_warned_about(home):
    home.work.mkdir()
    home.work.chmod(0o777)
    with home.running() as (process, lines):
        assert home.stop(process, lines) == 0
    warned = [line for line in lines if line["level"] == "warn"]
    assert any(str(line["message"]).startswith("work_dir is writable by others") for line in warned)
