"""The public listener: which requests reach Flower's app, and how long a poll waits."""

import asyncio
import threading

import pytest

from fedtailor.server.listener import FLEET, LIMIT, PULL, PUSH, Bell, public

ROUTES = (
    "activate-node deactivate-node send-node-heartbeat pull-messages push-messages push-object pull-object "
    "confirm-message-received"
).split()


class Inner:
    """Flower's app: remembers what reached it, and answers ``body``."""

    def __init__(self, body=b"", before=None):
        self.reached, self.body, self.before = [], body, before

    async def __call__(self, scope, receive, send):
        self.reached.append((scope["type"], scope.get("method"), scope.get("path")))
        if self.before:
            self.before()
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": self.body})


def scope(path, method="POST", key=b"site", length=b"0"):
    headers = [(b"flwr-public-key", key)] + ([(b"content-length", length)] if length is not None else [])
    return {"type": "http", "path": path, "method": method, "headers": headers}


async def asked(app, request):
    """One request; the messages that were sent to the peer."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    await app(request, receive, send)
    return sent


def status(app, request):
    return asyncio.run(asked(app, request))[0]["status"]


class Recording(Bell):
    """A bell that says whether anybody waited for it, and lets them go at once."""

    def __init__(self):
        super().__init__()
        self.waits = []

    async def wait(self, seen, timeout):
        self.waits.append((seen, timeout))


# --- what answers ---


def test_only_the_eight_fleet_routes_reach_flower():
    assert FLEET == {f"/v1/fleet/{name}" for name in ROUTES} and PULL in FLEET and set(PUSH) < FLEET
    app = public(inner := Inner(), Bell())
    for path in sorted(FLEET):
        assert status(app, scope(path)) == 200
    assert [path for _, _, path in inner.reached] == sorted(FLEET)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/v1/fleet/get-fab",
        "/v1/fleet/get-run",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/pull-messages/",
        "/v1/fleet//pull-messages",
        "/V1/fleet/pull-messages",
        "/health/",
    ],
)
def test_every_other_path_is_not_there(path):
    inner = Inner()
    app = public(inner, Bell())
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
        sent = asyncio.run(asked(app, scope(path, method)))
        assert [m["type"] for m in sent] == ["http.response.start", "http.response.body"]
        assert sent[0]["status"] == 404 and sent[1]["body"] == b""
    assert not inner.reached


def test_a_fleet_route_answers_posts_only_and_health_reads_only():
    inner = Inner()
    app = public(inner, Bell())
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"):
        assert status(app, scope(PULL, method)) == 404
    assert not inner.reached
    assert status(app, scope("/health", "GET", length=None)) == status(app, scope("/health", "HEAD")) == 200
    assert status(app, scope("/health", "POST")) == 404 and len(inner.reached) == 2


@pytest.mark.parametrize("length", [None, b"", b"-1", b"1e3", b"12a", b"%d" % (LIMIT + 1), b"9" * 30])
def test_a_body_of_unknown_or_great_length_is_refused_before_it_is_read(length):
    inner = Inner()
    assert status(public(inner, Bell()), scope(PUSH[1], length=length)) == 413
    assert not inner.reached


def test_a_body_of_the_greatest_length_is_taken():
    assert status(public(Inner(), Bell()), scope(PUSH[1], length=b"%d" % LIMIT)) == 200


def test_a_websocket_gets_nothing_and_the_lifespan_is_flowers_own():
    inner = Inner()
    app = public(inner, Bell())
    assert asyncio.run(asked(app, {"type": "websocket", "path": PULL, "headers": []})) == []
    assert not inner.reached
    asyncio.run(asked(app, {"type": "lifespan"}))
    assert inner.reached == [("lifespan", None, None)]


# --- polls ---


def test_only_a_poll_that_found_nothing_before_waits():
    bell, inner = Recording(), Inner()
    app = public(inner, bell, patience=4.0)

    async def polls():
        await asked(app, scope(PULL))
        assert bell.waits == []  # the first is answered at once
        await asked(app, scope(PULL))
        assert bell.waits == [(0, 4.0)]
        await asked(app, scope(PULL, key=b"another site"))
        await asked(app, scope(PUSH[0]))
        assert len(bell.waits) == 1
        bell.ring()
        await asked(app, scope(PULL))  # something was sent since: it looks at once
        assert len(bell.waits) == 1
        await asked(app, scope(PULL))
        assert bell.waits[1:] == [(1, 4.0)]

    asyncio.run(polls())


def test_a_poll_that_brought_a_message_is_followed_by_one_at_once():
    bell = Recording()
    app = public(Inner(b"m" * 64), bell)

    async def polls():
        for _ in range(3):
            await asked(app, scope(PULL))

    asyncio.run(polls())
    assert bell.waits == []


def test_a_message_that_is_sent_while_a_poll_looks_is_not_missed():
    bell = Recording()
    app = public(Inner(before=bell.ring), bell)  # sent after the poll found nothing, before it was answered

    async def polls():
        await asked(app, scope(PULL))
        await asked(app, scope(PULL))

    asyncio.run(polls())
    assert bell.waits == []


def test_made_up_keys_do_not_fill_the_memory():
    bell = Recording()
    app = public(Inner(), bell)

    async def polls():
        for n in range(10_002):
            await asked(app, scope(PULL, key=b"%d" % n))
        await asked(app, scope(PULL, key=b"1"))

    asyncio.run(polls())
    assert bell.waits == []  # key 1 was forgotten when the table was emptied


def test_a_held_poll_returns_when_the_bell_rings(monkeypatch):
    """Not when a slice of its patience is over: time has no end here."""
    bell, inner = Bell(), Inner()
    app = public(inner, bell, patience=600.0)

    async def whole(waiting, timeout):
        return await waiting

    async def poll():
        await asked(app, scope(PULL))
        held = [asyncio.create_task(asked(app, scope(PULL))) for _ in range(2)]
        while bell._changed is None:
            await asyncio.sleep(0)
        assert len(inner.reached) == 1 and not any(task.done() for task in held)
        ringing = threading.Thread(target=bell.ring)  # the round loop is another thread
        ringing.start()
        async with asyncio.timeout(20):
            await asyncio.gather(*held)
        ringing.join()

    monkeypatch.setattr(asyncio, "wait_for", whole)
    asyncio.run(poll())
    assert len(inner.reached) == 3


def test_nobody_waits_when_the_server_is_going_down():
    bell = Bell()
    bell.ending = lambda: True
    asyncio.run(asyncio.wait_for(bell.wait(0, 600.0), 30))


def test_a_wait_ends_after_its_time():
    asyncio.run(asyncio.wait_for(Bell().wait(0, 0.01), 30))


# --- the round loop's side ---


def test_a_push_wakes_the_round_loop_and_only_the_head_of_an_answer_counts_as_one():
    bell = Bell()
    app = public(Inner(), bell)
    for path, heard, answered in ((PULL, False, False), (PUSH[1], True, False), (PUSH[0], True, True)):
        asyncio.run(asked(app, scope(path)))
        assert bell._heard.is_set() is heard and bell.take_answered() is answered
        assert not bell.take_answered()
        if heard:
            bell.listen(600.0)  # returns at once
        assert not bell._heard.is_set()


def test_a_ring_without_a_loop_or_after_it_ended_is_only_counted():
    bell = Bell()
    bell.ring()
    asyncio.run(bell.wait(0, 600.0))  # it rang before: no wait
    bell.ring()
    assert bell.sent == 2
