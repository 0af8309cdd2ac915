"""A coordinator that drips a message, an object now and then, to keep a site busy: the message has its time, and no more."""

from types import SimpleNamespace

import pytest

from fedtailor.client import fleet
from fedtailor.client.fleet import Envelope, Fleet
from fedtailor.errors import WireError


@pytest.mark.parametrize("ttl", [60.0, 1e9])  # the coordinator says how long a message lives: not only its word counts
@pytest.mark.parametrize("limited", [True, False])
def test_a_message_that_is_dripped_is_given_up_when_its_time_is_over(monkeypatch, ttl, limited):
    """Without the limits the site takes every drop."""
    if not limited:
        monkeypatch.setattr(fleet, "LONGEST_S", 1e9)
        ttl = 1e9
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(fleet.time, "time", lambda: clock.now)
    taken = []

    def pull(request):
        clock.now += 10.0
        taken.append(request.object_id)
        return SimpleNamespace(object_available=True, object_content=b"x", object_found=True)

    site = object.__new__(Fleet)
    site.client, site.node = SimpleNamespace(PullObject=pull), None
    read = site.fetch(Envelope(1, "m", 1000.0, ttl, 1000.0))
    if not limited:
        assert [read(str(i)) for i in range(1000)] == [b"x"] * 1000
        return
    with pytest.raises(WireError) as error:
        for i in range(1000):
            read(str(i))
    assert error.value.code == "time" and len(taken) <= min(ttl, 7200) / 10 + 1
