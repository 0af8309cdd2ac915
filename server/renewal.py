"""The server's own certificate: renewed at two thirds of its life, under way and without a connection lost."""

import asyncio
import logging
import ssl
import time

from cryptography import x509

from fedtailor import pki, store
from fedtailor.errors import FedtailorError
from fedtailor.server.home import Home

log = logging.getLogger("fedtailor.server")
RETRY_S = 60.0
LOOK_S = 3600.0  # a clock may be set, and a machine may sleep


def renew(home: Home) -> float:
    """Renew the certificate if two thirds of its life are over, or ``hosts`` in server.yaml have changed.

    Returns:
        Seconds until it has to be renewed next.
    """
    config, path = home.config(), home.tls / "server.pem"
    known = pki.read_certificate(path.read_text())
    covers = set(known.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    other_names = covers != {pki.alternative(host) for host in config.hosts}
    if other_names or time.time() >= pki.due(known, days=config.server_days):
        key = pki.load_key(home.tls / "server.key").public_key()
        text = pki.sign(home.tls, key, config.name, "server", days=config.server_days, hosts=config.hosts)
        store.write_text(path, text, mode=0o644)
        known = pki.read_certificate(text)
        log.info("the server's certificate is renewed until %s", known.not_valid_after_utc)
    return max(pki.due(known, days=config.server_days) - time.time(), 0.0)


async def keep_renewed(home: Home, context: ssl.SSLContext) -> None:
    """Renew for ever, and have new connections shown the new certificate. Runs in the server's own loop, so that no
    connection begins while its certificate is replaced."""
    while True:
        try:
            left = await asyncio.to_thread(renew, home)
            context.load_cert_chain(home.tls / "server.pem", home.tls / "server.key")
        except (FedtailorError, OSError, ssl.SSLError) as error:
            log.error("the server's certificate could not be renewed: %s", error)
            left = RETRY_S
        await asyncio.sleep(min(max(left, 0.1), LOOK_S))
