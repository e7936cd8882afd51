"""hypha-certutil: from nothing to a network's certificates, and what it refuses."""

import json
import stat
from pathlib import Path

import pytest

from hypha.certutil import PROGRAM, app
from hypha.cli_app import main
from hypha.config import NodeConfig
from hypha.errors import ConfigError
from hypha.pki import Identity, load_identity


@pytest.fixture
def certutil(capsys):
    """Run one command; returns its output, or its single line of complaint with the exit code in front."""

    def certutil(*arguments: object) -> str:
        with pytest.raises(SystemExit) as left:
            main(app, PROGRAM, [str(each) for each in arguments])
        output, complaint = capsys.readouterr()
        return f"{left.value.code} {complaint.strip()}" if left.value.code else output

    return certutil


@pytest.fixture
def certs(certutil, tmp_path) -> Path:
    """Return a directory with a root, an organisation and the worker w."""
    out = tmp_path / "certs"
    certutil("root", "--name", "Acme root", "--out", out)
    certutil("org", "--name", "Acme", "--out", out)
    certutil("node", "--name", "w", "--role", "worker", "--out", out)
    return out


def load(certs: Path, name: str = "w", crls_pem: tuple[Path, ...] = ()) -> Identity:
    pem, key, trust = (certs / file for file in (f"{name}.pem", f"{name}-key.pem", "trust.pem"))
    return load_identity(NodeConfig(cert_pem=pem, key_pem=key, trust_pem=trust, crls_pem=crls_pem))


def test_three_commands_make_a_node_that_starts_without_a_warning(certs):
    identity = load(certs)
    assert (identity.subject, identity.roles, identity.warnings) == ("CN=w", {"worker"}, [])


def test_keys_are_0600_and_the_rest_0644(certs):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in certs.iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == {"root-key.pem", "org-key.pem", "w-key.pem"}
    assert {name for name, mode in modes.items() if mode == 0o644} == {"root.pem", "org.pem", "trust.pem", "w.pem"}


def test_written_files_are_printed_one_a_line(certs, certutil):
    output = certutil("node", "--name", "d", "--role", "data", "--role", "worker", "--out", certs)
    assert output.splitlines() == [str(certs / "d.pem"), str(certs / "d-key.pem")]


def test_authorities_and_nodes_may_live_in_directories_of_their_own(certutil, tmp_path):
    root, org, node = tmp_path / "root", tmp_path / "org", tmp_path / "node"
    certutil("root", "--out", root)
    certutil("org", "--root", root, "--out", org)
    certutil("node", "--name", "g", "--role", "gateway", "--org", org, "--out", node)
    assert sorted(path.name for path in node.iterdir()) == ["g-key.pem", "g.pem", "trust.pem"]
    assert load(node, "g").roles == {"gateway"}


@pytest.mark.parametrize(
    "command", [("root",), ("org",), ("node", "--name", "w", "--role", "worker")], ids=["root", "org", "node"]
)
def test_nothing_is_overwritten_without_force(certs, certutil, command):
    before = {path: path.read_bytes() for path in certs.iterdir()}
    assert certutil(*command, "--out", certs).endswith("exists; --force overwrites it")
    assert {path: path.read_bytes() for path in certs.iterdir()} == before
    assert not certutil(*command, "--out", certs, "--force").startswith("2 ")
    assert {path: path.read_bytes() for path in certs.iterdir()} != before


def test_one_existing_file_keeps_the_others_from_being_written(certs, certutil):
    (certs / "w.pem").unlink()
    said = certutil("node", "--name", "w", "--role", "worker", "--out", certs)
    assert said == f"2 hypha-certutil: {certs}/w-key.pem exists; --force overwrites it"
    assert not (certs / "w.pem").exists()


def test_show_says_who_it_is_in_json(certs, certutil):
    leaf, org = map(json.loads, certutil("show", certs / "w.pem", "--json").splitlines())
    assert (leaf["kind"], leaf["subject"], leaf["issuer"]) == ("node", "CN=w", "CN=Acme")
    assert (leaf["roles"], leaf["peer_id"]) == (["worker"], load(certs).peer_id)
    assert (org["kind"], org["subject"], org["issuer"]) == ("authority", "CN=Acme", "CN=Acme root")


def test_show_says_the_same_in_words(certs, certutil):
    output = certutil("show", certs / "w.pem")
    assert f"peer_id      {load(certs).peer_id}" in output
    assert "roles        worker" in output


def test_node_revoked_by_its_file_does_not_start(certs, certutil):
    certutil("crl", "--out", certs)
    load(certs, crls_pem=(certs / "crls.pem",))
    certutil("crl", "--out", certs, "--revoke", certs / "w.pem")
    with pytest.raises(ConfigError, match="CN=w or its authority is revoked"):
        load(certs, crls_pem=(certs / "crls.pem",))


@pytest.mark.parametrize(("victim", "options"), [("w", []), ("org", ["--issuer", "root"])])
def test_node_is_revoked_by_serial_its_own_or_its_organisations(certs, certutil, victim, options):
    serial = json.loads(certutil("show", certs / f"{victim}.pem", "--json").splitlines()[0])["serial"]
    certutil("crl", "--out", certs, "--revoke", serial, *options)
    with pytest.raises(ConfigError, match="revoked"):
        load(certs, crls_pem=(certs / "crls.pem",))


def test_revocations_accumulate_and_list_numbers_rise(certs, certutil):
    for serial in ("aa", "bb", "AA"):
        certutil("crl", "--out", certs, "--revoke", serial)
    root, org = map(json.loads, certutil("show", certs / "crls.pem", "--json").splitlines())
    assert (root["number"], root["revoked"]) == (3, [])
    assert (org["number"], org["revoked"]) == (3, ["aa", "bb"])


def test_organisation_without_the_roots_key_renews_its_own_list_beside_the_roots(certs, certutil):
    certutil("crl", "--out", certs)
    (certs / "root-key.pem").unlink()
    certutil("crl", "--out", certs, "--revoke", "aa")
    root, org = map(json.loads, certutil("show", certs / "crls.pem", "--json").splitlines())
    assert (root["number"], org["number"], org["revoked"]) == (1, 2, ["aa"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("node", "--name", "x", "--role", "boss"), "no such role: boss (roles are gateway, scheduler, worker, data)"),
        (("node", "--name", "../x", "--role", "worker"), "`--name`: '../x' cannot name a node's files"),
        (("node", "--name", "trust", "--role", "worker"), "`--name`: 'trust' cannot name a node's files"),
        (("org", "--name", "x" * 65, "--force"), "a name has 1 to 64 characters, not 65"),
        (("crl", "--revoke", "no-serial"), "`--revoke`: 'no-serial' is neither a file nor a serial"),
        (("crl", "--revoke", "aa", "--issuer", "x"), "`--issuer`: 'x' has no key in the directory (there: root, org)"),
        (("crl", "--revoke", "{certs}/root-key.pem"), "holds no readable PEM certificate"),
        (("show", "{certs}/nothing.pem"), "`FILE`: no such file: {certs}/nothing.pem"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(certs, certutil, arguments, complaint):
    filled = [each.replace("{certs}", str(certs)) for each in arguments]
    out = [] if "show" in filled else ["--out", certs]
    said = certutil(*filled, *out)
    assert said.startswith("2 hypha-certutil: ")
    assert complaint.replace("{certs}", str(certs)) in said
    assert len(said.splitlines()) == 1


def test_stranger_cannot_be_revoked_nor_a_damaged_index_ignored(certs, certutil, foreign_pki):
    stranger = foreign_pki.node("s", ["worker"]).cert_pem
    assert "was issued by no authority in the directory" in certutil("crl", "--out", certs, "--revoke", stranger)
    (certs / "org-revoked.json").write_text("{")
    assert "org-revoked.json is damaged" in certutil("crl", "--out", certs)
    assert not (certs / "crls.pem").exists()


def test_authority_with_another_ones_key_signs_nothing(certs, certutil):
    (certs / "org-key.pem").write_bytes((certs / "root-key.pem").read_bytes())
    said = certutil("node", "--name", "x", "--role", "worker", "--out", certs)
    assert said == f"2 hypha-certutil: `--org`: org-key.pem is not the key of org.pem in {certs}"
