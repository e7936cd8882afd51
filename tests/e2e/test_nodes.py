"""Nodes as real processes: configurations that are refused, health from outside, and strangers."""

import json

import pytest

from hypha.demo.nodes import free_port
from tests.e2e.programs import run, stage

pytestmark = [pytest.mark.slow]

ROLES = ("gateway", "scheduler", "worker", "data")


@pytest.fixture
def on_stage(tmp_path):
    with stage(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize("role", ROLES)
def test_a_wrong_key_is_named_with_its_file(role, tmp_path):
    assert run([f"hypha-{role}", "init"], tmp_path)[0] == 0
    path = tmp_path / f"{role}.toml"
    path.write_text("listen_adresses = []\n" + path.read_text())
    code, output = run([f"hypha-{role}", "--config", path.name, "--validate"], tmp_path)
    assert (code, output.count("\n")) == (2, 1), output
    assert "listen_adresses" in output
    assert f"{role}.toml" in output
    assert "Traceback" not in output


def test_a_syntax_error_is_named_with_its_line(tmp_path):
    (tmp_path / "bad.toml").write_text('cert_pem = "a"\nkey_pem = \n')
    code, output = run(["hypha-worker", "run", "-c", "bad.toml"], tmp_path)
    assert (code, "bad.toml:2" in output, output.count("\n")) == (2, True, 1), output


def test_a_missing_certificate_is_named_and_nothing_starts(tmp_path):
    assert run(["hypha-gateway", "init"], tmp_path)[0] == 0
    code, output = run(["hypha-gateway", "run", "-c", "gateway.toml"], tmp_path)
    assert (code, "cert_pem" in output, "gateway.pem" in output) == (2, True, True), output


def gateway(on_stage, pki, port):
    path = on_stage.directory / "gateway.toml"
    path.write_text(pki.node("gateway", ["gateway"]).toml() + f'listen_addresses = ["/ip4/127.0.0.1/tcp/{port}"]\n')
    program = on_stage.start("gateway", ["hypha-gateway", "run", "-c", path.name])
    program.wait_for("Gateway ready")
    return program


def worker(on_stage, authority, name, port):
    path = on_stage.directory / f"{name}.toml"
    path.write_text(
        authority.node(name, ["worker"]).toml()
        + f'gateway_addresses = ["/ip4/127.0.0.1/tcp/{port}"]\nlisten_addresses = ["/ip4/127.0.0.1/tcp/0"]\n'
        + f'work_dir = "{name}"\n'
    )
    return on_stage.start(name, ["hypha-worker", "run", "-c", path.name])


def probe(on_stage, name, port):
    address = f"/ip4/127.0.0.1/tcp/{port}"
    code, output = run(["hypha-worker", "probe", "-c", f"{name}.toml", address, "--json"], on_stage.directory)
    return code, json.loads(output.splitlines()[-1])


def test_a_stranger_is_refused_on_both_sides_and_harms_nobody(on_stage, pki, foreign_pki):
    port = free_port()
    ours = gateway(on_stage, pki, port)
    member = worker(on_stage, pki, "member", port)
    member.wait_for("Gateway connected")
    stranger = worker(on_stage, foreign_pki, "stranger", port)

    # The stranger believes another root, so it is the first to hang up; the gateway hears why.
    assert "certificate" in stranger.wait_for("No gateway reachable").lower()
    assert "certificate" in ours.wait_for("refused").lower()

    code, said = probe(on_stage, "stranger", port)
    assert (code, said["healthy"], "certificate" in said["reason"].lower()) == (1, False, True), said
    code, said = probe(on_stage, "member", port)
    assert (code, said["healthy"], said["role"]) == (0, True, "gateway"), said

    assert {program.name: program.stop() for program in (ours, member, stranger)} == {
        "gateway": 0,
        "member": 0,
        "stranger": 0,
    }
    assert ours.errors() + member.errors() == []


def test_a_probe_of_nobody_is_unhealthy(on_stage, pki):
    port = free_port()
    worker(on_stage, pki, "member", port)
    code, said = probe(on_stage, "member", port)
    assert (code, said["healthy"]) == (1, False)
    assert str(port) in said["reason"] or "refused" in said["reason"].lower()


def test_a_port_that_is_taken_is_named(on_stage, pki):
    port = free_port()
    gateway(on_stage, pki, port)
    code, output = run(["hypha-gateway", "run", "-c", "gateway.toml"], on_stage.directory)
    last = output.splitlines()[-1]
    assert (code, "listen_addresses" in last, str(port) in last, "Traceback" in output) == (2, True, True, False), (
        output
    )


def test_a_worker_without_a_gateway_goes_on_trying_and_says_so_once(on_stage, pki):
    port = free_port()
    member = worker(on_stage, pki, "member", port)
    member.wait_for("No gateway reachable")
    gateway(on_stage, pki, port)
    member.wait_for("Gateway connected")
    assert sum("No gateway reachable" in line for line in member.lines) == 1
    assert member.stop() == 0
