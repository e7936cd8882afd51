"""The demo without its network: what log lines add up to, what is written, how its processes live and die."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
import trio
from rich.console import Console

from hypha import demo
from hypha.config import load_config
from hypha.data_node import Config as DataConfig
from hypha.demo import commands, corpus, guardian, plot, report
from hypha.demo.display import display, picture
from hypha.demo.loglines import LogFile, LogLine, parse
from hypha.demo.nodes import Cast, free_port, write_configs
from hypha.demo.performance import environment_for_nodes
from hypha.demo.processes import BACKOFF_S, RESTARTS_MAX, DemoFailed, processes
from hypha.demo.progress import Finished, Progress
from hypha.errors import ConfigError
from hypha.gateway import Config as GatewayConfig
from hypha.scheduler.config import Config as SchedulerConfig
from hypha.worker.config import Config as WorkerConfig

CAST = Cast(workers=3, rounds=10, port=4001)
CONFIGS = {"gateway": GatewayConfig, "data": DataConfig, "worker": WorkerConfig, "scheduler": SchedulerConfig}


def said(source: str, message: str, *, level: str = "info", **fields: object) -> LogLine:
    line = {"timestamp": "t", "level": level, "component": f"hypha-{source}", "message": message, **fields}
    return parse(source, json.dumps(line))


def committed(number: int, total: int) -> LogLine:
    times = {"train_s": 2.0, "merge_s": 1.5, "commit_s": 0.5}
    fields = {"round": number, "samples": 640, "samples_total": total, "loss": 3.0, "contributors": 2, **times}
    return said("scheduler", "Round committed", **fields)


RUN = [
    said("worker-1", "Worker ready", capacity="cpu 1"),
    said("scheduler", "Job started", job_id="j", job_epoch=1, rounds=2, workers=2, min_workers=2),
    said("scheduler", "Dataset found", dataset="demo-text", digest="d", slices=9, samples=36000),
    said("scheduler", "Worker leased", worker="peer-1", work="train", lease_id="l1", price=1.0),
    said("scheduler", "Worker leased", worker_peer_id="peer-3", work="aggregate", lease_id="l3", price=1.0),
    said("scheduler", "Worker leased", worker="peer-3", work="aggregate", lease_id="l3", price=1.0),
    said("scheduler", "Held-out loss", round=0, loss=5.54, samples=512),
    committed(1, 640),
    said("scheduler", "Held-out loss", round=1, loss=3.1, samples=512),
    committed(2, 1280),
    said("scheduler", "Held-out loss", round=2, loss=2.4, samples=512),
    said("scheduler", "Job finished", job_id="j", rounds=2, samples=1280, model_file="state/m", job_file="state/j"),
    said("scheduler", "Stopped", bytes_sent=10, bytes_received=20, uptime_s=3.0),
    said("worker-1", "Stopped", bytes_sent=100, bytes_received=200, uptime_s=3.0),
]


@pytest.fixture
def finished() -> Progress:
    progress = Progress(names={"peer-1": "worker-1", "peer-3": "worker-3"})
    for line in RUN:
        progress.take(line)
    return progress


# --- progress ---


def test_a_run_adds_up(finished):
    assert (finished.rounds_wanted, finished.last_round, finished.samples) == (2, 2, 1280)
    assert (finished.held_out, finished.latest_loss()) == ({0: 5.54, 1: 3.1, 2: 2.4}, 2.4)
    assert finished.rounds[0].samples_per_s == 160
    assert (finished.bytes_sent, finished.bytes_received, finished.errors) == (110, 220, 0)
    assert (finished.finished.model_file, finished.ready) == ("state/m", {"worker-1"})
    assert finished.doing["worker-3"] == "serves parameters"


def test_the_export_of_a_job_is_a_command_in_the_runs_directory(tmp_path):
    files = (str(tmp_path / "configs" / ".." / "state" / "m"), "/elsewhere/job.json")
    command = commands.export(Finished(*files, samples=1, rounds=1), tmp_path)
    assert ("state/m" in command.arguments, "/elsewhere/job.json" in command.arguments) == (True, True)


def test_people_are_told_what_matters():
    progress = Progress(names={"peer-1": "worker-1"})
    told = [sentence for line in RUN[:8] if (sentence := progress.take(line)) is not None]
    assert told[0] == "job j: 2 rounds"
    assert told[2] == "worker-1 is leased at 1 an hour and trains"
    assert told[-1] == "round 1/2: training loss 3.000, 640 samples of 2 workers, 160 a second"


@pytest.mark.parametrize(
    ("line", "count"),
    [
        (said("worker-1", "Disk full", level="error"), 1),
        (said("worker-1", "Job failed", level="warn", reason="NaN"), 1),
        (said("worker-1", "Job failed", level="error", reason="NaN"), 1),
        (parse("gateway", "Traceback (most recent call last):"), 1),
        (said("data", "Odd", level="warn", stack="Traceback (most recent call last):\n  File"), 1),
        (said("data", "Odd", level="warn"), 0),
        (parse("gateway", '  File "x.py", line 1'), 0),
    ],
)
def test_errors_are_counted_once_wherever_they_are_logged(line, count):
    progress = Progress()
    progress.take(line)
    assert progress.errors == count


def test_a_lost_process_is_an_error_and_no_longer_ready():
    progress = Progress(ready={"worker-1"})
    assert progress.lost("worker-1", "SIGKILL") == "worker-1 is lost: SIGKILL"
    assert (progress.errors, progress.ready, progress.errors_shown) == (1, set(), ["worker-1: SIGKILL"])


def test_a_failed_job_of_the_scheduler_is_the_failure_a_workers_is_not():
    progress = Progress()
    progress.take(said("worker-1", "Job failed", level="error", reason="NaN loss"))
    assert progress.failure is None
    progress.take(said("scheduler", "Job failed", level="error", reason="1 of 2 workers"))
    assert progress.failure == "1 of 2 workers"


# --- the display ---


def test_a_terminal_shows_the_newest_numbers_and_who_does_what(finished):
    screen = Console(file=io.StringIO(), width=100)
    screen.print(picture(finished, 41.2))
    shown = screen.file.getvalue()
    assert "round 2/2   held-out loss 2.400   160 samples/s   2 leases   0 errors   41 s" in shown
    assert re.search(r"worker-3 +serves parameters", shown)


def test_elsewhere_sentences_are_lines(capsys):
    with display(to_stderr=True) as shown:
        shown.show(Progress())
        shown.say(
            "one [bold]sentence[/bold] that is longer than eighty characters and yet stays on one line, as it must"
        )
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), "[bold]" in err) == ("", 1, True)


# --- log files ---


def test_a_line_is_read_when_it_is_complete(tmp_path):
    path = tmp_path / "worker-1.log"
    log = LogFile(path)
    assert list(log.news()) == []
    path.write_text('{"message": "one", "level": "info"}\n{"mess')
    (first,) = log.news()
    assert (first.source, first.message, first.level) == ("worker-1", "one", "info")
    with path.open("a") as file:
        file.write('age": "two"}\n\nno JSON')
    assert [line.message for line in log.news()] == ["two"]
    assert [(line.message, line.level) for line in log.news(last=True)] == [("no JSON", "")]


def test_fields_of_the_wrong_type_do_no_harm():
    progress = Progress()
    progress.take(said("scheduler", "Round committed", round="three", samples=None, loss=True))
    assert (progress.last_round, progress.rounds[0].loss) == (0, 0.0)


# --- what is written ---


@pytest.mark.parametrize("otlp", [None, "http://127.0.0.1:4318", "http://127.0.0.1:4317"])
def test_configurations_are_valid_and_name_the_gateway_only(tmp_path, otlp):
    cast = Cast(workers=3, rounds=10, port=4001, otlp=otlp)
    write_configs(tmp_path / "configs", cast)
    for name, role in cast.roles.items():
        config = load_config(CONFIGS[role], tmp_path / "configs" / f"{name}.toml", {})
        assert config.gateway_addresses == (() if role == "gateway" else ("/ip4/127.0.0.1/tcp/4001",))
        assert config.cert_pem == tmp_path / "configs" / ".." / "certs" / f"{name}.pem"
        assert (config.telemetry_endpoint, config.telemetry_protocol == "http/protobuf") == (
            otlp,
            otlp == "http://127.0.0.1:4318",
        )


def test_the_last_worker_serves_parameters_and_the_others_train(tmp_path):
    write_configs(tmp_path, CAST)
    kinds = [load_config(WorkerConfig, tmp_path / f"{name}.toml", {}).executors[0].work for name in CAST.worker_names]
    assert kinds == ["train", "train", "aggregate"]
    job = load_config(SchedulerConfig, tmp_path / "scheduler.toml", {}).scheduler.job
    assert (job.resources.workers, job.rounds.updates, job.rounds.samples_between_updates) == (2, 10, 512)


def test_the_commands_are_a_script_that_the_shell_can_parse(tmp_path):
    commands.write_script(tmp_path, CAST, corpus.standard_library())
    script = tmp_path / commands.SCRIPT_NAME
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    text = script.read_text()
    for wanted in ("hypha-certutil root", "--role scheduler", "hypha-data prepare", "run -c configs/worker-3.toml"):
        assert wanted in text


def test_the_default_text_is_source_code_and_other_text_must_exist(tmp_path):
    assert all(source.endswith(".py") for source in corpus.standard_library().sources)
    (tmp_path / "a.txt").write_text("a")
    assert corpus.given([tmp_path / "a.txt"]).sources == (str(tmp_path / "a.txt"),)
    with pytest.raises(ConfigError, match="no such file"):
        corpus.given([tmp_path / "b.txt"])


def test_nodes_do_not_inherit_settings_that_would_override_their_files():
    environ = {"HYPHA_LEASE__TTL_S": "1", "OTEL_SERVICE_NAME": "x", "HOME": "/h", "HYPHA_LOG": "network=debug"}
    kept = environment_for_nodes(environ, otlp=False)
    assert ("HYPHA_LEASE__TTL_S" in kept, kept["OTEL_SERVICE_NAME"], kept["HOME"]) == (False, "x", "/h")
    assert kept["HYPHA_LOG"] == "info,network=debug"
    assert "OTEL_SERVICE_NAME" not in environment_for_nodes(environ, otlp=True)


def test_an_occupied_directory_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="--dir"):
        demo.main(text=[], workers=3, rounds=1, directory=tmp_path, otlp=None, json=True)


def test_the_default_directory_is_never_one_that_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo._directory(None) == tmp_path / "demo-run"
    (tmp_path / "demo-run").mkdir()
    assert demo._directory(None) == tmp_path / "demo-run-2"


# --- the report ---


def report_from(progress: Progress) -> report.Report:
    exported = report.Exported("/d/model", 1, "noise ``` here", "def f():\n  pass")
    rest = {"workers": 3, "wall_s": 50.0, "phases": {"setup": 0.1}, "failure": None}
    return report.report_of(progress, text="Python", exported=exported, **rest)


def test_the_summary_has_what_was_promised(finished, tmp_path):
    printed = msgspec.json.decode(msgspec.json.encode(report_from(finished).summary(tmp_path)))
    promised = (
        "initial_loss final_loss rounds workers samples wall_s bytes_sent bytes_received model_dir error_lines report"
    )
    assert set(promised.split()) == set(printed) - {"error"}
    assert (printed["initial_loss"], printed["final_loss"], printed["rounds"]) == (5.54, 2.4, 2)


def test_the_report_is_written_for_people_and_for_programs(finished, tmp_path):
    made = report_from(finished)
    report.write(made, tmp_path)
    assert made.phases == {"setup": 0.1, "training": 4.0, "merging": 3.0, "committing": 1.0}
    text = (tmp_path / report.MARKDOWN_NAME).read_text()
    assert text.count("```") == 4
    assert "| 2 | 3.000 | 2.400 | 640 | 2 | 160 |" in text
    assert msgspec.json.decode((tmp_path / report.JSON_NAME).read_bytes())["held_out"] == {
        "0": 5.54,
        "1": 3.1,
        "2": 2.4,
    }
    assert "after:  def f(): pass" in report.lines(made)


@pytest.mark.slow
def test_the_losses_are_plotted(finished, tmp_path):
    report.write(report_from(finished), tmp_path)
    plot.main([str(tmp_path / report.JSON_NAME), str(tmp_path / "loss.png")])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# --- processes ---


class Stage:
    """A directory with logs, and what was lost."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lost: list[tuple[str, str]] = []
        (directory / "logs").mkdir()

    def open(self):
        return processes(self.directory, dict(os.environ), lambda name, how: self.lost.append((name, how)))


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


async def test_a_step_returns_its_output_and_a_failed_one_says_why(stage):
    with stage.open() as running:
        assert await running.step("one", python("print('out')")) == "out\n"
        assert not (stage.directory / "logs" / "one.log").exists()
        with pytest.raises(DemoFailed, match="exit code 3: no luck"):
            await running.step("two", python("import sys; sys.stderr.write('no luck\\n'); sys.exit(3)"))


async def test_a_process_that_dies_is_started_again_after_a_rest(stage, autojump_clock):
    """Each start appends a letter; the third one ends well."""
    code = "p = open('starts', 'a'); p.write('x'); p.close(); import os; n = len(open('starts').read())"
    code += "\nif n == 1: os.kill(os.getpid(), 9)\nif n == 2: os._exit(7)"
    with stage.open() as running:
        await running.attend("node", python(code), is_end=lambda code: code == 0)
    assert (stage.directory / "starts").read_text() == "xxx"
    assert stage.lost == [("node", "SIGKILL"), ("node", "exit code 7")]
    assert trio.current_time() >= 3 * BACKOFF_S


async def test_a_process_that_always_dies_ends_the_demo(stage, autojump_clock):
    with stage.open() as running, pytest.raises(DemoFailed, match=f"died {RESTARTS_MAX + 1} times; last: .*boom"):
        await running.attend("node", python("raise SystemExit('boom')"))
    assert len(stage.lost) == RESTARTS_MAX + 1


async def test_a_refused_configuration_is_not_tried_again(stage):
    with stage.open() as running, pytest.raises(DemoFailed, match="`listen_addresses`: port taken"):
        await running.attend(
            "node", python("import sys; print('`listen_addresses`: port taken', file=sys.stderr); sys.exit(2)")
        )
    assert len(stage.lost) == 1


async def test_cancelling_leaves_no_process(stage):
    with stage.open() as running:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.attend, "node", python("import time; print('on', flush=True); time.sleep(60)"))
            while "node" not in running.running:
                await trio.lowlevel.checkpoint()
            pid = running.running["node"]
            assert psutil.pid_exists(pid)
            nursery.cancel_scope.cancel()
        assert not psutil.pid_exists(pid)
    assert stage.lost == []


def guarded() -> tuple[subprocess.Popen, subprocess.Popen]:
    """Start a guardian, and a sleeper in its group."""
    watching = subprocess.Popen([sys.executable, "-I", "-S", guardian.__file__], stdin=subprocess.PIPE, process_group=0)
    said = python("import time; print('on', flush=True); time.sleep(60)")
    sleeper = subprocess.Popen(said, stdout=subprocess.PIPE, process_group=watching.pid)
    assert sleeper.stdout.readline() == b"on\n"
    return watching, sleeper


@pytest.mark.parametrize(("last_word", "exit_of_the_sleeper"), [(b"", -signal.SIGTERM), (guardian.DONE, None)])
def test_the_guardian_ends_what_a_killed_demo_left_and_only_that(last_word, exit_of_the_sleeper):
    watching, sleeper = guarded()
    try:
        watching.stdin.write(last_word)
        watching.stdin.close()
        if exit_of_the_sleeper is None:
            assert (watching.wait(30), sleeper.poll()) == (0, None)
        else:
            assert sleeper.wait(30) == exit_of_the_sleeper
    finally:
        for each in (watching, sleeper):
            each.kill()
            each.wait()
        sleeper.stdout.close()


def test_a_free_port_is_one():
    assert 1024 <= free_port() <= 65535
