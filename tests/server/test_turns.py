"""Chunks are worked on one after the other, and no peer can make another wait for the network."""

import asyncio

import pytest

from fedtailor.server.listener import Bell, public

REQUEST = {
    "type": "http",
    "path": "/v1/fleet/push-object",
    "method": "POST",
    "headers": [(b"flwr-public-key", b"site"), (b"content-length", b"9")],
}


class Working:
    """Flower's app, that reads a request whole, works on it for some turns of the loop, and answers what it read."""

    def __init__(self):
        self.now, self.most, self.read = 0, 0, []

    async def __call__(self, scope, receive, send):
        message = await receive()
        assert not message["more_body"]
        self.read.append(message["body"])
        self.now += 1
        self.most = max(self.most, self.now)
        for _ in range(5):
            await asyncio.sleep(0)
        self.now -= 1
        if message["body"] == b"bad":
            raise RuntimeError("no")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"] * 2})


class Peer:
    """Sends a request in pieces, and takes its answer when it likes."""

    def __init__(self, pieces, send_slowly=None, take_slowly=None, goes=False):
        self.pieces, self.waits, self.takes, self.goes = list(pieces), send_slowly, take_slowly, goes
        self.got = []

    async def receive(self):
        if self.waits is not None and len(self.pieces) == 1:
            await self.waits.wait()
        if not self.pieces or (self.goes and len(self.pieces) == 1):
            return {"type": "http.disconnect"}
        piece = self.pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(self.pieces)}

    async def send(self, message):
        if self.takes is not None:
            await self.takes.wait()
        self.got.append(message)

    def answer(self):
        return b"".join(message.get("body", b"") for message in self.got)


def talking(app, peer):
    return asyncio.ensure_future(app(dict(REQUEST), peer.receive, peer.send))


def test_chunks_are_worked_on_one_after_the_other_and_each_peer_gets_its_own_answer():
    inner, peers = Working(), [Peer([b"a", bytes([48 + i])]) for i in range(8)]

    async def run():
        app = public(inner, Bell())
        await asyncio.gather(*[talking(app, peer) for peer in peers])

    asyncio.run(run())
    assert inner.most == 1
    assert sorted(inner.read) == [b"a%d" % i for i in range(8)]
    assert [peer.answer() for peer in peers] == [b"a%da%d" % (i, i) for i in range(8)]


def test_a_peer_that_never_ends_its_request_or_never_takes_its_answer_delays_no_other():
    async def run():
        never, app = asyncio.Event(), public(Working(), Bell())
        slow = [Peer([b"x", b"y"], send_slowly=never), Peer([b"z"], take_slowly=never)]
        held = [talking(app, peer) for peer in slow]
        await asyncio.sleep(0.05)
        quick = Peer([b"q"])
        await asyncio.wait_for(talking(app, quick), 5)
        assert not any(task.done() for task in held)
        never.set()
        await asyncio.wait_for(asyncio.gather(*held), 5)
        return quick, *slow

    quick, sends_slowly, takes_slowly = asyncio.run(run())
    assert (quick.answer(), sends_slowly.answer(), takes_slowly.answer()) == (b"qq", b"xyxy", b"zz")


def test_a_peer_that_goes_away_in_mid_request_reaches_no_app_and_a_failure_passes_the_turn_on():
    async def run():
        inner = Working()
        app = public(inner, Bell())
        await talking(app, Peer([b"x", b"y"], goes=True))
        assert inner.read == []
        with pytest.raises(RuntimeError, match="no"):
            await talking(app, Peer([b"bad"]))
        after = Peer([b"q"])
        await asyncio.wait_for(talking(app, after), 5)
        return after.answer()

    assert asyncio.run(run()) == b"qq"
