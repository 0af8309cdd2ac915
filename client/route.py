"""The doctor's way to the coordinator: the same client, proxy and TLS as the daemon's, and nothing but GET /health.

First a look without a certificate and without verifying the other's, which ends before a byte is sent over TLS: it
says whom the connection reaches. Then the question, as the daemon would ask it.
"""

import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
from cryptography import x509

from fedtailor import pki
from fedtailor.client.connection import by_proxy, explain, failed, tls
from fedtailor.client.finding import Row, tried, unchecked
from fedtailor.client.papers import date, issued_by
from fedtailor.client.site import SiteConfig
from fedtailor.errors import ConfigError

PATIENCE_S = 10.0  # for each step
SKEW_S, GREATEST_SKEW_S = 60.0, 300.0  # between two clocks: strange; too much for signatures and certificates
FIREWALL = "name and port in site.yaml, then your firewall, which must let this host out to it"


class _Seen(Exception):
    """The look is over."""


@dataclass
class Trail:
    """How far a request got."""

    server: str
    hop: tuple[str, int] | None = None  # whom TCP was asked for: the coordinator, or a proxy
    reached: bool = False  # it answered, and so did the coordinator behind a proxy
    shown: x509.Certificate | None = None  # what the other side showed
    error: httpx.HTTPError | None = None
    response: httpx.Response | None = None
    moment: float = 0.0  # by this host's clock, when the answer came

    def follow(self, then: Callable[[Any], None] = lambda stream: None) -> Callable[[str, dict[str, Any]], None]:
        """A listener for httpcore's events; ``then`` is called when TLS stands."""
        host, ours = urlsplit(f"https://{self.server}").hostname, False

        def event(name: str, info: dict[str, Any]) -> None:
            nonlocal ours
            if name.endswith("connect_tcp.started"):
                self.hop = (str(info["host"]), int(info["port"]))
            elif name.endswith("start_tls.started"):
                ours = info["server_hostname"] == host  # and not TLS with the proxy itself
                self.reached = self.reached or ours
            elif name.endswith("start_tls.complete") and ours:
                der = info["return_value"].get_extra_info("ssl_object").getpeercert(True)
                self.shown = x509.load_der_x509_certificate(der)
                then(info["return_value"])

        return event


AFTER = ("name", "port", "TLS", "admission", "clock")


def checks(config: SiteConfig) -> list[Row]:
    """Every row of the way."""
    try:
        _host(config.server)
        seen = look(config.server)
    except ConfigError as error:
        return [Row("proxy", "wrong", str(error)), *_unchecked(AFTER, "no proxy")]
    except (ValueError, httpx.InvalidURL) as error:
        mend = "write server: name:port in site.yaml"
        return [Row("proxy", "wrong", f"{config.server}: {error}", mend), *_unchecked(AFTER, "no address")]
    rows = [
        row for name, check in (("proxy", _proxy), ("name", _name), ("port", _port)) for row in _of(name, check, seen)
    ]
    if not seen.reached:
        return rows + _unchecked(AFTER[2:], "no connection")
    if seen.shown is None:
        found = f"the other side does not speak TLS 1.3: {seen.error}"
        return [*rows, Row("TLS", "wrong", found, f"check {FIREWALL}"), *_unchecked(AFTER[3:], "no TLS")]
    try:
        asked = ask(config)
    except ConfigError as error:
        return rows + _unchecked(AFTER[2:], str(error))
    rows += tried("TLS", lambda: _tls(config, seen, asked))
    return rows + _of("admission", _admission, asked) + _of("clock", clock, asked)


def _of(name: str, check: Callable[[Trail], Iterator[Row]], trail: Trail) -> list[Row]:
    return tried(name, lambda: check(trail))


def _unchecked(names: Iterable[str], why: str) -> list[Row]:
    return [unchecked(name, why) for name in names]


def look(server: str) -> Trail:
    """Connect, see what certificate the other side shows, and leave; ConfigError if a proxy's setting is none."""
    trail = Trail(server)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is believed, and nothing is sent
    context.minimum_version = ssl.TLSVersion.TLSv1_3

    def leave(stream: Any) -> None:
        stream.close()
        raise _Seen

    _get(trail, context, leave)
    return trail


def ask(config: SiteConfig) -> Trail:
    """GET /health as the site; ConfigError if its keys cannot be used."""
    trail = Trail(config.server)
    keys = config.keys
    _get(trail, tls(keys / "ca.pem", keys / "site.pem", keys / "site.key"))
    return trail


def _get(trail: Trail, context: ssl.SSLContext, then: Callable[[Any], None] = lambda stream: None) -> None:
    with by_proxy():
        client = httpx.Client(verify=context, timeout=PATIENCE_S)
    try:
        trace = {"trace": trail.follow(then)}
        with client, client.stream("GET", f"https://{trail.server}/health", extensions=trace) as answer:
            trail.moment = time.time()
            body = next(answer.iter_raw(2**14), b"")
            trail.response = httpx.Response(
                answer.status_code, headers=answer.headers, content=body, request=answer.request
            )
            trail.response.raise_for_status()
    except _Seen:
        pass
    except httpx.HTTPError as error:
        trail.error = error


def _proxy(seen: Trail) -> Iterator[Row]:
    if seen.hop is None:
        yield Row("proxy", "wrong", f"no connection was tried: {seen.error}", FIREWALL)
    elif seen.hop == _host(seen.server):
        yield Row("proxy", "ok", "none: HTTPS_PROXY and ALL_PROXY are not set, or NO_PROXY names the coordinator")
    else:
        yield Row("proxy", "ok", f"{seen.hop[0]}:{seen.hop[1]}, by HTTPS_PROXY or ALL_PROXY of this shell")


def _name(seen: Trail) -> Iterator[Row]:
    host, port = seen.hop or _host(seen.server)
    whose = "" if (host, port) == _host(seen.server) else " (the proxy; it looks up the coordinator's name itself)"
    try:
        found = sorted({str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
        yield Row("name", "ok", f"{host} is {', '.join(found)}{whose}")
    except (OSError, UnicodeError) as error:
        mend = "write the right name in site.yaml (or HTTPS_PROXY), or have your DNS know it; an entry in /etc/hosts will do"
        yield Row("name", "wrong", f"{host} has no address here: {error}{whose}", mend)


def _port(seen: Trail) -> Iterator[Row]:
    if seen.reached:
        yield Row("port", "ok", f"{seen.server} takes connections")
    else:
        through = isinstance(seen.error, httpx.ProxyError)
        mend = (
            "user and password in HTTPS_PROXY, and that the proxy allows CONNECT to this name and port"
            if through
            else FIREWALL
        )
        yield Row("port", "wrong", explain(seen.error, seen.server) if seen.error else "no answer", f"check {mend}")


def _tls(config: SiteConfig, seen: Trail, asked: Trail) -> Iterator[Row]:
    assert seen.shown is not None
    names, until = server_names(seen.shown), date(pki.ends(seen.shown))
    about = f"names {', '.join(names) or 'none'}; until {until}"
    if asked.shown is not None:
        yield Row("TLS", "ok", f"the coordinator's certificate is of this consortium: {about}")
        return
    host = _host(config.server)[0]
    ca = pki.read_certificate((config.keys / "ca.pem").read_text())
    found = f"{config.server} shows a certificate that this site does not accept ({asked.error}): {about}"
    if not issued_by(seen.shown, ca):
        found += f"; issued by {seen.shown.issuer.rfc4514_string()}"
        mend = (
            "if your institution's proxy or firewall opens TLS, have it let this connection through unopened; else the "
            f"address is somebody else's, or this site joined another consortium: compare the CA {pki.fingerprint(ca)}"
        )
    elif host not in names:
        mend = f"write one of its names in site.yaml, or ask the operator for a certificate that also names {host}"
    else:
        mend = "check this host's clock; if it is right, the operator must renew the coordinator's certificate"
    yield Row("TLS", "wrong", found, mend)


def _admission(asked: Trail) -> Iterator[Row]:
    if asked.shown is None:
        yield unchecked("admission", "no TLS")
    elif asked.error is None:
        yield Row("admission", "ok", "the coordinator accepts this site's certificate")
    else:
        yield Row("admission", "wrong", str(failed(asked.error, asked.server)))


def clock(asked: Trail) -> Iterator[Row]:
    """The difference of the two clocks, by the Date of the coordinator's answer, which is to the second."""
    stated = asked.response.headers.get("date") if asked.response is not None else None
    if stated is None:
        yield unchecked("clock", "the coordinator gave no answer with a date")
        return
    skew = asked.moment - parsedate_to_datetime(stated).timestamp()
    found = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the coordinator's"
    if abs(skew) <= SKEW_S:
        yield Row("clock", "ok", found)
        return
    mend = "set this host's clock, by NTP say; if it is right, tell the operator"
    yield Row("clock", "wrong" if abs(skew) > GREATEST_SKEW_S else "warning", found, mend)


def server_names(shown: x509.Certificate) -> list[str]:
    """The names and addresses that a server's certificate is good for."""
    try:
        return [str(each.value) for each in shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value]
    except (x509.ExtensionNotFound, ValueError):
        return []


def _host(server: str) -> tuple[str, int]:
    parts = urlsplit(f"https://{server}")
    return parts.hostname or "", parts.port or 443
