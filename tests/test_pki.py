"""Certificates: what a node's files must be, and what a handshake makes of a peer's."""

import ssl
import stat
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.peer.id import ID

from hypha.errors import ConfigError, RemoteProtocolError
from hypha.pki import Identity, issue_node, issue_org, issue_root, load_identity, peer_of, save

NOW = datetime.now(UTC)


def shake_hands(server: Identity, client: Identity) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Run one TLS handshake in memory; returns (server's side, client's side)."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    dialled = client.client_context("hypha").wrap_bio(to_client, to_server, server_side=False)
    accepted = server.server_context("hypha").wrap_bio(to_server, to_client, server_side=True)
    waiting = [dialled, accepted]
    for _ in range(8):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                continue
    assert not waiting
    return accepted, dialled


def with_crls(pki, files, revoked=(), **options):
    path = files.directory / "crls.pem"
    pki.crls(path, dict.fromkeys(revoked, NOW), **options)
    return msgspec.structs.replace(files, crls_pem=(path,))


def serial_of(identity: Identity) -> int:
    accepted, _ = shake_hands(identity, identity)
    return peer_of(accepted.getpeercert(binary_form=True)).serial


def refusal(files) -> str:
    with pytest.raises(ConfigError) as caught:
        load_identity(files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- who a node is ---------------------------------------------------------------------------------------------------


def test_peer_id_is_the_one_libp2p_derives_from_the_same_key(pki):
    identity = pki.node("w", ["worker"]).identity()
    theirs = ID.from_pubkey(Ed25519PrivateKey.from_bytes(identity.private_key).get_public_key())
    assert identity.peer_id == str(theirs)


def test_roles_are_those_in_the_certificate(pki):
    identity = pki.node("both", ["worker", "data"]).identity()
    assert identity.roles == {"worker", "data"}
    assert identity.subject == "CN=both"
    assert identity.warnings == []


def test_both_sides_of_a_handshake_learn_the_other_ones_identity(pki):
    server, client = pki.node("s", ["scheduler"]).identity(), pki.node("w", ["worker"]).identity()
    accepted, dialled = shake_hands(server, client)
    seen_by_server = peer_of(accepted.getpeercert(binary_form=True))
    seen_by_client = peer_of(dialled.getpeercert(binary_form=True))
    assert (seen_by_server.peer_id, seen_by_server.roles) == (client.peer_id, {"worker"})
    assert (seen_by_client.peer_id, seen_by_client.roles) == (server.peer_id, {"scheduler"})
    assert (accepted.version(), dialled.selected_alpn_protocol()) == ("TLSv1.3", "hypha")


def test_organisations_under_one_root_trust_each_other(pki, tmp_path):
    second = type(pki)(tmp_path)
    second.root = pki.root
    second.org = issue_org(pki.root, "Second org")
    accepted, _ = shake_hands(pki.node("a", ["worker"]).identity(), second.node("b", ["data"]).identity())
    assert peer_of(accepted.getpeercert(binary_form=True)).issuer == "CN=Second org"


def test_context_never_resumes_and_never_goes_below_tls_1_3(pki):
    identity = pki.node("w", ["worker"]).identity()
    server, client = identity.server_context("a", "b"), identity.client_context("a")
    assert server.num_tickets == 0
    for context in (server, client):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.verify_flags & ssl.VERIFY_X509_STRICT


# --- who is refused at a handshake -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stranger_dials", [True, False])
def test_peer_of_another_network_is_refused_even_when_its_authorities_bear_our_names(pki, foreign_pki, stranger_dials):
    ours, stranger = pki.node("w", ["worker"]).identity(), foreign_pki.node("w", ["worker"]).identity()
    sides = (ours, stranger) if stranger_dials else (stranger, ours)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(*sides)


def test_peer_without_a_certificate_is_refused(pki):
    identity = pki.node("w", ["worker"]).identity()
    naked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    naked.check_hostname = False
    naked.verify_mode = ssl.CERT_NONE
    identity.client_context = lambda *_: naked
    with pytest.raises(ssl.SSLError, match=r"(?i)peer did not return a certificate"):
        shake_hands(identity, identity)


def test_revoked_peer_is_refused_from_the_first_handshake_after_a_reload(pki):
    victim = pki.node("victim", ["worker"]).identity()
    files = with_crls(pki, pki.node("w", ["worker"]))
    identity = files.identity()
    accepted, _ = shake_hands(identity, victim)
    peer = peer_of(accepted.getpeercert(binary_form=True))
    assert not identity.is_revoked(peer)
    pki.crls(files.crls_pem[0], {peer.serial: NOW}, number=2)
    assert identity.reload_crls()
    assert identity.is_revoked(peer)
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        shake_hands(identity, victim)
    assert not identity.reload_crls()


def test_peer_whose_authority_has_no_list_is_refused_where_lists_are_configured(pki, tmp_path):
    second = type(pki)(tmp_path)
    second.root, second.org = pki.root, issue_org(pki.root, "Listless org")
    identity = with_crls(pki, pki.node("w", ["worker"])).identity()
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get certificate CRL"):
        shake_hands(identity, second.node("b", ["worker"]).identity())


def test_unusable_new_list_leaves_the_old_one_in_force(pki):
    files = with_crls(pki, pki.node("w", ["worker"]), revoked=[77])
    identity = files.identity()
    files.crls_pem[0].write_text("not a list")
    with pytest.raises(ConfigError, match="crls_pem"):
        identity.reload_crls()
    peer = peer_of(shake_hands(identity, identity)[0].getpeercert(binary_form=True))
    assert identity.is_revoked(msgspec.structs.replace(peer, serial=77))


def test_new_list_that_revokes_this_node_and_others_is_in_force_though_it_raises(pki):
    victim = pki.node("victim", ["worker"]).identity()
    files = with_crls(pki, pki.node("w", ["worker"]))
    identity = files.identity()
    peer = peer_of(shake_hands(identity, victim)[0].getpeercert(binary_form=True))
    pki.crls(files.crls_pem[0], {peer.serial: NOW, serial_of(identity): NOW}, number=2)
    with pytest.raises(ConfigError, match="`cert_pem`: CN=w or its authority is revoked"):
        identity.reload_crls()
    assert identity.is_revoked(peer)


def test_authority_is_no_peer(pki):
    der = pki.org.certificate.public_bytes(Encoding.DER)
    with pytest.raises(RemoteProtocolError, match="certificate authority's"):
        peer_of(der)


def test_peer_with_another_kind_of_key_is_refused(pki):
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "p256")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(pki.org.certificate.subject)
    builder = builder.public_key(generate_private_key(SECP256R1()).public_key()).serial_number(1)
    certificate = builder.not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1)).sign(pki.org.key, None)
    with pytest.raises(RemoteProtocolError, match="not Ed25519"):
        peer_of(certificate.public_bytes(Encoding.DER))


def test_a_certificate_is_read_once_and_every_other_one_anew(pki):
    first, second = (pki.node(name, ["worker"]).identity() for name in ("first", "second"))
    accepted, dialled = shake_hands(first, second)
    theirs, ours = (each.getpeercert(binary_form=True) for each in (accepted, dialled))
    assert first.peer_of(ours) is second.peer_of(bytes(bytearray(ours)))
    assert (first.peer_of(ours).subject, first.peer_of(theirs).subject) == ("CN=first", "CN=second")
    for _ in range(2):
        with pytest.raises(RemoteProtocolError, match="peer certificate refused"):
            first.peer_of(b"\x30\x03\x02\x01\x01")


def test_garbage_is_no_peer():
    with pytest.raises(RemoteProtocolError, match="peer certificate refused"):
        peer_of(b"\x30\x03\x02\x01\x01")


# --- bad files: ConfigError with the key and the file ----------------------------------------------------------------


@pytest.mark.parametrize("key", ["cert_pem", "key_pem", "trust_pem"])
@pytest.mark.parametrize(("content", "reason"), [(None, "no such file"), (b"rubbish", "no readable PEM")])
def test_missing_or_garbled_file_is_named_with_its_key(pki, key, content, reason):
    files = pki.node("w", ["worker"])
    path = files.directory / "bad.pem"
    if content is not None:
        path.write_bytes(content)
    message = refusal(msgspec.structs.replace(files, **{key: path}))
    assert message.startswith(f"`{key}`: ")
    assert reason in message
    assert str(path) in message


def test_directory_in_place_of_a_file_is_named(pki):
    files = pki.node("w", ["worker"])
    message = refusal(msgspec.structs.replace(files, trust_pem=files.directory))
    assert message == f"`trust_pem`: cannot read {files.directory}: Is a directory"


def test_expired_certificate_is_named_with_its_end(pki):
    files = pki.node("old", ["worker"], start=NOW - timedelta(days=3), days=2)
    ended = NOW - timedelta(days=1)
    assert refusal(files) == f"`cert_pem`: {files.cert_pem}: CN=old expired on {ended:%Y-%m-%d %H:%M} UTC"


def test_certificate_of_tomorrow_is_named_with_its_beginning(pki):
    files = pki.node("young", ["worker"], start=NOW + timedelta(days=1))
    assert "CN=young is not valid before" in refusal(files)


def test_key_of_another_node_is_named(pki):
    files, other = pki.node("w", ["worker"]), pki.node("x", ["worker"])
    message = refusal(msgspec.structs.replace(files, key_pem=other.key_pem))
    assert message == f"`key_pem`: {other.key_pem} is not the key of `cert_pem` {files.cert_pem}"


@pytest.mark.parametrize(
    ("protection", "reason"),
    [(NoEncryption(), "the key is not Ed25519"), (BestAvailableEncryption(b"x"), "is encrypted")],
)
def test_key_of_another_kind_or_under_a_password_is_named(pki, protection, reason):
    files = pki.node("w", ["worker"])
    key = generate_private_key(SECP256R1())
    files.key_pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection))
    assert refusal(files).startswith(f"`key_pem`: {files.key_pem}")
    assert reason in refusal(files)


def test_certificate_of_another_network_is_named(pki, foreign_pki):
    files, foreign = pki.node("w", ["worker"]), foreign_pki.node("w", ["worker"])
    message = refusal(msgspec.structs.replace(files, trust_pem=foreign.trust_pem))
    assert message.startswith(f"`trust_pem`: {foreign.trust_pem} does not vouch for CN=w")


def test_certificate_without_its_organisation_does_not_chain(pki):
    issued = issue_node(pki.org, "alone", ["worker"])
    files = pki.write("alone", issued)
    save(files.cert_pem, issued.certificate_pem(), force=True)
    assert "(chain ends at issuer CN=Test org)" in refusal(files)


def test_authority_is_no_node(pki):
    files = pki.write("org", pki.org)
    assert "certificate authority's, not a node's" in refusal(files)


def test_node_certificate_is_no_trust_anchor(pki):
    files = pki.node("w", ["worker"])
    assert "is not a certificate authority" in refusal(msgspec.structs.replace(files, trust_pem=files.cert_pem))


def test_organisation_cannot_make_another_authority(pki):
    rogue = type(pki)(pki.node("r", ["worker"]).directory)
    rogue.root, rogue.org = pki.root, issue_org(pki.org, "Rogue org")
    files = rogue.node("w", ["worker"])
    with files.cert_pem.open("ab") as file:
        file.write(pki.org.certificate_pem())
    assert "path length constraint exceeded" in refusal(files)


def test_revoked_node_does_not_start(pki):
    files = pki.node("w", ["worker"])
    revoked = with_crls(pki, files, revoked=[serial_of(files.identity())])
    assert refusal(revoked) == f"`cert_pem`: CN=w or its authority is revoked by {revoked.crls_pem[0]}"


def test_node_of_a_revoked_organisation_does_not_start(pki):
    revoked = with_crls(pki, pki.node("w", ["worker"]), revoked=[pki.org.certificate.serial_number])
    assert "CN=w or its authority is revoked" in refusal(revoked)


def test_each_issuing_authority_needs_a_list(pki):
    files = with_crls(pki, pki.node("w", ["worker"]))
    only_root = files.crls_pem[0].read_bytes().split(b"-----END X509 CRL-----\n")[0] + b"-----END X509 CRL-----\n"
    files.crls_pem[0].write_bytes(only_root)
    assert refusal(files) == f"`crls_pem`: no revocation list of CN=Test org in {files.crls_pem[0]}"


def test_list_of_a_namesake_is_refused(pki, foreign_pki):
    files = pki.node("w", ["worker"])
    assert "is signed by another key" in refusal(with_crls(foreign_pki, files))


def test_expired_list_is_named(pki):
    files = with_crls(pki, pki.node("w", ["worker"]), start=NOW - timedelta(days=3), days=1)
    assert refusal(files) == f"`crls_pem`: {files.crls_pem[0]}: CRL has expired"


# --- warnings --------------------------------------------------------------------------------------------------------


def test_key_that_others_may_read_is_warned_about(pki):
    files = pki.node("w", ["worker"])
    files.key_pem.chmod(0o644)
    (warning,) = files.identity().warnings
    assert warning == f"`key_pem`: {files.key_pem} is open to every user of this machine (mode 0644); chmod 600"


def test_certificate_and_list_about_to_end_are_warned_about(pki):
    files = with_crls(pki, pki.node("brief", ["worker"], days=2), days=1)
    warnings = files.identity().warnings
    assert [warning.split(" ends on ")[0] for warning in warnings] == [
        "the certificate of CN=brief",
        f"`crls_pem`: {files.crls_pem[0]}: the list of CN=Test root",
        f"`crls_pem`: {files.crls_pem[0]}: the list of CN=Test org",
    ]


# --- issuing ---------------------------------------------------------------------------------------------------------


def test_keys_are_private_and_certificates_are_not(pki):
    files = pki.node("w", ["worker"])
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (files.key_pem, files.cert_pem)]
    assert modes == [0o600, 0o644]


def test_existing_file_is_kept_unless_forced(tmp_path):
    save(tmp_path / "a", b"1")
    with pytest.raises(ConfigError, match=r"a exists; --force overwrites it"):
        save(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"
    save(tmp_path / "a", b"2", force=True)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"2")]


def test_file_that_cannot_be_written_is_named_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*/a: "):
        save(tmp_path / "a", b"1", force=True)
    (tmp_path / "b").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot write .*/b/c: File exists"):
        save(tmp_path / "b" / "c", b"1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_root_may_sign_organisations_and_organisations_only_nodes(pki):
    constraints = [
        issued.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        for issued in (pki.root, pki.org, issue_node(pki.org, "n", ["data"]))
    ]
    assert [(each.critical, each.value.ca, each.value.path_length) for each in constraints] == [
        (True, True, 1),
        (True, True, 0),
        (True, False, None),
    ]


def test_node_never_outlives_its_organisation():
    org = issue_org(issue_root("r", days=10), "o", days=5)
    node = issue_node(org, "n", ["data"], days=100)
    assert node.certificate.not_valid_after_utc == org.certificate.not_valid_after_utc


@pytest.mark.parametrize(("name", "roles"), [("", ["worker"]), ("x" * 65, ["worker"]), ("n", ["boss"]), ("n", [])])
def test_name_and_roles_are_checked_before_anything_is_signed(pki, name, roles):
    with pytest.raises(ConfigError):
        issue_node(pki.org, name, roles)


def test_node_signs_nothing(pki):
    node = issue_node(pki.org, "n", ["worker"])
    with pytest.raises(ConfigError, match="CN=n is not a certificate authority"):
        issue_node(node, "m", ["worker"])
