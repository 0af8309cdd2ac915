"""Withdrawing: in force at once, told to the coordinator when it can be, and proven by its signature."""

import threading

import pytest

from fedtailor import pki, seals
from fedtailor.client import withdrawals
from fedtailor.client.withdrawals import Withdrawals
from fedtailor.errors import ConnectionFailed, StoreError
from fedtailor.withdrawal import NOTICE, Notice


@pytest.fixture
def site(tmp_path):
    pki.make_key(tmp_path / "keys" / "site.key")
    return Withdrawals(tmp_path / "withdrawals", "a", tmp_path / "keys")


class FakeFleet:
    context, server = None, "hub:1"


@pytest.fixture
def told(monkeypatch):
    """What is posted; raise what is in ``trouble``."""
    posted, trouble = [], []

    def ask(context, server, route, text):
        if trouble:
            raise trouble[0]
        posted.append((route, Notice.model_validate_json(text)))

    monkeypatch.setattr(withdrawals, "ask", ask)
    return posted, trouble


def test_a_withdrawal_holds_at_once_also_after_a_restart(site):
    assert not site.covers("heart")
    site.say("withdrawn", "heart")
    again = Withdrawals(site.folder, "a", site.keys)
    assert again.covers("heart") and not again.covers("lungs") and again.untold.is_set()
    again.say("withdrawn", None)
    assert site.covers("lungs")


def test_the_coordinator_is_told_once_and_in_order(site, told):
    posted, trouble = told
    site.say("withdrawn", "heart")
    trouble.append(ConnectionFailed("away"))
    with pytest.raises(ConnectionFailed):
        site.tell(FakeFleet())
    assert site.untold.is_set() and not site.rows()[0]["told"]
    trouble.clear()
    site.say("withdrawn", None)
    for _ in range(2):
        site.tell(FakeFleet())
    assert [(route, notice.study) for route, notice in posted] == [(NOTICE, "heart"), (NOTICE, None)]
    key = pki.load_key(site.keys / "site.key").public_key()
    assert all(seals.genuine(key, "withdrawal", notice.text(), notice.signature) for _, notice in posted)
    assert all(row["told"] for row in site.rows()) and not site.untold.is_set()


def test_it_is_told_while_the_daemon_runs(site, told):
    posted, _ = told
    stop = threading.Event()
    thread = threading.Thread(target=site.keep_telling, args=(FakeFleet(), stop), daemon=True)
    thread.start()
    site.say("withdrawn", None)
    for _ in range(100):
        if posted:
            break
        stop.wait(0.1)
    stop.set()
    thread.join(timeout=10)
    assert len(posted) == 1


def test_a_damaged_notice_lets_nothing_run(site):
    site.say("withdrawn", "heart")
    (site.folder / "000000.json").write_text("{")
    with pytest.raises(StoreError, match="000000.json"):
        site.covers("lungs")
