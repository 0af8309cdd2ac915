"""Who may ask what on the public port, over real TLS: invitations enrol, sites do the rest, and each only as itself."""

import asyncio
import base64
import ssl
import time

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedtailor import pki, store
from fedtailor.client.connection import SAID
from fedtailor.client.fleet import Fleet
from fedtailor.client.joining import prepare, request_of
from fedtailor.client.site import Home as SiteHome
from fedtailor.errors import ConnectionFailed, StoreError
from fedtailor.invitation import ENROL, RENEW
from fedtailor.server import enrolment, roster
from fedtailor.server.listener import FLEET

REQUEST = pki.make_request(pki.new_key(), "whoever")
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH")
PULL = "/v1/fleet/pull-messages"


@pytest.fixture
def guest(hub):
    """Site b is invited: what it is about to ask, and a connection that its invitation opens."""
    it = prepare(SiteHome(hub.folder / "b"), roster.invite(hub.home, "b").text(), hub.settings())
    with hub.client(it.draft, "bootstrap") as client:
        yield it, client


def said(answer):
    return answer.status_code, answer.json()["error"]


def signed(key, name="a"):
    """The headers of Flower's node authentication."""
    made = httpx.Request("POST", "https://x/")

    class Context:
        request = made

    NodeAuthHttpInterceptor(key, key.public_key()).intercept(Context, lambda _: None)
    return {name: value for name, value in made.headers.items() if name not in ("host", "content-length")}


def test_an_invitation_opens_one_route_and_a_site_the_others(hub, guest):
    _, invited = guest
    with hub.client(hub.admit("a")) as site:
        for path in [*sorted(FLEET), "/health", ENROL, RENEW, "/", "/docs", "/v1/control/start-run"]:
            for method in METHODS:
                route = (method, path)
                seen = invited.request(*route).status_code
                assert seen == (400 if route == ("POST", ENROL) else 404), route
                status = site.request(*route).status_code
                if path == "/health" and method in ("GET", "HEAD"):
                    assert status == 200
                elif method == "POST" and path in FLEET | {RENEW}:
                    assert status in (400, 401), route
                else:
                    assert status == 404, route


def test_a_request_is_taken_once_approved_and_answered(hub, guest):
    it, client = guest
    request = request_of(it)
    for _ in range(2):
        assert client.post(ENROL, content=request).json() == {"certificate": None, "plans": None}
    assert said(client.post(ENROL, content=REQUEST)) == (403, "used")
    files = {path: path.read_bytes() for path in hub.home.sites.iterdir()}
    assert said(client.post(ENROL, content=REQUEST)) == (403, "used")
    assert {path: path.read_bytes() for path in hub.home.sites.iterdir()} == files, "nothing piles up"
    roster.approve(hub.home, "b", it.fingerprint)
    answer = client.post(ENROL, content=request).json()
    assert answer["plans"] == (hub.home.signing / "plans.pub").read_text()
    pki.check_issued(answer["certificate"], it.invitation.ca, pki.load_key(it.key).public_key(), "b")
    assert said(client.post(ENROL, content=REQUEST)) == (403, "used")


@pytest.mark.parametrize("end", ["denied", "replaced", "expired"])
def test_an_invitation_that_is_over_is_refused_on_the_connection_it_has(hub, guest, monkeypatch, end):
    it, client = guest
    assert client.post(ENROL, content=request_of(it)).status_code == 200
    if end == "expired":
        now = time.time()
        monkeypatch.setattr(enrolment.time, "time", lambda: now + 73 * 3600)
    else:
        roster.deny(hub.home, "b")
        if end == "replaced":
            roster.invite(hub.home, "b")
    word = "expired" if end == "expired" else "invitation"
    assert said(client.post(ENROL, content=request_of(it))) == (403, word)


def rsa_request():
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(pki.PEM)


MALFORMED = [b"", b"x", b"\xff\x00" * 100, b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----",
             REQUEST[:200].encode(), REQUEST.replace("M", "N").encode(), b"[" * 8000,
             pki.make_request(ec.generate_private_key(ec.SECP256R1()), "b").encode(), rsa_request()]  # fmt: skip


def test_what_is_no_request_gets_a_code_and_changes_nothing(hub, guest, caplog):
    it, invited = guest
    keys = hub.admit("a")
    before = (hub.home.sites / "b.json").read_bytes()
    with hub.client(keys) as site:
        for body in MALFORMED:
            assert said(invited.post(ENROL, content=body)) == (400, "request"), body
            assert said(site.post(RENEW, content=body)) == (400, "request"), body
    assert (hub.home.sites / "b.json").read_bytes() == before and not [r for r in caplog.records if r.exc_info]
    assert invited.post(ENROL, content=request_of(it)).status_code == 200


def test_a_body_of_unknown_or_great_length_is_refused_and_a_slow_one_given_up(hub, guest, monkeypatch):
    it, client = guest
    assert client.post(ENROL, content=b"x" * (enrolment.LIMIT + 1)).status_code == 413
    assert client.post(ENROL, content=iter([b"x"])).status_code == 413
    monkeypatch.setattr(enrolment, "PATIENCE_S", 0.05)
    context = ssl.create_default_context(cafile=str(it.draft / "ca.pem"))
    context.load_cert_chain(it.draft / "bootstrap.pem", it.draft / "bootstrap.key")
    host, port = hub.address.split(":")

    async def slow():
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        writer.write(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nhalf" % ENROL.encode())
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return answer

    assert asyncio.run(slow()).startswith(b"HTTP/1.1 408")


def test_a_full_disk_is_the_coordinators_own_trouble(hub, guest, monkeypatch):
    it, client = guest

    def full(*_, **__):
        raise StoreError("/srv/secret/place cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_text", full)
        answer = client.post(ENROL, content=request_of(it))
    assert said(answer) == (507, "store") and "secret" not in answer.text
    assert client.post(ENROL, content=request_of(it)).status_code == 200


# --- sites ---


def test_a_stolen_signature_is_of_no_use_with_another_certificate(hub):
    """B has A's whole key of node authentication, but not its certificate's; and A's header beside its own."""
    a, b = hub.admit("a"), hub.admit("b")
    thief = Fleet(hub.address, b)
    key = pki.load_key(a / "site.key")
    thief.client._interceptors, thief.public = (NodeAuthHttpInterceptor(key, key.public_key()),), pki.key_text(
        key.public_key()
    ).encode()  # fmt: skip
    with pytest.raises(ConnectionFailed, match="does not accept this site's signature"):
        thief.join(None)
    assert not hub.link.nodes()["a"].online
    own = base64.b64encode(pki.key_text(pki.public_key(b / "site.pem")).encode())
    theirs = base64.b64encode(thief.public)
    with hub.client(b) as client:
        for claimed in ([theirs], [theirs, own], [own, theirs], [own + b"="], []):
            headers = [("content-type", "application/protobuf"), *(("flwr-public-key", value) for value in claimed)]
            assert said(client.post(PULL, headers=headers)) == (401, "key"), claimed
    assert Fleet(hub.address, b).join(None), "with its own it may"


@pytest.mark.parametrize("daemon", ["up", "down"])
def test_a_revoked_site_is_refused_at_its_next_request_on_every_connection(hub, daemon):
    keys, others = hub.admit("a"), hub.admit("b")
    site, other = Fleet(hub.address, keys), Fleet(hub.address, others)
    assert site.join(None) and other.join(None) and site.receive() is None
    roster.revoke(hub.home, "a")
    if daemon == "up":
        with pytest.raises(ConnectionFailed) as error:
            site.receive()
        assert error.value.code == "revoked" and "revoked this site" in str(error.value) and site.node is None
        assert other.receive() is None
    else:  # a daemon that starts later
        again = enrolment.Gate(hub.home, hub.link.admit)
        again.look()
        assert list(again.admitted) == ["b"]
    with pytest.raises(ConnectionFailed) as error:
        Fleet(hub.address, keys).join(None)
    assert error.value.code == "revoked" and set(hub.link.nodes()) == {"b"}
    with hub.client(keys) as client:
        for route in (("GET", "/health"), ("POST", RENEW)):
            assert said(client.request(*route)) == (403, "revoked")
        assert said(client.post(PULL, headers=signed(pki.load_key(keys / "site.key")))) == (403, "revoked")


def test_a_certificate_of_the_ca_that_admits_nobody_is_refused(hub, tmp_path):
    """A site that was forgotten, and one that was admitted anew with another key."""
    pki.issue(hub.home.tls, tmp_path / "x", "site", "x", server=False, hosts=[])
    with hub.client(tmp_path / "x") as client:
        assert said(client.get("/health")) == (403, "unknown")
    hub.admit("a")
    pki.issue(hub.home.tls, tmp_path / "y", "site", "a", server=False, hosts=[])
    with hub.client(tmp_path / "y") as client:
        assert said(client.get("/health")) == (403, "unknown")


def test_an_expired_certificate_is_refused_on_the_connection_it_has(hub, monkeypatch):
    with hub.client(hub.admit("a")) as client:
        assert client.get("/health").status_code == 200
        now = time.time()
        monkeypatch.setattr(enrolment.time, "time", lambda: now + 31 * 86400)
        assert said(client.get("/health")) == (403, "expired")


def test_a_connection_of_an_older_certificate_is_closed_after_the_answer(hub):
    keys = hub.admit("a")
    with hub.client(keys) as client:
        assert "connection" not in client.get("/health").headers
        key = pki.load_key(keys / "site.key").public_key()
        newer = pki.sign(hub.home.tls, key, "a", "site", days=30)
        site = roster.load(hub.home).sites["a"].model_copy(update={"certificate": newer})
        store.write_text(hub.home.sites / "a.json", site.model_dump_json())
        answer = client.get("/health")
        assert answer.status_code == 200 and answer.headers["connection"] == "close"
        assert client.get("/health").status_code == 200, "by a new connection"


def test_a_site_renews_its_own_key_only(hub):
    keys = hub.admit("a")
    with hub.client(keys) as client:
        assert said(client.post(RENEW, content=REQUEST)) == (403, "key")
        own = pki.make_request(pki.load_key(keys / "site.key"), "a")
        young = client.post(RENEW, content=own).json()["certificate"]
        assert young == (keys / "site.pem").read_text(), "one that is young is not signed again"


def test_a_roster_that_was_damaged_while_the_daemon_runs_changes_nothing(hub, caplog):
    with hub.client(hub.admit("a")) as client:
        assert client.get("/health").status_code == 200
        (hub.home.sites / "b.json").write_text("{")
        assert client.get("/health").status_code == 200
        assert "b.json cannot be read" in caplog.text


def test_a_peer_without_a_name_may_ask_nothing(hub):
    assert hub.gate.refusal(None)[:2] == (403, "certificate")


def test_every_code_word_of_the_gate_is_one_that_sites_explain():
    assert {"revoked", "unknown", "expired", "invitation", "used", "key"} == set(SAID)
