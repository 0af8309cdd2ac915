"""Joining over the network: the key is made here and stays, and joining can be left and taken up again."""

import stat
import threading
import time

import pytest

from fedtailor import pki
from fedtailor.client import joining
from fedtailor.client.fleet import Fleet
from fedtailor.client.joining import address, join
from fedtailor.client.site import Home
from fedtailor.errors import ConfigError, ConnectionFailed, WireError
from fedtailor.invitation import Answer
from fedtailor.server import roster


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Nobody waits between questions."""
    monkeypatch.setattr(joining.time, "sleep", lambda _: None)


def approving(hub):
    return lambda it: roster.approve(hub.home, it.invitation.site, it.fingerprint)


def test_a_site_joins_and_is_connected(hub):
    told = []

    def compared(it):
        told.append(it)
        roster.approve(hub.home, "a", it.fingerprint)

    folder = hub.folder / "a"
    config = join(folder, roster.invite(hub.home, "a").text(), hub.settings(), say=compared)
    keys = folder / "keys"
    assert Home(folder).config() == config and (config.site, config.server) == ("a", hub.address)
    assert (config.policy.epsilon, config.policy.delta, config.policy.studies) == (3.0, 1e-4, ("heart",))
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in keys.iterdir()} == dict.fromkeys(
        ("ca.pem", "site.pem", "site.key", "plans.pub"), 0o600
    )
    assert (keys / "plans.pub").read_text() == (hub.home.signing / "plans.pub").read_text()
    assert told[0].fingerprint == pki.fingerprint(pki.public_key(keys / "site.pem"))
    ca = pki.read_certificate((hub.home.tls / "ca.pem").read_text())
    assert told[0].ca_fingerprint == pki.fingerprint(ca)
    assert not (folder / "joining").exists() and Fleet(hub.address, keys).join(None)
    secret = (keys / "site.key").read_text().splitlines()[1]
    assert not [p for p in hub.home.folder.rglob("*") if p.is_file() and secret in p.read_text(errors="replace")]


def test_it_can_be_left_and_taken_up_again(hub):
    folder, text = hub.folder / "a", roster.invite(hub.home, "a").text()
    assert join(folder, text, hub.settings(), wait=False) is None
    key = (folder / "joining" / "site.key").read_bytes()
    assert not (folder / "site.yaml").exists() and not (folder / "keys").exists()
    assert stat.S_IMODE((folder / "joining").stat().st_mode) == 0o700
    assert join(folder, None, None, wait=False) is None, "all of it is remembered"
    assert join(folder, text, hub.settings(), wait=False) is None, "and it may be said again"
    roster.approve(hub.home, "a")
    assert join(folder, None, None).site == "a"
    assert (folder / "keys" / "site.key").read_bytes() == key


def test_it_waits_for_the_operator_also_while_the_coordinator_is_away(hub):
    folder, text = hub.folder / "a", roster.invite(hub.home, "a").text()
    asked = []

    def ask(it):
        asked.append(it)
        if len(asked) in (2, 3):
            raise ConnectionFailed("cannot be reached")
        if len(asked) == 4:
            roster.approve(hub.home, "a", it.fingerprint)
        return joining.over_network(it)

    assert join(folder, text, hub.settings(), ask=ask).site == "a" and len(asked) == 4


def test_a_coordinator_that_cannot_be_reached_at_first_is_said_at_once(hub):
    with pytest.raises(ConnectionFailed, match="cannot be reached"):
        join(hub.folder / "a", roster.invite(hub.home, "a").text(), hub.settings(), server="127.0.0.1:9")


def test_a_denied_site_is_told(hub):
    text = roster.invite(hub.home, "a").text()
    with pytest.raises(ConnectionFailed, match="withdrawn, denied or replaced") as error:
        join(hub.folder / "a", text, hub.settings(), say=lambda _: roster.deny(hub.home, "a"))
    assert error.value.code == "invitation" and not (hub.folder / "a" / "site.yaml").exists()


def test_who_comes_second_with_an_invitation_is_told(hub):
    text = roster.invite(hub.home, "a").text()
    join(hub.folder / "thief", text, hub.settings(), wait=False)
    with pytest.raises(ConnectionFailed, match="used with another key.*tell the operator") as error:
        join(hub.folder / "a", text, hub.settings())
    assert error.value.code == "used"


def test_an_expired_invitation_is_said_before_and_after_asking(hub, monkeypatch):
    text = roster.invite(hub.home, "a").text()
    now = time.time
    with monkeypatch.context() as patch:
        patch.setattr(joining.time, "time", lambda: now() + 73 * 3600)
        with pytest.raises(ConnectionFailed, match="invitation expired at 20.*fresh one") as error:
            join(hub.folder / "a", text, hub.settings())
        assert error.value.code == "expired" and not (hub.folder / "a" / "joining").exists()
    short = roster.invite(hub.home, "a", hours=1e-9).text()
    with monkeypatch.context() as patch:
        patch.setattr(joining.time, "time", lambda: now() - 60)  # a clock that is late
        with pytest.raises(ConnectionFailed, match="expired by its clock"):
            join(hub.folder / "a", short, hub.settings())


def test_a_site_joins_anew_with_its_settings_and_key_or_with_a_new_one(hub):
    keys = hub.admit("a")
    folder, key = keys.parent, (keys / "site.key").read_bytes()
    yaml, certificate = (folder / "site.yaml").read_bytes(), (keys / "site.pem").read_bytes()
    (folder / "state" / "ledger.db").write_text("kept")
    assert join(folder, roster.invite(hub.home, "a").text(), None, say=approving(hub)).site == "a"
    assert (keys / "site.key").read_bytes() == key and (keys / "site.pem").read_bytes() != certificate
    roster.revoke(hub.home, "a")
    again = roster.invite(hub.home, "a").text()
    with pytest.raises(ConnectionFailed, match="--new-key") as error:
        join(folder, again, None)
    assert error.value.code == "key"
    for _ in range(2):  # the same command twice asks with the same new key
        assert join(folder, again, None, new_key=True, wait=False) is None
    assert (keys / "site.key").read_bytes() == key, "until the new one is admitted"
    assert join(folder, None, None, say=approving(hub)).site == "a"
    assert (keys / "site.key").read_bytes() != key and Fleet(hub.address, keys).join(None)
    assert (folder / "site.yaml").read_bytes() == yaml and (folder / "state" / "ledger.db").read_text() == "kept"


def test_what_a_site_has_is_never_overwritten(hub):
    folder = hub.admit("a").parent
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="site.yaml exists"):
        join(folder, roster.invite(hub.home, "a").text(), hub.settings())
    with pytest.raises(ConfigError, match="is for site 'b', and this is 'a'"):
        join(folder, roster.invite(hub.home, "b").text(), None)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_two_at_once_and_a_running_daemon_are_kept_apart(hub):
    text, inside = roster.invite(hub.home, "a").text(), threading.Event()

    def ask(_):
        inside.set()
        with pytest.raises(ConnectionFailed, match="another fedtailor daemon"):
            join(hub.folder / "a", text, hub.settings())
        return Answer()

    assert join(hub.folder / "a", text, hub.settings(), ask=ask, wait=False) is None and inside.is_set()


def test_an_answer_that_is_not_for_this_key_is_refused(hub):
    text = roster.invite(hub.home, "a").text()
    other = pki.sign(hub.home.tls, pki.new_key().public_key(), "a", "site", days=1)
    for answer in (Answer(certificate=other, plans="x"), Answer(certificate=other)):
        with pytest.raises(WireError):
            join(hub.folder / "a", text, hub.settings(), ask=lambda _, answer=answer: answer)
    assert not (hub.folder / "a" / "site.yaml").exists() and not (hub.folder / "a" / "keys").exists()


@pytest.mark.parametrize("field,changed", [("epsilon", {"epsilon": 0.0}), ("delta", {"delta": 0.5}),
                         ("--data", {"data": "nowhere.csv"}), ("studies", {"studies": []})])  # fmt: skip
def test_what_is_missing_or_out_of_range_is_named_before_anything_is_asked(hub, field, changed):
    text, folder = roster.invite(hub.home, "a").text(), hub.folder / "a"
    if field == "--data":
        changed = {"data": hub.folder / "nowhere.csv"}
    with pytest.raises(ConfigError, match=field):
        join(folder, text, hub.settings()._replace(**changed))
    assert not (folder / "joining").exists() and roster.rows(hub.home)[0].state == "invited"


def test_a_first_attempt_needs_an_invitation_and_settings(hub):
    with pytest.raises(ConfigError, match="--invitation is missing"):
        join(hub.folder / "a", None, hub.settings())
    with pytest.raises(ConfigError, match="--data, --study and --epsilon are needed"):
        join(hub.folder / "a", roster.invite(hub.home, "a").text(), None)


def test_addresses():
    assert address("https://fl.example.org:8443/") == address("fl.example.org:8443") == "fl.example.org:8443"
    for wrong in ("http://fl.example.org:8443", "fl.example.org", "https://fl.example.org:8443/x", ""):
        with pytest.raises(ConfigError, match="looks like https://"):
            address(wrong)
