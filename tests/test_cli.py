"""The console scripts: exit codes, one line per fault, signals, and what is not imported."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from hypha import cli, cli_role, doctor
from hypha.cli_app import main
from hypha.cli_role import Role, report_health, role_app
from hypha.cli_run import supervise
from hypha.config import NodeConfig
from hypha.errors import ConfigError, PeerUnreachable
from hypha.protocol.messages import HealthReport

REPORT = HealthReport(peer_id="p", role="worker", version="0.1.0", uptime_s=7, detail={"leases": "2"})


class ToyConfig(NodeConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A role that does what its configuration says."""

    ending: str = "returns"


async def toy_run(config: ToyConfig) -> None:
    async with trio.open_nursery():
        if config.ending == "config":
            raise ConfigError("`listen_addresses`: port 1 is taken")
        if config.ending == "unreachable":
            raise PeerUnreachable("nobody\nthere")
        if config.ending == "bug":
            raise KeyError("a bug")


TOY = Role("toy", "Does what it is told.", lambda: ToyConfig, lambda: toy_run)


@pytest.fixture
def toml(pki, tmp_path) -> Path:
    path = tmp_path / "toy.toml"
    path.write_text(pki.node("toy", ["worker"]).toml())
    return path


@pytest.fixture
def run(capsys):
    """Run a command line; returns (exit code, standard output, standard error)."""

    def run(*arguments: object, app=None) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(app or role_app(TOY), "hypha-toy", [str(each) for each in arguments])
        return (left.value.code or 0, *capsys.readouterr())

    return run


# --- validate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [("-c", "FILE", "--validate"), ("run", "-c", "FILE", "--validate"), ("--config", "FILE", "run", "--validate")],
)
def test_validate_checks_and_exits_with_or_without_run(run, toml, words):
    code, output, complaint = run(*[toml if word == "FILE" else word for word in words])
    assert (code, complaint) == (0, "")
    assert output.startswith(f"{toml}: valid for toy CN=toy 12D3KooW")


def test_validate_prints_what_is_unwise(run, toml):
    key = next(line for line in toml.read_text().splitlines() if line.startswith("key_pem")).split('"')[1]
    Path(key).chmod(0o644)
    code, _, complaint = run("-c", toml, "--validate")
    assert code == 0
    assert complaint.startswith(f"hypha-toy: warning: `key_pem`: {key} is open to every user")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("nonsense = 1", "hypha-toy: {toml}: `nonsense`: unknown key\n"),
        ('telemetry_endpoint = "ftp://x"', "telemetry_endpoint"),
        ("a =", "hypha-toy: {toml}:5: Invalid value (column 4)\n"),
    ],
)
def test_validate_finds_a_fault_with_exit_code_2_and_one_line(run, toml, line, complaint):
    with toml.open("a") as file:
        file.write(line)
    code, output, said = run("-c", toml, "--validate")
    assert (code, output, said.count("\n")) == (2, "", 1)
    assert complaint.format(toml=toml) in said


@pytest.mark.parametrize("arguments", [("run",), ("-c", "FILE"), ("run", "-c", "FILE", "--set", "nothing"), ("walk",)])
def test_bad_usage_exits_with_2(run, toml, arguments):
    code, _, said = run(*[toml if word == "FILE" else word for word in arguments])
    assert code == 2
    assert said


def without_goodbye(said: str) -> str:
    """Leave out the info line by which a role says what it sent and received."""
    return "".join(line for line in said.splitlines(keepends=True) if '"message": "Stopped"' not in line)


# --- run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "code"), [("returns", 0), ("config", 2), ("unreachable", 1)])
def test_end_of_a_role_decides_the_exit_code_without_a_traceback(run, toml, ending, code):
    got, _, said = run("run", "-c", toml, "--set", f"ending={ending}")
    assert got == code
    assert "Traceback" not in said
    assert without_goodbye(said).count("\n") == (1 if code else 0)


def test_configuration_fault_of_a_running_role_is_its_message(run, toml):
    _, _, said = run("run", "-c", toml, "--set", "ending=config")
    assert said == "hypha-toy: `listen_addresses`: port 1 is taken\n"


def test_failure_of_a_role_is_one_error_line_in_the_log(run, toml):
    _, _, said = run("run", "-c", toml, "--set", "ending=unreachable")
    entry = json.loads(without_goodbye(said))
    assert (entry["level"], entry["component"], entry["reason"]) == ("error", "hypha-toy", "nobody\nthere")


def test_bug_is_not_hidden(toml):
    with pytest.raises(ExceptionGroup) as caught:
        main(role_app(TOY), "hypha-toy", ["run", "-c", str(toml), "--set", "ending=bug"])
    assert caught.group_contains(KeyError)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_the_role_is_still_being_imported_is_exit_code_0(number):
    with pytest.raises(SystemExit) as left, cli_role.leaving_quietly():
        signal.raise_signal(number)
    assert left.value.code == 0


def test_signal_handlers_are_put_back(run, toml):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    run("run", "-c", toml)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


async def test_first_signal_cancels_the_role_and_later_ones_do_not_disturb_its_cleaning_up(toml):
    done = []

    async def stubborn(config: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                signal.raise_signal(signal.SIGINT)
                await trio.testing.wait_all_tasks_blocked()
                done.append("cleaned up")

    await supervise(stubborn, None)
    assert done == ["cleaned up"]


async def test_a_polite_role_is_told_first_and_cancelled_by_the_second_signal():
    done = []

    async def polite(_config: object, *, stopping: trio.Event) -> None:
        signal.raise_signal(signal.SIGTERM)
        await stopping.wait()
        done.append("told")
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep_forever()

    with trio.fail_after(5):
        await supervise(polite, None, polite=True)
    assert done == ["told"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signalled_process_exits_with_0_and_no_error(toml, tmp_path, number):
    script = tmp_path / "toy.py"
    script.write_text(
        "import trio\n"
        "from hypha.cli_app import main\n"
        "from hypha.cli_role import Role, role_app\n"
        "from hypha.config import NodeConfig\n"
        "async def run(config):\n"
        "    print('ready', flush=True)\n"
        "    await trio.sleep_forever()\n"
        "main(role_app(Role('toy', 'Waits.', lambda: NodeConfig, lambda: run)), 'hypha-toy')\n"
    )
    command = [sys.executable, str(script), "run", "-c", str(toml)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert [json.loads(line)["level"] for line in said.splitlines()] == ["info", "info"]


# --- init, probe, status ---------------------------------------------------------------------------------------------


def test_init_writes_the_documented_defaults_once(run, tmp_path, monkeypatch):
    (tmp_path / "toy.toml").write_text("# all the keys\n")
    monkeypatch.setattr(cli_role, "CONFIGS", tmp_path)
    written = tmp_path / "mine.toml"
    assert run("init", "-o", written) == (0, f"{written}\n", "")
    assert written.read_text() == "# all the keys\n"
    written.write_text("edited")
    code, _, said = run("init", "-o", written)
    assert (code, said) == (2, f"hypha-toy: {written} exists; --force overwrites it\n")
    assert run("init", "-o", written, "--force")[0] == 0
    assert written.read_text() == "# all the keys\n"


def test_healthy_answer_is_printed(capsys):
    report_health(lambda: REPORT, json=False)
    assert capsys.readouterr().out == "healthy: worker 0.1.0, up 7 s, p\n  leases: 2\n"
    report_health(lambda: REPORT, json=True)
    said = json.loads(capsys.readouterr().out)
    assert (said["healthy"], said["uptime_s"], said["detail"]) == (True, 7, {"leases": "2"})


@pytest.mark.parametrize("as_json", [True, False])
def test_no_answer_is_exit_code_1_with_the_reason(run, capsys, as_json):
    def nobody() -> HealthReport:
        raise PeerUnreachable("certificate refused: expired")

    app = role_app(TOY)
    app.command("ask")(lambda: report_health(nobody, json=as_json))
    code, output, said = run("ask", app=app)
    assert code == 1
    reason = json.loads(output)["reason"] if as_json else said
    assert "certificate refused: expired" in reason


@pytest.mark.parametrize(
    ("listening", "asked"),
    [
        (("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/tcp/4001"), "/ip4/127.0.0.1/tcp/4001"),
        (("/ip6/::/tcp/4001",), "/ip6/::1/tcp/4001"),
        (("/ip4/192.0.2.1/tcp/4001",), "/ip4/192.0.2.1/tcp/4001"),
    ],
)
def test_status_asks_where_the_configuration_listens(listening, asked):
    assert cli._loopback_address(listening) == asked


def test_status_wants_an_address_where_the_port_is_chosen_at_start():
    with pytest.raises(ConfigError, match="names no fixed port"):
        cli._loopback_address(("/ip4/0.0.0.0/tcp/0",))


# --- start-up cost ---------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    code = "import hypha.cli, hypha.certutil, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"trio", "libp2p", "torch", "numpy", "multiaddr", "opentelemetry", "rich", "psutil", "hypha.telemetry"}
    assert heavy & set(loaded) == set()


@pytest.mark.parametrize("program", ["gateway", "scheduler", "worker", "data"])
def test_every_role_has_the_common_commands_and_a_version(run, program):
    app = getattr(cli, f"{program}_app")
    _, output, _ = run("--help", app=app)
    assert all(f"\n  {command} " in output for command in ("init", "run", "probe"))
    assert run("--version", app=app)[1] == "hypha-toy 0.1.0\n"
    assert run(app=app)[1] == output


# --- datasets --------------------------------------------------------------------------------------------------------


def test_text_becomes_a_dataset_that_verifies_until_a_slice_is_damaged(run, tmp_path):
    (tmp_path / "text").mkdir()
    for index in range(8):
        (tmp_path / "text" / f"{index}.txt").write_text(f"line {index} of some text\n" * 200)
    out = tmp_path / "dataset"
    words = ("prepare", tmp_path / "text", "--out", out, "--sequence-length", 32, "--slice-bytes", 4096, "--json")
    code, output, _ = run(*words, app=cli.data_app)
    manifest = json.loads(output)
    assert (code, manifest["name"]) == (0, "dataset")
    assert {each["split"] for each in manifest["slices"]} == {"train", "held-out"}
    assert run("verify", out, app=cli.data_app) == (0, f"{out}: sound\n", "")
    damaged = next(out.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    code, _, said = run("verify", out, app=cli.data_app)
    assert code == 1
    assert damaged.name in said
    assert json.loads(run("verify", out, "--json", app=cli.data_app)[1])["faults"]


def test_dataset_without_text_is_refused_with_exit_code_2(run, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, said = run("prepare", tmp_path / "empty", "--out", tmp_path / "d", app=cli.data_app)
    assert (code, said.count("\n")) == (2, 1)
    assert not (tmp_path / "d").exists()


# --- doctor ----------------------------------------------------------------------------------------------------------


def verdicts(findings):
    return {each.subject: each.verdict for each in findings}


def test_doctor_finds_this_machine_fit():
    found = verdicts(doctor.run())
    assert (found["python"], found["libp2p"], found["cpu"]) == ("ok", "ok", "ok")
    assert "certificates" not in found


def test_doctor_reads_any_roles_configuration(run, toml):
    with toml.open("a") as file:
        file.write("[offer]\nfloor = 3\n")
    code, output, _ = run("doctor", "-c", toml, "--json", app=cli.hypha_app)
    found = {each["subject"]: each for each in json.loads(output)["findings"]}
    assert code == 0
    assert found["certificates"]["verdict"] == "ok"
    assert found["certificates"]["detail"].startswith("CN=toy, worker, 12D3KooW")


def test_doctor_fails_on_certificates_that_would_be_refused(run, pki, foreign_pki, tmp_path):
    files, strangers = pki.node("w", ["worker"]), foreign_pki.node("w", ["worker"])
    path = tmp_path / "w.toml"
    path.write_text(files.toml().replace(str(files.trust_pem), str(strangers.trust_pem)))
    code, output, _ = run("doctor", "-c", path, app=cli.hypha_app)
    assert code == 1
    assert "fail  certificates  `trust_pem`" in output


def test_doctor_fails_on_a_configuration_it_cannot_read(tmp_path):
    assert verdicts(doctor.run(tmp_path / "missing.toml"))["configuration"] == "fail"


def test_doctor_dials_only_when_told(toml):
    assert "gateway" not in verdicts(doctor.run(toml))
    assert verdicts(doctor.run(toml, dial=True))["gateway"] == "warn"


def test_environment_reaches_the_configuration(run, toml, monkeypatch):
    monkeypatch.setitem(os.environ, "HYPHA_ENDING", "config")
    assert run("run", "-c", toml)[0] == 2
