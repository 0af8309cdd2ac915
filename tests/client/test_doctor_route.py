"""The doctor's way to the coordinator: what stands in it, found at the step where it stands, and named without secrets."""

import email.utils
import functools
import socket
import ssl
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from ward import admitted, bad, change

from fedtailor import pki
from fedtailor.cli.demo import free_port
from fedtailor.client import route
from fedtailor.client.doctor import Site
from fedtailor.client.finding import tried
from fedtailor.client.site import Home
from fedtailor.server import home as server
from fedtailor.server import roster

ALL = ["proxy", "name", "port", "TLS", "admission", "clock"]


@pytest.fixture
def site(hub, monkeypatch):
    for name in ("no_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder = admitted(hub.folder, hub.home)
    return Site(Home(folder), Home(folder).config(), None)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A site whose coordinator is down."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost,nowhere.invalid")
    folder = admitted(tmp_path)
    return change(folder, server=f"127.0.0.1:{free_port()}")


def rows(site):
    found = route.checks(site.config)
    assert [row.name for row in found] == ALL
    return {row.name: row for row in found}


@contextmanager
def answering(talk):
    """A server whose every connection is dealt with by ``talk``; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            while True:
                try:
                    peer, _ = listening.accept()
                except OSError:
                    return
                with peer:
                    try:
                        talk(peer)
                    except OSError:
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def shows(folder, heard, peer):
    """Speak TLS with the certificate in ``folder`` and note what comes over it; answer nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with context.wrap_socket(peer, server_side=True) as secure:
        heard.append(secure.recv(4096))


def test_a_way_that_is_open(site):
    found = rows(site)
    assert {row.state for row in found.values()} == {"ok"}
    assert found["proxy"].found.startswith("none")
    assert "127.0.0.1, localhost" in found["TLS"].found and "of this consortium" in found["TLS"].found


def test_a_name_that_nobody_knows(alone):
    site = change(alone.home.folder, server="nowhere.invalid:8443")
    found = rows(site)
    bad(found["name"], "nowhere.invalid has no address here", "site.yaml")
    bad(found["port"], "nowhere.invalid:8443", "firewall")
    assert [found[name].found for name in ALL[3:]] == ["not checked: no connection"] * 3


def test_a_port_where_nobody_listens(alone):
    found = rows(alone)
    assert found["name"].state == "ok" and "127.0.0.1 is 127.0.0.1" in found["name"].found
    bad(found["port"], "cannot be reached", "firewall")
    bad(found["clock"], "not checked: no connection", state="warning")


def test_an_address_that_is_none(alone):
    found = rows(change(alone.home.folder, server="127.0.0.1:99999"))
    bad(found["proxy"], "127.0.0.1:99999", "name:port in site.yaml")
    assert {found[name].found for name in ALL[1:]} == {"not checked: no address"}


def test_a_port_where_something_else_listens(alone):
    with answering(lambda peer: peer.sendall(b"220 mail ready\r\n")) as port:
        found = rows(change(alone.home.folder, server=f"127.0.0.1:{port}"))
    assert found["port"].state == "ok"
    bad(found["TLS"], "does not speak TLS 1.3", "name and port")
    bad(found["admission"], "not checked: no TLS", state="warning")


def test_a_firewall_that_opens_tls_is_told_from_a_wrong_name_and_is_sent_nothing(alone, tmp_path):
    heard = []
    pki.make_ca(tmp_path / "firewall", "Inspecting Firewall")
    pki.issue(tmp_path / "firewall", tmp_path / "firewall", "server", "x", server=True, hosts=["127.0.0.1"])
    with answering(functools.partial(shows, tmp_path / "firewall", heard)) as port:
        found = rows(change(alone.home.folder, server=f"127.0.0.1:{port}"))
    bad(found["TLS"], "does not accept", "names 127.0.0.1;", "issued by CN=Inspecting Firewall", "opens TLS")
    bad(found["admission"], "not checked: no TLS", state="warning")
    assert set(heard) <= {b""}


def test_a_certificate_that_is_not_for_the_name(alone, tmp_path):
    ca = server.Home(tmp_path / "hub").tls
    pki.issue(ca, tmp_path / "other", "server", "x", server=True, hosts=["fl.example.org"])
    with answering(functools.partial(shows, tmp_path / "other", [])) as port:
        found = rows(change(alone.home.folder, server=f"127.0.0.1:{port}"))
    bad(found["TLS"], "names fl.example.org;", "write one of its names", "127.0.0.1")
    assert "opens TLS" not in found["TLS"].mend


def test_a_site_that_was_revoked_or_whose_certificate_has_expired(hub, site):
    key = pki.load_key(site.config.keys / "site.key")
    kept = (site.config.keys / "site.pem").read_text()
    (site.config.keys / "site.pem").write_text(pki.sign(hub.home.tls, key.public_key(), "a", "site", days=-0.001))
    found = rows(site)
    bad(found["admission"], "expired")
    assert found["TLS"].state == "ok"
    (site.config.keys / "site.pem").write_text(kept)
    roster.revoke(hub.home, "a")
    found = rows(site)
    bad(found["admission"], "has revoked this site", "--new-key")
    assert found["clock"].state == "ok"  # a refusal is dated, too


def test_keys_that_cannot_be_used_leave_the_way_to_be_looked_at(site):
    (site.config.keys / "site.key").write_text("nothing")
    found = rows(site)
    assert [found[name].state for name in ALL[:3]] == ["ok"] * 3
    bad(found["TLS"], "not checked: the keys in", state="warning")


# --- proxies ---


def test_a_proxy_is_named_without_its_password_and_what_it_refuses_is_said(site, monkeypatch):
    refuse = b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n"
    monkeypatch.delenv("NO_PROXY")

    def talk(peer):
        peer.recv(4096)
        peer.sendall(refuse)

    with answering(talk) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://ann:s3cret@localhost:{port}")
        found = rows(site)
    assert found["proxy"].state == "ok" and found["proxy"].found.startswith(f"localhost:{port},")
    assert found["name"].state == "ok" and "the proxy; it looks up" in found["name"].found
    bad(found["port"], "407", "user and password")
    assert "s3cret" not in str(found) and found["TLS"].found == "not checked: no connection"


def test_through_a_proxy_the_rest_is_looked_at_too(hub, site, monkeypatch):
    monkeypatch.delenv("NO_PROXY")
    host, port = hub.address.split(":")

    def copy(source, sink):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def talk(peer):
        assert peer.recv(4096).startswith(b"CONNECT " + hub.address.encode())
        with socket.create_connection((host, int(port))) as target:
            peer.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            thread = threading.Thread(target=copy, args=(target, peer), daemon=True)
            thread.start()
            copy(peer, target)
            thread.join()

    with answering(talk) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://localhost:{proxy}")
        found = rows(site)
    assert {row.state for row in found.values()} == {"ok"}, found
    assert f"localhost:{proxy}" in found["proxy"].found and "names 127.0.0.1, localhost" in found["TLS"].found


def test_a_setting_that_is_no_proxy(alone, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "nonsense://ann:s3cret@proxy")
    found = rows(alone)
    bad(found["proxy"], "HTTPS_PROXY")
    assert "s3cret" not in str(found) and {found[name].found for name in ALL[1:]} == {"not checked: no proxy"}


# --- the clock ---


@pytest.mark.parametrize(
    "skew,state,words",
    [(60, "ok", "60 s ahead"), (61, "warning", "61 s ahead"), (-61, "warning", "61 s behind"), (300, "warning", "300"),
     (301, "wrong", "301 s ahead"), (-3600, "wrong", "3600 s behind")],
)  # fmt: skip
def test_the_clocks_are_compared_by_the_answers_date(skew, state, words):
    now = int(time.time())
    answer = httpx.Response(200, headers={"date": email.utils.formatdate(now, usegmt=True)})
    trail = route.Trail("x:1", response=answer, moment=now + skew)
    (row,) = tried("clock", lambda: route.clock(trail))
    assert row.state == state and words in row.found and ("NTP" in row.mend) == (state != "ok")


def test_an_answer_without_a_date_leaves_the_clock_unchecked():
    (row,) = tried("clock", lambda: route.clock(route.Trail("x:1", response=httpx.Response(200))))
    bad(row, "not checked", state="warning")
