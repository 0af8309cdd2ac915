"""A site's certificate: renewed at two thirds of its life over the connection it opens, by the key the site has."""

import logging
import threading
import time
from collections.abc import Callable

from fedtailor import pki, store
from fedtailor.client.connection import SHUT_OUT, ask
from fedtailor.client.fleet import Fleet
from fedtailor.errors import FedtailorError, WireError
from fedtailor.invitation import RENEW

log = logging.getLogger("fedtailor.client")
LOOK_S = 3600.0  # between looks at the clock, which may be set


def renew(fleet: Fleet) -> None:
    """Ask for the next certificate, keep it, and show it on the connections that are opened from then on.

    The key stays, and with it Flower's session: no message is lost. The coordinator closes each connection of the old
    certificate after the answer that is under way on it.

    Raises:
        FedtailorError: and the old certificate is still there.
    """
    key, name = pki.load_key(fleet.keys / "site.key"), pki.common_name(fleet.certificate)
    answer = ask(fleet.context, fleet.server, RENEW, pki.make_request(key, name))
    if answer.certificate is None:
        raise WireError(f"{fleet.server} answered a renewal without a certificate", code="certificate")
    pki.check_issued(answer.certificate, (fleet.keys / "ca.pem").read_text(), key.public_key(), name)
    store.write_text(fleet.keys / "site.pem", answer.certificate)
    fleet.load()


def keep_renewed(fleet: Fleet, stop: threading.Event, note: Callable[..., None] = lambda what, **facts: None) -> None:
    """Renew until ``stop``; runs in a thread of its own. After a failure it tries again, ten times in what is left."""
    while not stop.is_set():
        if (left := pki.due(fleet.certificate) - time.time()) > 0:
            stop.wait(min(left, LOOK_S))
            continue
        hopeless = False
        try:
            renew(fleet)
            note("renewed", serial=pki.serial(fleet.certificate))
            log.info("the certificate is renewed until %s", fleet.certificate.not_valid_after_utc)
        except (FedtailorError, OSError) as error:
            log.warning("the certificate could not be renewed: %s", error)
            hopeless = isinstance(error, FedtailorError) and error.code in SHUT_OUT
        if pki.due(fleet.certificate) <= time.time():
            rest = pki.ends(fleet.certificate) - time.time()
            stop.wait(LOOK_S if hopeless or rest <= 0 else min(max(rest / 10, 1.0), LOOK_S))
