"""The server's own certificate: renewed when it is due, and shown to new connections while old ones go on."""

import asyncio
import ssl

import pytest

from fedtailor import pki
from fedtailor.errors import ConfigError
from fedtailor.server import renewal
from fedtailor.server.home import Home, ServerConfig
from fedtailor.server.renewal import keep_renewed, renew


@pytest.fixture
def home(tmp_path):
    it = Home(tmp_path)
    it.init(ServerConfig(name="test", hosts=("localhost", "127.0.0.1", "::1")))
    return it


def served(home):
    return pki.read_certificate((home.tls / "server.pem").read_text())


def change(home, old, new):
    path = home.folder / "server.yaml"
    path.write_text(path.read_text().replace(old, new))


def test_a_young_certificate_stays(home):
    before = (home.tls / "server.pem").read_bytes()
    assert renew(home) == pytest.approx(20 * 86400, abs=60)
    assert (home.tls / "server.pem").read_bytes() == before


def test_one_that_is_due_is_renewed_for_the_same_key(home, monkeypatch):
    before = served(home)
    late = pki.ends(before) + 1000
    with monkeypatch.context() as patch:
        patch.setattr(renewal.time, "time", lambda: late)
        renew(home)
    after = served(home)
    assert after.serial_number != before.serial_number and pki.key_of(after) == pki.key_of(before)
    change(home, "server_days: 30.0", "server_days: 0.0001")  # a life that was made shorter holds at once
    monkeypatch.setattr(renewal.time, "time", lambda: pki.due(after, days=0.0001) + 1)
    renew(home)
    assert served(home).serial_number != after.serial_number


def test_names_that_server_yaml_adds_are_covered_at_the_next_start(home):
    before = served(home)
    renew(home)
    assert served(home) == before, "::1 is the same address however it is written"
    change(home, "- localhost", "- localhost\n- fl.example.org")
    renew(home)
    names = served(home).extensions.get_extension_for_class(pki.x509.SubjectAlternativeName).value
    assert "fl.example.org" in names.get_values_for_type(pki.x509.DNSName)


def test_a_server_shows_its_new_certificate_without_a_restart(hub):
    keys = hub.admit("a")
    host, port = hub.address.split(":")

    def shown():
        context = ssl.create_default_context(cafile=str(keys / "ca.pem"))
        context.load_cert_chain(keys / "site.pem", keys / "site.key")
        return asyncio.run(seen(context))

    async def seen(context):
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return pki.serial(pki.x509.load_der_x509_certificate(der))

    first = shown()
    with hub.client(keys) as client:
        assert client.get("/health").status_code == 200
        change(hub.home, "- localhost", "- localhost\n- fl.example.org")
        renew(hub.home)
        assert pki.serial(served(hub.home)) != first
        hub.server.config.ssl.load_cert_chain(hub.home.tls / "server.pem", hub.home.tls / "server.key")
        assert shown() == pki.serial(served(hub.home)), "to new connections"
        assert client.get("/health").status_code == 200, "and the old one goes on"


def test_it_is_renewed_for_ever_and_a_failure_is_tried_again(home, monkeypatch, caplog):
    loaded, slept, answers = [], [], [ConfigError("no"), 0.0, 10.0, 10_000.0]

    class Context:
        def load_cert_chain(self, certificate, key):
            loaded.append((certificate, key))

    def renewing(_):
        if isinstance(made := answers.pop(0), Exception):
            raise made
        return made

    async def sleep(seconds):
        slept.append(seconds)
        if not answers:
            raise asyncio.CancelledError

    monkeypatch.setattr(renewal, "renew", renewing)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(keep_renewed(home, Context()))
    assert slept == [60.0, 0.1, 10.0, 3600.0] and "could not be renewed: no" in caplog.text
    assert loaded == [(home.tls / "server.pem", home.tls / "server.key")] * 3
