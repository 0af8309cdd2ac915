"""The site's key, as the signer of its own records."""

import base64
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtailor import pki
from fedtailor.client.verify_audit import Entry, Head, hash_of, signed_bytes
from fedtailor.errors import ConfigError


@dataclass(frozen=True)
class Signer:
    """Signs with ``key``. ``former`` keys do one thing more: they vouch for ``key`` where records end with theirs."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    former: tuple[ec.EllipticCurvePrivateKey, ...] = field(default=(), repr=False)

    @cached_property
    def public(self) -> str:
        """The public key: base64 of its DER."""
        return public_text(self.key)

    @cached_property
    def vouching(self) -> dict[str, ec.EllipticCurvePrivateKey]:
        """The former keys by their public parts."""
        return {public_text(key): key for key in self.former}

    def entry(self, log: str, head: Head, time: str, fields: dict[str, Any]) -> Entry:
        """The entry after ``head`` in the chain ``log``. It names the key where that is not the one before."""
        record: Entry = {"number": head.number + 1, "time": time, "before": head.hash, "fields": fields}
        key = self.key
        if head.key != self.public:
            record["key"] = self.public
            key = self.vouching.get(head.key, key)
        signature = key.sign(signed_bytes(log, record), ec.ECDSA(hashes.SHA384()))
        entry: Entry = {"record": record, "signature": base64.b64encode(signature).decode()}
        return entry | {"hash": hash_of(entry)}


def load_signer(keys: Path) -> Signer:
    """The signer of a site: ``site.key``, and as former keys whatever else in the folder ends in ``.key``."""
    former = []
    for path in sorted(keys.glob("*.key")):
        try:
            if path.name != "site.key":
                former.append(pki.load_key(path))
        except ConfigError:
            pass  # it cannot vouch; the change of key then shows as a break
    return Signer(pki.load_key(keys / "site.key"), tuple(former))


def public_text(key: ec.EllipticCurvePrivateKey) -> str:
    """A key's public part as records name it."""
    der, spki = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return base64.b64encode(key.public_key().public_bytes(der, spki)).decode()


def now() -> str:
    """UTC to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
