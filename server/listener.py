"""The public listener: mutual TLS, the eight fleet routes a site needs, health, and nothing else."""

import asyncio
import gc
import json
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from pathlib import Path
from typing import Any

import uvicorn

from fedtailor.server.peers import PeerProtocol

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Beside = Callable[[ssl.SSLContext], Coroutine[Any, Any, None]]

# Not here: register-node and unregister-node (a site is enrolled by people), get-run and get-fab (no code travels).
FLEET = frozenset(
    f"/v1/fleet/{name}"
    for name in [
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "push-object",
        "pull-object",
        "confirm-message-received",
    ]
)
PULL = "/v1/fleet/pull-messages"
PUSH = ("/v1/fleet/push-messages", "/v1/fleet/push-object")
OBJECTS = ("/v1/fleet/push-object", "/v1/fleet/pull-object")
SWEEP = 64 * 1024 * 1024  # bytes after which what is no longer used is collected, old or young
LIMIT = 8 * 1024 * 1024  # bytes of one request: Flower cuts arrays into chunks of 5 MiB, and so do we


class Bell:
    """Wakes waiting polls when the round loop has sent something, and the round loop when a site has."""

    def __init__(self) -> None:
        self.sent = 0  # counts what the round loop pushed
        self._heard = threading.Event()  # a site has pushed something
        self._answered = False  # and it was the head of an answer
        self.ending: Callable[[], bool] = lambda: False  # whether the server is going down: nobody waits then
        self.loop: asyncio.AbstractEventLoop | None = None
        self._changed: asyncio.Event | None = None

    def ring(self) -> None:
        """Something was pushed to sites; safe from any thread."""
        self.sent += 1
        if self.loop is not None and self._changed is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._changed.set)

    def hear(self, answer: bool) -> None:
        """A site has pushed an object, or the head of an answer."""
        self._answered = self._answered or answer
        self._heard.set()

    def listen(self, timeout: float) -> None:
        """Wait until something was heard."""
        self._heard.wait(timeout)
        self._heard.clear()

    def take_answered(self) -> bool:
        """Whether the head of an answer came since the last call."""
        was, self._answered = self._answered, False
        return was

    async def wait(self, seen: int, timeout: float) -> None:
        """Return when ``sent`` is no longer ``seen``, or after ``timeout`` seconds."""
        self.loop = self.loop or asyncio.get_running_loop()
        self._changed = self._changed or asyncio.Event()
        end = self.loop.time() + timeout
        while self.sent == seen and not self.ending() and (left := end - self.loop.time()) > 0:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), min(left, 0.5))
            except TimeoutError:
                pass


def public(app: App, bell: Bell, patience: float = 4.0) -> App:
    """Wrap Flower's app: only the fleet routes and health answer, bodies are bounded, polls wait for the bell.

    A poll that finds nothing is held until a message is there or ``patience`` seconds have passed, so that a site
    hears of a round at once and asks only a few times a minute between rounds.
    """
    turn = asyncio.Lock()
    passed = 0  # bytes of requests and answers since the last sweep
    empty: dict[bytes, int] = {}  # a site's key -> what had been sent when its poll last found nothing

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal passed
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        path, method = scope["path"], scope["method"]
        if path == "/health" and method in ("GET", "HEAD"):
            await app(scope, receive, send)
            return
        if path not in FLEET or method != "POST":
            await answer(send, 404)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or int(length) > LIMIT:  # a chunked body of unknown length is refused as well
            await answer(send, 413)
            return
        key = headers.get(b"flwr-public-key", b"")
        if path == PULL and empty.get(key) == bell.sent:
            await bell.wait(bell.sent, patience)
        before, size = bell.sent, 0

        async def measured(message: MutableMapping[str, Any]) -> None:
            nonlocal size
            size += len(message.get("body", b""))
            await send(message)

        if path in OBJECTS:
            await _in_turn(app, turn, scope, receive, measured)
        else:
            await app(scope, receive, measured)
        if path in PUSH:
            bell.hear(path == PUSH[0])
        if path == PULL:
            if len(empty) > 10_000:
                empty.clear()  # the key is not authenticated here: it must not fill the memory
            empty[key] = before if size < 64 else -1  # a poll that brought a message is followed by one at once
        passed += size + int(length)
        if passed > SWEEP:
            passed = 0
            gc.collect()

    return guarded


async def _in_turn(app: App, turn: asyncio.Lock, scope: Scope, receive: Receive, send: Send) -> None:
    """Have chunks worked on one after the other: the app makes four copies of each, and more at once are no quicker.

    Nobody has the turn while the network is waited for: it begins when a request's last byte has come, and ends before the
    answer's first is sent. A slow peer, or one that never ends its request, delays no other.
    """
    pieces, answered = list[bytes](), list[MutableMapping[str, Any]]()
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return  # the peer has gone
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)

    async def whole() -> MutableMapping[str, Any]:
        if not pieces:
            return await receive()
        body = b"".join(pieces)
        pieces.clear()
        return {"type": "http.request", "body": body, "more_body": False}

    async def keep(message: MutableMapping[str, Any]) -> None:
        answered.append(message)

    async with turn:
        await app(scope, whole, keep)
        gc.collect(1)  # the app's request objects are cycles: left to themselves they would hold every chunk
    for message in answered:
        await send(message)


async def answer(send: Send, status: int, document: dict[str, Any] | None = None) -> None:
    """Answer a request with a JSON document, or with nothing but a status."""
    body = json.dumps(document).encode() if document is not None else b""
    headers = [(b"content-length", b"%d" % len(body))]
    if body:
        headers.append((b"content-type", b"application/json"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serve(app: App, host: str, port: int, tls: Path, beside: Beside | None = None) -> uvicorn.Server:
    """An HTTPS server that gives a peer without a certificate of our CA no connection at all.

    Args:
        tls: folder with ``server.pem``, ``server.key`` and ``ca.pem``.
        beside: what runs in the server's loop while it serves; it is given the server's TLS context.
    """

    async def accompanied(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" or beside is None or config.ssl is None:
            await app(scope, receive, send)
            return
        task = asyncio.create_task(beside(config.ssl))
        try:
            await app(scope, receive, send)
        finally:
            task.cancel()

    config = uvicorn.Config(
        accompanied,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        http=PeerProtocol,
        ws="none",
        ssl_keyfile=str(tls / "server.key"),
        ssl_certfile=str(tls / "server.pem"),
        ssl_ca_certs=str(tls / "ca.pem"),
        ssl_cert_reqs=ssl.CERT_REQUIRED,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
    )
    config.load()
    assert config.ssl is not None
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    return uvicorn.Server(config)


def described(server: uvicorn.Server, node_auth: bool) -> dict[str, bool]:
    """What protects the connection, read off the objects that serve it."""
    context = server.config.ssl
    mutual = context is not None and context.verify_mode == ssl.CERT_REQUIRED
    return {"tls": context is not None, "mutual_tls": mutual, "node_auth": node_auth}


def wait_until_started(server: uvicorn.Server, timeout: float = 30.0) -> bool:
    """Whether the server accepts connections within ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while not server.started and time.monotonic() < end:
        time.sleep(0.02)
    return bool(server.started)
