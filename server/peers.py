"""Who is at the other end of a connection: what the certificate says that TLS has verified."""

from asyncio import BaseTransport
from typing import Any, NamedTuple

from cryptography import x509
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fedtailor import pki


class Peer(NamedTuple):
    """The holder of a certificate that our CA has signed."""

    name: str
    key: str  # public key, PEM
    serial: str
    until: float  # when the certificate expires, seconds since the epoch
    invitation: bool  # it is an invitation's: good for asking, and nothing else


def peer_of(der: bytes) -> Peer:
    """Read a certificate."""
    read = x509.load_der_x509_certificate(der)
    key = pki.key_text(pki.key_of(read))
    return Peer(pki.common_name(read), key, pki.serial(read), pki.ends(read), pki.is_invitation(read))


class PeerProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's own HTTP protocol; each request's scope also names the connection's peer."""

    app: Any

    def connection_made(self, transport: BaseTransport) -> None:
        """Read the peer's certificate once for the whole connection."""
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        der = tls.getpeercert(binary_form=True) if tls is not None else None
        app = self.app
        peer = peer_of(der) if der else None

        async def named(scope: Any, receive: Any, send: Any) -> None:
            scope["peer"] = peer
            await app(scope, receive, send)

        self.app = named
