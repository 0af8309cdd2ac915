"""The way to the coordinator: mutual TLS, by a proxy where the environment names one, and failures in plain words."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from pydantic import BaseModel, ValidationError

from fedtailor.errors import ConfigError, ConnectionFailed, WireError
from fedtailor.invitation import Answer

TIMEOUT_S = 30.0
AGAIN = "ask the operator for a fresh invitation, stop this daemon, and run: fedtailor client join"
SAID = {  # the coordinator's code words, in a site's terms
    "revoked": "the operator of {server} has revoked this site; to take part again " + AGAIN + " --new-key",
    "unknown": "{server} has not admitted this site, or admitted it anew with another key; " + AGAIN,
    "expired": "this site's certificate has expired, by this machine's clock or by that of {server}: if neither is "
    "wrong, " + AGAIN,
    "invitation": "this invitation was withdrawn, denied or replaced by a newer one; ask the operator of {server}",
    "used": "this invitation was used with another key: by an earlier attempt, or by somebody else; "
    "tell the operator of {server}, and ask for a fresh one",
    "key": "{server} takes no such key: it was revoked, or it is another site's; join with --new-key",
}
SHUT_OUT = ("revoked", "unknown")  # code words that only people can mend: who hears one asks seldom


def tls(ca: Path, certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.3 with the consortium's servers only, as the holder of ``certificate``.

    Raises:
        ConfigError: naming the folder, if a file is missing or they do not belong together.
    """
    try:
        context = ssl.create_default_context(cafile=str(ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        names = ", ".join(path.name for path in (ca, certificate, key))
        raise ConfigError(f"the keys in {key.parent} cannot be used: {error}; they are {names}") from error
    return context


@contextmanager
def by_proxy() -> Iterator[None]:
    """While an HTTP client is made: it reads HTTPS_PROXY, ALL_PROXY and NO_PROXY.

    Raises:
        ConfigError: if one of them cannot be used; it does not repeat the value, which may hold a password.
    """
    try:
        yield
    except (httpx.InvalidURL, ValueError, ImportError):
        raise ConfigError(
            "HTTPS_PROXY or ALL_PROXY is not a proxy's address: http://name:port, or http://user:password@name:port "
            "with %40 for @, %3A for : and %2F for / in the password"
        ) from None


def ask(context: ssl.SSLContext, server: str, route: str, request: str) -> Answer:
    """Post a certificate request.

    Raises:
        ConnectionFailed: with what to check; ``code`` is the coordinator's word where it has one.
        WireError: if the answer is none.
    """
    try:
        with by_proxy():
            client = httpx.Client(verify=context, timeout=TIMEOUT_S)
        with client:
            answer = client.post(f"https://{server}{route}", content=request.encode())
            answer.raise_for_status()
            return Answer.model_validate_json(answer.content)
    except httpx.HTTPError as error:
        raise failed(error, server) from error
    except ValidationError:
        raise WireError(f"{server} did not answer as a fedtailor coordinator of this version does") from None


def failed(error: httpx.HTTPError, server: str) -> ConnectionFailed:
    """Why a request failed, and what to check."""
    code = code_of(error)
    text = SAID[code].format(server=server) if code else explain(error, server)
    return ConnectionFailed(text, code=code)


class _Refusal(BaseModel):
    error: str


def code_of(error: httpx.HTTPError) -> str | None:
    """The coordinator's code word for a refusal, where it is one that we know."""
    if "CERTIFICATE_EXPIRED" in str(error):
        return "expired"
    if not isinstance(error, httpx.HTTPStatusError) or error.response.status_code != 403:
        return None
    try:
        word = _Refusal.model_validate_json(error.response.content).error
    except (ValidationError, httpx.ResponseNotRead):
        return None
    return word if word in SAID else None


def explain(error: httpx.HTTPError, server: str) -> str:
    """Why a request failed, and what to check."""
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        if status == 401:
            return (
                f"{server} does not accept this site's signature: is the clock right, and is the site still admitted?"
            )
        if status == 412:
            return f"{server} does not know this site's key, or still holds an earlier session (up to 20 s)"
        if status >= 500:
            return (
                f"{server} has a problem of its own (HTTP {status}), a full disk perhaps: its operator's log says which"
            )
        return f"{server} answered HTTP {status}: is this a fedtailor coordinator?"
    text = str(error)
    if isinstance(error, httpx.ProxyError):
        return (
            f"the proxy that HTTPS_PROXY names lets nothing through to {server}: {text}; are user and password right?"
        )
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return (
            f"{server} shows a certificate that is not of this consortium (keys/ca.pem), or not for this name: {text}"
        )
    if "alert" in text.lower() and "certificate" in text.lower():
        return f"{server} refuses this site's certificate: {text}"
    if isinstance(error, httpx.RemoteProtocolError) and "without sending" in text:
        return f"{server} closed the connection at once: this side's certificate may have expired by its clock ({text})"
    if isinstance(error, httpx.ConnectError):
        return (
            f"{server} cannot be reached ({text}): is the name and port right, is the coordinator up, is there a proxy?"
        )
    return f"the connection to {server} failed: {type(error).__name__} {text}"
