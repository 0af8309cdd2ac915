"""Keys and certificates of a consortium: one CA, a server certificate, one key and certificate for each site.

Elliptic curve P-384 throughout, because Flower's node authentication takes NIST curves only. A site has one key, for
its TLS certificate and for Flower's signature on each request.
"""

import datetime as dt
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtailor import store
from fedtailor.errors import ConfigError

DAY = dt.timedelta(days=1)
SLACK = dt.timedelta(minutes=5)  # clocks of two institutions differ


def make_ca(folder: Path, name: str, days: int = 3650) -> None:
    """Write ``ca.pem`` and ``ca.key``. An existing CA is never replaced."""
    if (folder / "ca.key").exists():
        raise ConfigError(f"{folder / 'ca.key'} exists: this consortium has a CA already; choose another --home")
    key = ec.generate_private_key(ec.SECP384R1())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = _certificate(name, key.public_key(), _name(name), key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(True, 0), True).add_extension(usage, True)
    _write_pair(folder, "ca", key, builder.sign(key, hashes.SHA384()))


def issue(ca: Path, folder: Path, stem: str, name: str, *, server: bool, hosts: list[str], days: int = 90) -> None:
    """Write ``<stem>.pem`` and ``<stem>.key``, signed by the CA in ``ca``, and a copy of ``ca.pem`` beside them.

    Args:
        hosts: names and addresses that a server's certificate is good for; empty for a site.
    """
    ca_key = load_key(ca / "ca.key")
    ca_pem = (ca / "ca.pem").read_bytes()
    issuer = x509.load_pem_x509_certificate(ca_pem)
    key = ec.generate_private_key(ec.SECP384R1())
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = _certificate(name, key.public_key(), issuer.subject, ca_key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(False, None), True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), False)
    names = [_alternative(host) for host in hosts] or [x509.DNSName(name)]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    _write_pair(folder, stem, key, builder.sign(ca_key, hashes.SHA384()))
    if folder != ca:
        store.write_bytes(folder / "ca.pem", ca_pem, mode=0o644)


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key; it must be readable by its owner only."""
    try:
        if os.stat(path).st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others; run: chmod 600 {path}")
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise ConfigError(f"{path} is not a readable private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an elliptic-curve key")
    return key


def public_key(certificate: Path) -> ec.EllipticCurvePublicKey:
    """The public key in a certificate."""
    key = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def key_in(pem: str) -> ec.EllipticCurvePublicKey:
    """The public key in a certificate's PEM text.

    Raises:
        ConfigError: if it is not a certificate of ours.
    """
    try:
        key = x509.load_pem_x509_certificate(pem.encode()).public_key()
    except ValueError as error:
        raise ConfigError(f"a certificate cannot be read: {error}; restore it") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError("a certificate whose key is not on an elliptic curve")
    return key


def fingerprint(certificate: Path) -> str:
    """SHA-256 of a certificate in groups of four, to read over the telephone."""
    digest = x509.load_pem_x509_certificate(certificate.read_bytes()).fingerprint(hashes.SHA256()).hex()
    return " ".join(digest[i : i + 4] for i in range(0, 64, 4))


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _certificate(
    name: str,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SLACK)
        .not_valid_after(now + days * DAY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), False)
    )


def _write_pair(folder: Path, stem: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    store.write_bytes(folder / f"{stem}.key", secret, mode=0o600)
    store.write_bytes(folder / f"{stem}.pem", certificate.public_bytes(pem), mode=0o644)
