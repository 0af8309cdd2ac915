"""The life of a site in the operator's files: invited, waiting, admitted, revoked, and invited anew."""

import stat
import threading
import time

import pytest

from fedtailor import pki
from fedtailor.errors import ConfigError, WireError
from fedtailor.server import roster
from fedtailor.server.home import Home, ServerConfig


@pytest.fixture
def home(tmp_path):
    it = Home(tmp_path / "hub")
    it.init(ServerConfig(name="test", port=1234, hosts=("hub.example", "127.0.0.1")))
    return it


def state(home, name="a"):
    return {row.site: row.state for row in roster.rows(home)}[name]


def ask(home, invited, key):
    serial = pki.serial(pki.read_certificate(invited.certificate))
    return roster.enrol(home, invited.site, serial, pki.make_request(key, "whatever it says"))


def admit(home, name="a"):
    invited, key = roster.invite(home, name), pki.new_key()
    ask(home, invited, key)
    roster.approve(home, name)
    return invited, key


def refused(home, invited, key):
    with pytest.raises(WireError) as error:
        ask(home, invited, key)
    return error.value.code


def test_a_site_is_invited_asks_is_approved_and_revoked(home):
    invited, key = roster.invite(home, "a", hours=1), pki.new_key()
    certificate = pki.read_certificate(invited.certificate)
    assert (invited.site, invited.server, pki.common_name(certificate)) == ("a", "hub.example:1234", "a")
    assert pki.is_invitation(certificate) and abs(invited.ends - time.time() - 3600) < 60
    assert state(home) == "invited" and not roster.admitted(home)
    assert ask(home, invited, key).certificate is None and state(home) == "waiting"
    (row,) = roster.rows(home)
    assert row.fingerprint == pki.fingerprint(key.public_key())
    row = roster.approve(home, "a", row.fingerprint.replace(" ", ":").upper())
    answer = ask(home, invited, key)
    site = pki.read_certificate(answer.certificate)
    assert pki.key_of(site) == key.public_key() and pki.common_name(site) == "a" and not pki.is_invitation(site)
    assert answer.plans == (home.signing / "plans.pub").read_text()
    assert state(home) == "admitted" and roster.admitted(home) == {"a": pki.key_text(key.public_key())}
    assert row.until == pki.ends(site) and abs(row.until - time.time() - 30 * 86400) < 60
    roster.revoke(home, "a")
    assert state(home) == "revoked" and not roster.admitted(home)
    assert stat.S_IMODE(home.revoked.stat().st_mode) == 0o600
    assert refused(home, invited, key) == "invitation"


def test_another_key_under_the_same_invitation_is_refused_also_when_approved(home):
    invited, key = roster.invite(home, "a"), pki.new_key()
    for _ in range(2):
        ask(home, invited, key)
    assert refused(home, invited, pki.new_key()) == "used"
    roster.approve(home, "a")
    assert refused(home, invited, pki.new_key()) == "used"
    assert ask(home, invited, key).certificate


def test_of_many_keys_at_once_one_is_taken(home):
    invited, codes = roster.invite(home, "a"), []

    def one(key):
        try:
            ask(home, invited, key)
            codes.append("taken")
        except WireError as error:
            codes.append(error.code)

    threads = [threading.Thread(target=one, args=(pki.new_key(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == ["taken"] + ["used"] * 7


def test_a_fingerprint_that_differs_is_not_approved(home):
    invited = roster.invite(home, "a")
    ask(home, invited, pki.new_key())
    with pytest.raises(ConfigError, match="--fingerprint: the key of site 'a' has another") as error:
        roster.approve(home, "a", pki.fingerprint(pki.new_key().public_key()))
    assert error.value.code == "fingerprint" and state(home) == "waiting"


def test_what_cannot_be_done_says_why(home):
    for act in (roster.approve, roster.deny, roster.revoke):
        with pytest.raises(ConfigError, match="there is no such site"):
            act(home, "nobody")
    invited = roster.invite(home, "a")
    with pytest.raises(ConfigError, match="has not asked"):
        roster.approve(home, "a")
    with pytest.raises(ConfigError, match="not admitted"):
        roster.revoke(home, "a")
    ask(home, invited, pki.new_key())
    with pytest.raises(ConfigError, match="approve it, or deny it first"):
        roster.invite(home, "a")
    roster.approve(home, "a")
    for act, words in ((roster.approve, "has not asked"), (roster.deny, "is not invited")):
        with pytest.raises(ConfigError, match=words):
            act(home, "a")


def test_a_denied_site_is_forgotten_and_its_invitation_void(home):
    invited, key = roster.invite(home, "a"), pki.new_key()
    roster.block(home, "a").write_text(invited.text())
    ask(home, invited, key)
    roster.deny(home, "a")
    assert (
        not roster.rows(home) and not roster.block(home, "a").exists() and refused(home, invited, key) == "invitation"
    )
    again = roster.invite(home, "a")
    assert refused(home, invited, key) == "invitation", "the older one stays void"
    assert ask(home, again, key).certificate is None, "its key is kept"


def test_an_invitation_that_nobody_used_lapses(home, monkeypatch):
    invited = roster.invite(home, "a")
    ask(home, invited, pki.new_key())
    later = time.time() + 73 * 3600
    monkeypatch.setattr(roster.time, "time", lambda: later)
    assert state(home) == "lapsed"
    with pytest.raises(ConfigError, match="has not asked"):
        roster.approve(home, "a")
    assert roster.invite(home, "a")


def test_a_revoked_site_comes_back_with_a_new_key_only(home):
    _, key = admit(home)
    roster.revoke(home, "a")
    again = roster.invite(home, "a")
    assert state(home) == "invited" and refused(home, again, key) == "key"
    fresh = pki.new_key()
    ask(home, again, fresh)
    roster.approve(home, "a")
    assert roster.admitted(home) == {"a": pki.key_text(fresh.public_key())}


def test_a_site_that_lost_its_key_joins_anew_and_the_lost_key_is_revoked(home):
    _, lost = admit(home)
    again, fresh = roster.invite(home, "a"), pki.new_key()
    assert state(home) == "admitted", "until it asks"
    ask(home, again, fresh)
    assert state(home) == "waiting" and roster.admitted(home) == {"a": pki.key_text(lost.public_key())}
    roster.approve(home, "a")
    assert roster.admitted(home) == {"a": pki.key_text(fresh.public_key())}
    assert pki.key_text(lost.public_key()) in roster.load(home).revoked


def test_a_site_whose_certificate_expired_joins_anew_with_its_key(home):
    _, key = admit(home)
    old = roster.load(home).sites["a"].certificate
    again = roster.invite(home, "a")
    assert ask(home, again, key).certificate is None, "not the one it had"
    roster.approve(home, "a")
    assert ask(home, again, key).certificate != old and not roster.load(home).revoked


def test_two_sites_never_share_a_key(home):
    _, key = admit(home, "a")
    assert refused(home, roster.invite(home, "b"), key) == "key"


def test_renewal_is_for_the_same_key_and_when_half_the_life_is_over(home, monkeypatch):
    _, key = admit(home)
    request, other = pki.make_request(key, "a"), pki.make_request(pki.new_key(), "a")
    first = roster.load(home).sites["a"].certificate
    assert roster.renew(home, "a", request).certificate == first
    with pytest.raises(WireError) as error:
        roster.renew(home, "a", other)
    assert error.value.code == "key"
    later = time.time() + 16 * 86400
    monkeypatch.setattr(roster.time, "time", lambda: later)
    second = roster.renew(home, "a", request).certificate
    assert second != first and pki.key_of(pki.read_certificate(second)) == key.public_key()
    assert roster.load(home).sites["a"].certificate == second and roster.renew(home, "a", request).certificate
    monkeypatch.undo()
    roster.revoke(home, "a")
    with pytest.raises(WireError):
        roster.renew(home, "a", request)


def test_a_life_that_was_made_shorter_holds_at_the_next_renewal(home, monkeypatch):
    _, key = admit(home)
    config = home.folder / "server.yaml"
    config.write_text(config.read_text().replace("site_days: 30.0", "site_days: 0.001"))
    later = time.time() + 60
    monkeypatch.setattr(roster.time, "time", lambda: later)
    made = pki.read_certificate(roster.renew(home, "a", pki.make_request(key, "a")).certificate)
    assert abs(pki.ends(made) - (later - 60) - 86.4) < 30


@pytest.mark.parametrize("name", ["../evil", "Charité", "a/b", "", ".hidden", "Upper", "x" * 65])
def test_a_name_that_no_plan_could_list_is_not_invited(home, name):
    before = sorted(home.folder.parent.rglob("*"))
    with pytest.raises(ConfigError, match="site"):
        roster.invite(home, name)
    assert sorted(home.folder.parent.rglob("*")) == before


@pytest.mark.parametrize("text", [b"", b"{", b"{}", b"[]", b"7", b"\xff\xfe", b'{"name": "b", "certificate": "x"}'])
def test_a_damaged_file_is_named(home, text):
    for path in (home.sites / "b.json", home.revoked):
        path.write_bytes(text)
        with pytest.raises(ConfigError, match=f"{path.name} cannot be read"):
            if text == b"[]" and path == home.revoked:
                path.write_bytes(b'[{"name": "a"}]')
            roster.load(home)
        path.unlink()


def test_what_is_written_is_its_owners_alone_and_holds_no_secret(home):
    invited, _ = admit(home)
    secret = invited.key.splitlines()[1]
    for path in home.folder.rglob("*"):
        if path.is_file():
            assert secret not in path.read_text(), path
    assert stat.S_IMODE((home.sites / "a.json").stat().st_mode) == 0o600
