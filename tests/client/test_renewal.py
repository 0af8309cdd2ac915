"""A site's certificate renews itself: the key and Flower's session stay, and a failure loses nothing."""

import threading
import time

import pytest

from fedtailor import pki
from fedtailor.client import renewal
from fedtailor.client.fleet import Fleet
from fedtailor.client.renewal import keep_renewed, renew
from fedtailor.errors import ConnectionFailed, WireError
from fedtailor.invitation import Answer
from fedtailor.server import roster

SECONDS = 1 / 86400


@pytest.fixture
def fleet(hub):
    """A site that is connected, whose certificate is past its two thirds."""
    keys = hub.admit("a")
    aged(hub, keys)
    it = Fleet(hub.address, keys)
    it.join(None)
    return it


def aged(hub, keys):
    """Replace a certificate by one that began 30 days ago, to last 31."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pki, "SLACK", pki.SLACK + 30 * pki.DAY)
        old = pki.sign(hub.home.tls, pki.public_key(keys / "site.pem"), "a", "site", days=1)
    site = roster.load(hub.home).sites["a"].model_copy(update={"certificate": old})
    (hub.home.sites / "a.json").write_text(site.model_dump_json())
    (keys / "site.pem").write_text(old)


def test_a_renewed_certificate_is_kept_and_shown_without_joining_again(hub, fleet):
    old, node = fleet.certificate, fleet.node
    before = hub.link.nodes()["a"].activated_at
    assert pki.due(old) < time.time() < pki.ends(old)
    renew(fleet)
    assert pki.ends(fleet.certificate) - time.time() > 29 * 86400
    assert pki.key_of(fleet.certificate) == pki.key_of(old) == pki.load_key(fleet.keys / "site.key").public_key()
    assert (fleet.keys / "site.pem").stat().st_mode & 0o777 == 0o600
    hub.gate.look()
    assert hub.gate.admitted["a"].serial == pki.serial(fleet.certificate)
    for _ in range(2):  # the connection of the old certificate, then one of the new
        assert fleet.receive() is None
        fleet.beat()
    assert fleet.node == node and hub.link.nodes()["a"].activated_at == before


def test_new_connections_show_the_new_certificate(hub, fleet, monkeypatch):
    seen = []
    real = hub.gate.refusal
    monkeypatch.setattr(hub.gate, "refusal", lambda peer: (seen.append(peer.serial), real(peer))[1])
    old = pki.serial(fleet.certificate)
    fleet.beat()
    renew(fleet)
    fleet.beat()
    fleet.beat()
    assert seen[0] == old and seen[-1] == pki.serial(fleet.certificate) != old


def test_a_certificate_that_is_not_this_sites_is_not_kept(hub, fleet, monkeypatch):
    before = (fleet.keys / "site.pem").read_bytes()
    stranger = hub.folder / "ca"
    pki.make_ca(stranger, "another")
    key = pki.load_key(fleet.keys / "site.key").public_key()
    for made in (
        pki.sign(stranger, key, "a", "site", days=1),
        pki.sign(hub.home.tls, pki.new_key().public_key(), "a", "site", days=1),
        pki.sign(hub.home.tls, key, "b", "site", days=1),
        "nothing",
        None,
    ):
        monkeypatch.setattr(renewal, "ask", lambda *_, made=made: Answer(certificate=made))
        with pytest.raises(WireError):
            renew(fleet)
    assert (fleet.keys / "site.pem").read_bytes() == before


def test_it_waits_until_two_thirds_of_the_life_and_tries_again_after_a_failure(hub, fleet, monkeypatch):
    """Time is the test's own: the first attempt fails, and so often that a tenth of what is left passes between."""
    waits, stop = [], threading.Event()
    ends = pki.ends(fleet.certificate)
    clock = [pki.due(fleet.certificate) - 10_000.0]

    def wait(seconds):
        waits.append((clock[0], seconds))
        clock[0] += seconds

    attempts = []

    def attempt(_):
        attempts.append(clock[0])
        if len(attempts) < 4:
            raise ConnectionFailed("away")
        stop.set()

    monkeypatch.setattr(renewal.time, "time", lambda: clock[0])
    monkeypatch.setattr(stop, "wait", wait)
    monkeypatch.setattr(renewal, "renew", attempt)
    keep_renewed(fleet, stop)
    assert [seconds for _, seconds in waits[:3]] == [3600, 3600, pytest.approx(2800)]
    assert attempts[0] == pytest.approx(pki.due(fleet.certificate))
    assert len(attempts) == 4 and attempts[-1] < ends
    assert waits[3][1] == 3600 < (ends - attempts[0]) / 10


@pytest.mark.parametrize(("late", "code", "pause"), [(5, "expired", 3600), (-5, "revoked", 3600), (-50, "away", 5)])
def test_after_it_expired_or_was_revoked_it_asks_seldom(hub, fleet, monkeypatch, late, code, pause):
    stop, waits = threading.Event(), []
    now = pki.ends(fleet.certificate) + late
    monkeypatch.setattr(renewal.time, "time", lambda: now)
    monkeypatch.setattr(stop, "wait", lambda seconds: (waits.append(seconds), stop.set()))
    monkeypatch.setattr(renewal, "renew", lambda _: (_ for _ in ()).throw(ConnectionFailed("no", code=code)))
    keep_renewed(fleet, stop)
    assert waits == [pytest.approx(pause)]


def test_an_expired_certificate_says_so_with_the_way_out(hub, fleet):
    key = pki.load_key(fleet.keys / "site.key").public_key()
    (fleet.keys / "site.pem").write_text(pki.sign(hub.home.tls, key, "a", "site", days=-SECONDS))
    with pytest.raises(ConnectionFailed, match="has expired.*fresh invitation.*client join") as error:
        Fleet(hub.address, fleet.keys).join(None)
    assert error.value.code == "expired"
