"""Keys that stay private, and certificates that OpenSSL accepts for what they are for and nothing else."""

import datetime as dt
import hashlib
import ipaddress
import ssl
import stat
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtailor import pki
from fedtailor.errors import ConfigError, WireError

HOSTS = ["hub.example.org", "localhost", "127.0.0.1", "::1"]
PEM = serialization.Encoding.PEM


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two consortia, each with a server and a site."""
    root = tmp_path_factory.mktemp("pki")
    for name in ("ours", "theirs"):
        pki.make_ca(root / name, f"{name} CA")
        pki.issue(root / name, root / name, "server", name, server=True, hosts=HOSTS)
        pki.issue(root / name, root / name / "kit", "site", "va", server=False, hosts=[])
    return root


def read(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def write_key(path, key, protection=None):
    path.write_bytes(
        key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, protection or serialization.NoEncryption())
    )
    path.chmod(0o600)
    return path


def context(side, ca, stem):
    made = ssl.SSLContext(side)
    made.load_verify_locations(ca / "ca.pem")
    made.load_cert_chain(stem.with_suffix(".pem"), stem.with_suffix(".key"))
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    return made


def handshake(ca, server, client, host="localhost", server_ca=None):
    """Mutual TLS without a network: raises what either side would not accept."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = context(ssl.PROTOCOL_TLS_CLIENT, ca, client)
    answering = context(ssl.PROTOCOL_TLS_SERVER, server_ca or ca, server)
    sides = [
        asking.wrap_bio(to_client, to_server, server_hostname=host),
        answering.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for side in list(sides):
            try:
                side.do_handshake()
                sides.remove(side)
            except ssl.SSLWantReadError:
                pass
    assert not sides


@pytest.mark.parametrize("host", HOSTS)
def test_a_server_and_a_site_of_one_consortium_accept_each_other_by_every_name(made, host):
    handshake(made / "ours", made / "ours" / "server", made / "ours" / "kit" / "site", host)
    handshake(made / "ours" / "kit", made / "ours" / "server", made / "ours" / "kit" / "site", host)


@pytest.mark.parametrize("host", ["evil.example.org", "127.0.0.2", "va", "ours", "sub.hub.example.org"])
def test_a_server_is_not_accepted_by_another_name(made, host):
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(made / "ours", made / "ours" / "server", made / "ours" / "kit" / "site", host)


@pytest.mark.parametrize(
    ("server", "client", "host"),
    [("kit/site", "kit/site", "va"), ("server", "server", "localhost")],
    ids=["a site as a server", "a server as a site"],
)
def test_a_certificate_serves_one_purpose(made, server, client, host):
    ours = made / "ours"
    with pytest.raises(ssl.SSLCertVerificationError, match="unsuitable certificate purpose"):
        handshake(ours, ours / server, ours / client, host)


def test_another_consortium_is_not_trusted_by_either_side(made):
    ours, theirs = made / "ours", made / "theirs"
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        handshake(ours, theirs / "server", ours / "kit" / "site")
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        handshake(ours, ours / "server", theirs / "kit" / "site")


def test_certificates_say_what_they_are(made):
    ca, server, site = (read(made / "ours" / name) for name in ("ca.pem", "server.pem", "kit/site.pem"))
    for certificate in (ca, server, site):
        certificate.verify_directly_issued_by(ca)
        assert isinstance(certificate.public_key().curve, ec.SECP384R1), "Flower takes NIST curves only"
    constraints = [c.extensions.get_extension_for_class(x509.BasicConstraints) for c in (ca, server, site)]
    assert [(c.value.ca, c.value.path_length, c.critical) for c in constraints] == [
        (True, 0, True),
        (False, None, True),
        (False, None, True),
    ]
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign and usage.crl_sign and not usage.digital_signature
    purposes = [list(c.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) for c in (server, site)]
    assert purposes == [[ExtendedKeyUsageOID.SERVER_AUTH], [ExtendedKeyUsageOID.CLIENT_AUTH]]
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == HOSTS[:2]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(host) for host in HOSTS[2:]]
    assert [c.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value for c in (ca, server, site)] == [
        "ours CA",
        "ours",
        "va",
    ]
    assert len({c.serial_number for c in (ca, server, site)}) == 3


@pytest.mark.parametrize(("name", "days"), [("ca.pem", 3650), ("server.pem", 30), ("kit/site.pem", 30)])
def test_a_certificate_is_good_from_now_with_slack_for_clocks(made, name, days):
    certificate = read(made / "ours" / name)
    lasts = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert lasts == dt.timedelta(days=days, minutes=5)
    assert certificate.not_valid_before_utc < dt.datetime.now(dt.UTC) - dt.timedelta(minutes=4)


def test_keys_are_readable_by_their_owner_only(made):
    ours = made / "ours"
    assert {mode(path) for path in (ours / "ca.key", ours / "server.key", ours / "kit" / "site.key")} == {0o600}
    assert {mode(path) for path in (ours, ours / "kit")} == {0o700}
    assert sorted(path.name for path in (ours / "kit").iterdir()) == ["ca.pem", "site.key", "site.pem"]
    assert (ours / "kit" / "ca.pem").read_bytes() == (ours / "ca.pem").read_bytes()


def test_each_certificate_belongs_to_the_key_beside_it_and_no_two_share_one(made):
    seen = set()
    for stem in ("ours/ca", "ours/server", "ours/kit/site", "theirs/kit/site"):
        key = pki.load_key(made / f"{stem}.key").public_key()
        assert key == pki.public_key(made / f"{stem}.pem")
        seen.add(key.public_numbers())
    assert len(seen) == 4


def test_an_existing_ca_is_never_replaced(tmp_path):
    pki.make_ca(tmp_path, "one")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"ca\.key exists: this consortium has a CA already; choose another --home"):
        pki.make_ca(tmp_path, "two")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("shared", [0o640, 0o604, 0o620, 0o601, 0o666])
def test_a_key_that_others_can_reach_is_refused_with_the_command_to_run(tmp_path, shared):
    path = write_key(tmp_path / "site.key", ec.generate_private_key(ec.SECP384R1()))
    pki.load_key(path)
    path.chmod(shared)
    with pytest.raises(ConfigError, match=f"can be read by others; run: chmod 600 {path}"):
        pki.load_key(path)


def test_a_ca_whose_key_others_can_reach_issues_nothing(tmp_path):
    pki.make_ca(tmp_path / "ca", "one")
    (tmp_path / "ca" / "ca.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        pki.issue(tmp_path / "ca", tmp_path / "kit", "site", "va", server=False, hosts=[])
    assert not (tmp_path / "kit").exists()


def test_what_is_not_a_key_is_named(tmp_path):
    good = ec.generate_private_key(ec.SECP384R1())
    (tmp_path / "text.key").write_text("not a key")
    (tmp_path / "text.key").chmod(0o600)
    write_key(tmp_path / "locked.key", good, serialization.BestAvailableEncryption(b"word"))
    write_key(tmp_path / "other.key", ed25519.Ed25519PrivateKey.generate())
    for name, words in [
        ("nothing.key", "is not a readable private key: .*No such file"),
        ("text.key", "is not a readable private key"),
        ("locked.key", "is not a readable private key: .*encrypted"),
        ("other.key", "is not an elliptic-curve key"),
    ]:
        with pytest.raises(ConfigError, match=f"{name} {words}"):
            pki.load_key(tmp_path / name)


def test_a_fingerprint_is_sha_256_in_groups_to_read_aloud(made):
    path = made / "ours" / "server.pem"
    der = read(path).public_bytes(serialization.Encoding.DER)
    assert pki.fingerprint(read(path)).replace(" ", "") == hashlib.sha256(der).hexdigest()
    assert [len(group) for group in pki.fingerprint(read(path)).split()] == [4] * 16


def test_a_certificate_is_checked_for_ca_key_and_name(made, tmp_path):
    ours, key = made / "ours", pki.new_key().public_key()
    good, ca = pki.sign(ours, key, "va", "site", days=1), (ours / "ca.pem").read_text()
    pki.check_issued(good, ca, key, "va")
    theirs = pki.sign(made / "theirs", key, "va", "site", days=1)
    for pem, of, name, words in [
        (theirs, key, "va", "its CA has not signed"),
        ("nothing", key, "va", "its CA has not signed"),
        (good, pki.new_key().public_key(), "va", "that is not va's"),
        (good, key, "b", "that is not b's"),
    ]:
        with pytest.raises(WireError, match=words) as error:
            pki.check_issued(pem, ca, of, name)
        assert error.value.code == "certificate"


def test_an_invitation_says_what_it_is_and_is_a_peer_like_a_site(made):
    ours, key = made / "ours", pki.new_key()
    write_key(ours / "guest.key", key)
    (ours / "guest.pem").write_text(pki.sign(ours, key.public_key(), "va", "invitation", days=1))
    assert pki.is_invitation(read(ours / "guest.pem")) and pki.common_name(read(ours / "guest.pem")) == "va"
    assert not pki.is_invitation(read(ours / "kit" / "site.pem")) and not pki.is_invitation(read(ours / "server.pem"))
    handshake(ours, ours / "server", ours / "guest")


@pytest.mark.parametrize("days", [30, 9 / 86400])
def test_a_certificate_is_due_at_two_thirds_of_the_life_it_has_or_should_have(made, days):
    now = time.time()
    certificate = pki.read_certificate(pki.sign(made / "ours", pki.new_key().public_key(), "va", "site", days=days))
    life = days * 86400
    assert pki.ends(certificate) == pytest.approx(now + life, abs=3)
    assert pki.due(certificate) == pytest.approx(now + 2 / 3 * life, abs=3)
    assert pki.due(certificate, 0.5, 2 * days) == pytest.approx(now + life / 2, abs=3)
    assert pki.due(certificate, days=days / 3) == pytest.approx(now + 2 / 9 * life, abs=3)


def test_equal_keys_have_equal_texts_and_fingerprints():
    key = pki.new_key()
    again = pki.read_key_text(pki.key_text(key.public_key()))
    assert again == key.public_key() and pki.fingerprint(again) == pki.fingerprint(key.public_key())
    der = again.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert pki.fingerprint(again).replace(" ", "") == hashlib.sha256(der).hexdigest()
