"""Who may ask what on the public port: invitations to enrol, sites everything else, and each only as itself."""

import asyncio
import logging
import os
import time
from base64 import b64encode
from collections.abc import Callable
from typing import NamedTuple

from fedtailor import pki
from fedtailor.errors import ConfigError, FedtailorError, StoreError, WireError
from fedtailor.invitation import ENROL, RENEW, Answer
from fedtailor.server import roster, withdrawals
from fedtailor.server.home import Home
from fedtailor.server.listener import FLEET, App, Receive, Scope, Send, answer
from fedtailor.server.peers import Peer
from fedtailor.withdrawal import NOTICE

log = logging.getLogger("fedtailor.server")
LIMIT = 8 * 1024  # bytes of a certificate request
PATIENCE_S = 10.0  # for its bytes to arrive


class Admitted(NamedTuple):
    """What admits a site."""

    key: str  # public key, PEM
    serial: str  # of its newest certificate


class Gate:
    """The roster as the daemon sees it: read anew when a file of it has changed.

    Args:
        changed: is told the admitted keys by site, and all revoked keys, at the first look and after each change.
    """

    def __init__(self, home: Home, changed: Callable[[dict[str, str], frozenset[str]], None]) -> None:
        self.home, self.changed = home, changed
        self.admitted: dict[str, Admitted] = {}
        self.revoked: frozenset[str] = frozenset()
        self._seen: object = None

    def look(self) -> None:
        """Bring it up to date; a ``stat`` of each file where nothing has changed.

        Raises:
            ConfigError: naming a file that cannot be read; what was known before still holds.
        """
        seen = _state(self.home)
        if seen == self._seen:
            return
        read = roster.load(self.home)
        keys = {name: key for name in read.sites if (key := read.key(name)) is not None}
        self.changed(keys, read.revoked)
        certificates = {name: pki.read_certificate(read.sites[name].certificate or "") for name in keys}
        self.admitted = {name: Admitted(key, pki.serial(certificates[name])) for name, key in keys.items()}
        self.revoked, self._seen = read.revoked, seen

    def refusal(self, peer: Peer | None) -> tuple[int, str, str] | None:
        """Why a peer may ask nothing: HTTP status, code word, text; None where it may."""
        if peer is None:
            return 403, "certificate", "there is no certificate"
        if peer.until < time.time():
            return 403, "expired", "this certificate has expired"
        if peer.invitation:
            return None  # to the one route that looks at the invitation itself
        if peer.key in self.revoked:
            return 403, "revoked", "this site's certificate was revoked"
        if peer.name not in self.admitted or self.admitted[peer.name].key != peer.key:
            return 403, "unknown", "this site is not admitted"
        return None


def gated(app: App, gate: Gate) -> App:
    """Let a peer's request through to ``app`` as far as its certificate goes, and answer enrolment and renewal.

    The certificate's key must also be the one that Flower's node authentication goes by: to have stolen another
    site's session or signature is of no use without its certificate.
    """

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        try:
            gate.look()
        except (FedtailorError, OSError) as error:
            log.error("%s", error)  # what was known before still holds
        peer: Peer | None = scope.get("peer")
        route, headers = (scope["method"], scope["path"]), scope["headers"]
        if (refused := gate.refusal(peer)) is not None:
            await _refuse(send, *refused)
            return
        assert peer is not None
        if peer.invitation:
            if route == ("POST", ENROL):
                await _take(gate.home, peer, headers, receive, send, _enrol)
            else:
                await answer(send, 404)
            return
        if gate.admitted[peer.name].serial != peer.serial:
            send = _last(send)  # it has a newer certificate: its next request comes by a new connection
        if route == ("POST", RENEW):
            await _take(gate.home, peer, headers, receive, send, _renew)
        elif route == ("POST", NOTICE):
            await _take(gate.home, peer, headers, receive, send, _notice)
        elif route[0] == "POST" and route[1] in FLEET and not _is_itself(headers, peer):
            await _refuse(send, 401, "key", "this is not the key of the certificate")
        else:
            await app(scope, receive, send)

    return checked


def _is_itself(headers: list[tuple[bytes, bytes]], peer: Peer) -> bool:
    claimed = [value for name, value in headers if name == b"flwr-public-key"]  # of two, Flower would read the first
    return claimed == [b64encode(peer.key.encode())]


def _enrol(home: Home, peer: Peer, request: str) -> Answer:
    return roster.enrol(home, peer.name, peer.serial, request)


def _renew(home: Home, peer: Peer, request: str) -> Answer:
    return roster.renew(home, peer.name, request)


def _notice(home: Home, peer: Peer, request: str) -> Answer:
    notice = withdrawals.take(home, peer.name, peer.key, request)
    log.warning("%s: %s %s", peer.name, notice.says, notice.study or "(all studies)")
    return Answer()


async def _take(
    home: Home,
    peer: Peer,
    headers: list[tuple[bytes, bytes]],
    receive: Receive,
    send: Send,
    act: Callable[[Home, Peer, str], Answer],
) -> None:
    """Read a certificate request, and answer with what ``act`` makes of it."""
    length = dict(headers).get(b"content-length", b"")
    if not length.isdigit() or int(length) > LIMIT:
        await answer(send, 413)
        return
    try:
        async with asyncio.timeout(PATIENCE_S):
            body = await _body(receive)
    except TimeoutError:
        await answer(_last(send), 408)
        return
    try:
        made = await asyncio.to_thread(act, home, peer, body.decode("ascii", errors="replace"))
    except (StoreError, ConfigError, OSError) as error:  # of this side, not the peer's
        log.error("%s could not be answered: %s", peer.name, error)
        await _refuse(send, 507, "store", "the coordinator could not do it now; its operator's log says why")
    except WireError as error:
        await _refuse(send, 400 if error.code == "request" else 403, error.code, str(error))
    else:
        await answer(send, 200, made.model_dump())


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return body


async def _refuse(send: Send, status: int, code: str, text: str) -> None:
    await answer(send, status, {"error": code, "text": text})


def _last(send: Send) -> Send:
    """``send``, for the last answer on a connection."""

    async def closing(message: Scope) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
        await send(message)

    return closing


def _state(home: Home) -> object:
    """Changes whenever a file of the roster does."""
    found = []
    with os.scandir(home.sites) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                found.append((entry.name, entry.inode(), entry.stat().st_mtime_ns))
    if home.revoked.exists():
        about = home.revoked.stat()
        found.append(("", about.st_ino, about.st_mtime_ns))
    return sorted(found)
