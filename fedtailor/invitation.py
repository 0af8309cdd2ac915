"""How a site gets its certificates: the invitation that an operator hands over, and what is asked on two routes.

An invitation is one block of text. It carries a key and a short-lived certificate that open one route of the coordinator, where a site asks for a
certificate of its own. It is a secret until it is used or has expired; what it can do with them is ask.
"""

import base64
import binascii
import textwrap
from typing import Annotated

from pydantic import Field, ValidationError

from fedtailor import pki
from fedtailor.errors import ConfigError
from fedtailor.study import Frozen, Name

ENROL, RENEW = "/v1/enrol", "/v1/renew"  # a certificate request (PEM) is posted there; an Answer comes back
BEGIN, END = "-----BEGIN FEDTAILOR INVITATION-----", "-----END FEDTAILOR INVITATION-----"
LONGEST = 64 * 1024  # characters

Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9.\-\[\]:]+:\d{1,5}$")]  # name:port


class Invitation(Frozen):
    """For one site, once, until its certificate expires."""

    site: Name
    server: Address
    ca: str  # the consortium's CA, PEM: what the site will trust from then on
    certificate: str  # PEM
    key: Annotated[str, Field(repr=False)]  # PEM

    @property
    def ends(self) -> float:
        """When it expires, in seconds since the epoch."""
        return pki.ends(pki.read_certificate(self.certificate))

    def text(self) -> str:
        """The block of text."""
        coded = base64.b64encode(self.model_dump_json().encode()).decode()
        return "\n".join([BEGIN, *textwrap.wrap(coded, 64), END, ""])


class Answer(Frozen):
    """The coordinator's, to a certificate request."""

    certificate: str | None = None  # PEM; None: the operator has not approved the request yet
    plans: str | None = None  # the public key (PEM) that plans are signed with; to an enrolment only


def parse(text: str) -> Invitation:
    """Read :meth:`Invitation.text`, whatever stands around it.

    Raises:
        ConfigError: which never repeats what it read, for it may be a secret.
    """
    _, begin, rest = text.partition(BEGIN)
    inner, end, _ = rest.partition(END)
    if not begin or not end or len(inner) > LONGEST:
        raise ConfigError(f"--invitation: there is no invitation in it; it stands between {BEGIN} and {END}")
    try:
        read = Invitation.model_validate_json(base64.b64decode("".join(inner.split()), validate=True))
        for pem in (read.ca, read.certificate):
            pki.read_certificate(pem)
    except (binascii.Error, ValidationError, ConfigError):
        raise ConfigError("--invitation: it is damaged; copy the whole block again, or ask for another") from None
    return read
