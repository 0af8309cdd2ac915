"""The way to the coordinator: what a person is told when it fails, and proxies that want a password."""

import base64
import socket
import threading

import httpx
import pytest

from fedtailor.client.connection import SAID, by_proxy, code_of, explain, failed
from fedtailor.client.fleet import Fleet
from fedtailor.client.joining import join
from fedtailor.client.renewal import renew
from fedtailor.errors import ConfigError, ConnectionFailed
from fedtailor.server import roster


def answered(status):
    request = httpx.Request("POST", "https://hub.example/")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(status, request=request))


ADVICE = [
    (answered(401), "is the clock right, and is the site still admitted"),
    (answered(412), "does not know this site's key, or still holds an earlier session"),
    (answered(404), "HTTP 404: is this a fedtailor coordinator"),
    (answered(507), "has a problem of its own (HTTP 507)"),
    (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get issuer"), "not of this consortium"),
    (httpx.ReadError("[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] alert certificate"), "refuses this site's certificate"),
    (httpx.ProxyError("407 Proxy Authentication Required"), "are user and password right"),
    (httpx.ConnectError("[Errno 111] Connection refused"), "is the name and port right, is the coordinator up"),
    (httpx.RemoteProtocolError("Server disconnected without sending a response."), "expired by its clock"),
    (httpx.ReadTimeout("timed out"), "failed: ReadTimeout timed out"),
]


@pytest.mark.parametrize("error,advice", ADVICE)
def test_each_failure_comes_with_what_to_check(error, advice):
    text = explain(error, "hub.example:8443")
    assert advice in text and "hub.example:8443" in text
    assert [a for _, a in ADVICE if a in text] == [advice]


@pytest.mark.parametrize("word", SAID)
def test_the_coordinators_word_is_explained_with_a_way_out(word):
    request = httpx.Request("POST", "https://hub.example/")
    answer = httpx.Response(403, json={"error": word, "text": "not shown"}, request=request)
    error = failed(httpx.HTTPStatusError("", request=request, response=answer), "hub.example:8443")
    assert error.code == word and "not shown" not in str(error)
    assert any(way in str(error) for way in ("ask the operator", "--new-key", "tell the operator"))


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b'{"error": "<script>"}', b'{"error": 7}'])
def test_a_refusal_that_is_not_ours_is_explained_by_its_status(body):
    request = httpx.Request("POST", "https://hub.example/")
    error = httpx.HTTPStatusError("", request=request, response=httpx.Response(403, content=body, request=request))
    assert code_of(error) is None and "HTTP 403: is this" in str(failed(error, "hub.example:8443"))


# --- proxies ---

PASSWORD = "s3cret@/:word"
QUOTED = "s3cret%40%2F%3Aword"


class Proxy(threading.Thread):
    """A proxy that lets through by CONNECT whoever knows the password."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port, self.asked = self.listening.getsockname()[1], []
        self.start()

    def run(self):
        while True:
            try:
                peer, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(peer,), daemon=True).start()

    def serve(self, peer):
        head = b""
        while b"\r\n\r\n" not in head:
            head += peer.recv(4096)
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        self.asked.append((first, headers.get("proxy-authorization")))
        if headers.get("proxy-authorization") != "Basic " + base64.b64encode(f"ann:{PASSWORD}".encode()).decode():
            peer.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
            peer.close()
            return
        host, port = first.split()[1].split(":")
        target = socket.create_connection((host, int(port)))
        peer.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        for source, sink in ((peer, target), (target, peer)):
            threading.Thread(target=self.copy, args=(source, sink), daemon=True).start()

    @staticmethod
    def copy(source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.fixture
def proxy(monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    it = Proxy()
    yield it
    it.listening.close()


def test_a_site_joins_and_works_through_a_proxy_with_a_password(hub, proxy, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("HTTPS_PROXY", f"http://ann:{QUOTED}@127.0.0.1:{proxy.port}")
    invited = roster.invite(hub.home, "a")
    approve = lambda it: roster.approve(hub.home, "a", it.fingerprint)  # noqa: E731
    assert join(hub.folder / "a", invited.text(), hub.settings(), say=approve).site == "a"
    joined = len(proxy.asked)
    assert joined >= 2 and {first for first, _ in proxy.asked} == {f"CONNECT {hub.address} HTTP/1.1"}
    fleet = Fleet(hub.address, hub.folder / "a" / "keys")
    assert fleet.join(None) and fleet.receive() is None
    fleet.leave()
    assert len(proxy.asked) > joined
    before = len(proxy.asked)
    renew(fleet)
    assert len(proxy.asked) > before
    word = base64.b64encode(f"ann:{PASSWORD}".encode()).decode()
    assert "CONNECT" in caplog.text and not [s for s in (PASSWORD, QUOTED, word) if s in caplog.text]


def test_no_proxy_is_asked_for_a_host_that_no_proxy_names(hub, proxy, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("NO_PROXY", "example.org,127.0.0.1")
    keys = hub.admit("a")
    assert Fleet(hub.address, keys).join(None) and not proxy.asked


def test_a_proxy_that_takes_no_such_password_is_named_and_the_password_is_not(hub, proxy, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    keys = hub.admit("a")
    monkeypatch.setenv("HTTPS_PROXY", f"http://ann:wr0ng@127.0.0.1:{proxy.port}")
    with pytest.raises(ConnectionFailed, match="407.*are user and password right") as error:
        Fleet(hub.address, keys).join(None)
    assert proxy.asked and "wr0ng" not in str(error.value) + caplog.text


@pytest.mark.parametrize(
    "value", ["http://ann:s3cret/word@proxy:3128", "nonsense://ann:s3cret@proxy", "socks5://ann:s3cret@p"]
)
def test_a_proxy_that_cannot_be_one_is_named_without_its_password(monkeypatch, value):
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(ConfigError, match="HTTPS_PROXY") as error, by_proxy():
        httpx.Client()
    assert "s3cret" not in str(error.value) and error.value.__suppress_context__
