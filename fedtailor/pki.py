"""The consortium's certificates: one CA, one for the server, one for each site, and one for each invitation.

Elliptic curve P-384 throughout, because Flower's node authentication takes NIST curves only. A site has one key, for
its TLS certificate and for Flower's signature on each request; it makes the key itself, and only the request for a
certificate leaves it.
"""

import datetime as dt
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtailor import store
from fedtailor.errors import ConfigError, WireError

Purpose = Literal["server", "site", "invitation"]
PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
DAY = dt.timedelta(days=1)
SLACK = dt.timedelta(minutes=5)  # clocks of two institutions differ
RENEW = 2 / 3  # of a certificate's life, after which its owner asks for the next
PEM = serialization.Encoding.PEM


def make_ca(folder: Path, name: str, days: float = 3650) -> None:
    """Write ``ca.pem`` and ``ca.key``. An existing CA is never replaced."""
    if (folder / "ca.key").exists():
        raise ConfigError(f"{folder / 'ca.key'} exists: this consortium has a CA already; choose another --home")
    key = make_key(folder / "ca.key")
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = _certificate(_name(name), key.public_key(), _name(name), key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(True, 0), True).add_extension(usage, True)
    store.write_bytes(folder / "ca.pem", builder.sign(key, hashes.SHA384()).public_bytes(PEM), mode=0o644)


def make_key(path: Path) -> PrivateKey:
    """Write a new private key, readable by its owner only, into a folder that is its owner's alone."""
    key = new_key()
    _write_secret(path, key)
    return key


def new_key() -> PrivateKey:
    """A new private key."""
    return ec.generate_private_key(ec.SECP384R1())


def issue(ca: Path, folder: Path, stem: str, name: str, *, server: bool, hosts: list[str], days: float = 30) -> None:
    """Write a new key ``<stem>.key``, its certificate ``<stem>.pem``, and a copy of ``ca.pem`` beside them.

    Args:
        hosts: names and addresses that a server's certificate is good for; empty for a site.
    """
    load_key(ca / "ca.key")  # before anything is written
    key = make_key(folder / f"{stem}.key")
    made = sign(ca, key.public_key(), name, "server" if server else "site", days=days, hosts=hosts)
    store.write_text(folder / f"{stem}.pem", made, mode=0o644)
    if folder != ca:
        store.write_bytes(folder / "ca.pem", (ca / "ca.pem").read_bytes(), mode=0o644)


def sign(ca: Path, key: PublicKey, name: str, purpose: Purpose, *, days: float, hosts: Sequence[str] = ()) -> str:
    """A certificate (PEM) for ``key`` by the CA in ``ca``; it begins now and ends after ``days``.

    An invitation's says so in its subject (organisational unit), and identifies a peer to the server like a site's.
    """
    ca_key, issuer = load_key(ca / "ca.key"), read_certificate((ca / "ca.pem").read_text())
    usage = ExtendedKeyUsageOID.SERVER_AUTH if purpose == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    unit = "invitation" if purpose == "invitation" else None
    builder = _certificate(_name(name, unit), key, issuer.subject, ca_key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(False, None), True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
    names = [alternative(host) for host in hosts] or [x509.DNSName(name)]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    return builder.sign(ca_key, hashes.SHA384()).public_bytes(PEM).decode()


def make_request(key: PrivateKey, name: str) -> str:
    """A certificate request (CSR, PEM): the public key, and a proof that its owner asks."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(name))
    return builder.sign(key, hashes.SHA384()).public_bytes(PEM).decode()


def read_request(pem: str) -> PublicKey:
    """The key of a certificate request; nothing else in it counts.

    Raises:
        WireError: code ``request``, if it is none, is not signed by its own key, or its key is not P-384.
    """
    try:
        asked = x509.load_pem_x509_csr(pem.encode())
        key, signed = asked.public_key(), asked.is_signature_valid
    except Exception as error:  # whatever a parser raises on a stranger's bytes
        raise WireError("this is not a certificate request in PEM", code="request") from error
    if not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise WireError("a certificate request must be for a P-384 key", code="request")
    if not signed:
        raise WireError("this certificate request is not signed by the key it names", code="request")
    return key


def read_certificate(pem: str) -> x509.Certificate:
    """A certificate; ConfigError if it is none."""
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError as error:
        raise ConfigError(f"a certificate cannot be read: {error}; restore it from a copy") from error


def check_issued(pem: str, ca_pem: str, key: PublicKey, name: str) -> None:
    """Refuse a certificate that is not the CA's word that ``key`` is ``name``'s.

    Raises:
        WireError: code ``certificate``.
    """
    try:
        made = read_certificate(pem)
        made.verify_directly_issued_by(read_certificate(ca_pem))
    except (ConfigError, ValueError, TypeError, InvalidSignature) as error:
        raise WireError("the coordinator sent a certificate that its CA has not signed", code="certificate") from error
    if key_of(made) != key or common_name(made) != name:
        raise WireError(f"the coordinator sent a certificate that is not {name}'s", code="certificate")


def load_key(path: Path) -> PrivateKey:
    """Read a private key; it must be readable by its owner only."""
    try:
        if os.stat(path).st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others; run: chmod 600 {path}")
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise ConfigError(f"{path} is not a readable private key: {error}") from error
    if not isinstance(key, PrivateKey):
        raise ConfigError(f"{path} is not an elliptic-curve key")
    return key


def public_key(certificate: Path) -> PublicKey:
    """The public key in a certificate's file."""
    return key_of(read_certificate(certificate.read_text()))


def key_of(certificate: x509.Certificate) -> PublicKey:
    """The public key in a certificate."""
    key = certificate.public_key()
    assert isinstance(key, PublicKey)
    return key


def key_text(key: PublicKey) -> str:
    """A public key in PEM: equal for equal keys."""
    return key.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def read_key_text(pem: str) -> PublicKey:
    """The public key of :func:`key_text`."""
    key = serialization.load_pem_public_key(pem.encode())
    assert isinstance(key, PublicKey)
    return key


def secret_text(key: PrivateKey | ed25519.Ed25519PrivateKey) -> str:
    """A private key in PEM (PKCS8), in clear: for its owner's file."""
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()).decode()


def common_name(certificate: x509.Certificate) -> str:
    """Whose a certificate is."""
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def is_invitation(certificate: x509.Certificate) -> bool:
    """Whether a certificate is an invitation's."""
    units = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    return [unit.value for unit in units] == ["invitation"]


def fingerprint(of: x509.Certificate | PublicKey) -> str:
    """SHA-256 of a certificate or a public key (DER) in groups of four, to read over the telephone."""
    if isinstance(of, x509.Certificate):
        digest = of.fingerprint(hashes.SHA256()).hex()
    else:
        made = hashes.Hash(hashes.SHA256())
        made.update(of.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
        digest = made.finalize().hex()
    return " ".join(digest[i : i + 4] for i in range(0, 64, 4))


def ends(certificate: x509.Certificate) -> float:
    """When a certificate expires, in seconds since the epoch."""
    return certificate.not_valid_after_utc.timestamp()


def serial(certificate: x509.Certificate) -> str:
    """The serial number, hexadecimal."""
    return f"{certificate.serial_number:x}"


def due(certificate: x509.Certificate, share: float = RENEW, days: float | None = None) -> float:
    """When ``share`` of a certificate's life is over, in seconds since the epoch.

    Args:
        days: the life that it should have; where it is shorter than the certificate's own, it counts instead.
    """
    begins = (certificate.not_valid_before_utc + SLACK).timestamp()
    life = ends(certificate) - begins
    return begins + share * (life if days is None else min(life, days * DAY.total_seconds()))


def alternative(host: str) -> x509.GeneralName:
    """A name or an address, as a certificate states it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(text: str, unit: str | None = None) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, text)]
    if unit is not None:
        parts.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit))
    return x509.Name(parts)


def _certificate(
    subject: x509.Name, key: PublicKey, issuer: x509.Name, issuer_key: PublicKey, days: float
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SLACK)
        .not_valid_after(now + days * DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), False)
    )


def _write_secret(path: Path, key: PrivateKey | ed25519.Ed25519PrivateKey) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    store.write_text(path, secret_text(key), mode=0o600)
