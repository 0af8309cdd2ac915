"""The doctor's look at a site's keys: files and modes, whose the certificate is, by whom, and for how long."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedtailor import pki, seals
from fedtailor.client.finding import Row
from fedtailor.client.site import SiteConfig

ANEW = "ask the operator for a fresh invitation, stop the daemon, and run: fedtailor client join --invitation FILE"
FILES = ("ca.pem", "site.pem", "site.key", "plans.pub")


def files(config: SiteConfig) -> Iterator[Row]:
    """That the four are there, secrets are their owner's alone, and nobody else can replace what the site trusts."""
    keys = config.keys
    if not keys.is_dir():
        yield Row("keys", "wrong", f"{keys} is not there", "set keys in site.yaml, restore the folder, or " + ANEW)
        return
    wrong = [f"{name} is missing" for name in FILES if not (keys / name).is_file()]
    mend = ["restore it, or " + ANEW] if wrong else []
    for path, forbidden, mode in [(keys, 0o077, "700"), *_secret(keys), *_shown(keys)]:
        if path.exists() and (bits := os.stat(path).st_mode & 0o777) & forbidden:
            wrong.append(f"{path} has mode {bits:o}, which lets others in")
            mend.append(f"chmod {mode} {path}")
    if not wrong:
        pki.load_key(keys / "site.key")
    found = "; ".join(wrong) or f"{', '.join(FILES)} in {keys}"
    yield Row("keys", "wrong" if wrong else "ok", found, "; ".join(mend))


def _secret(keys: Path) -> list[tuple[Path, int, str]]:
    return [(path, 0o077, "600") for path in sorted(keys.glob("*.key"))]


def _shown(keys: Path) -> list[tuple[Path, int, str]]:
    return [(keys / name, 0o022, "go-w") for name in FILES if not name.endswith(".key")]


def certificate(config: SiteConfig, now: float) -> Iterator[Row]:
    """That the site's certificate is for its name and key, by the consortium's CA, and has time left."""
    name, made = "certificate", _read(config.keys / "site.pem")
    if pki.key_of(made) != pki.load_key(config.keys / "site.key").public_key():
        yield Row(name, "wrong", "site.pem is not for the key in site.key", "restore the pair, or " + ANEW)
    elif not issued_by(made, _read(config.keys / "ca.pem")):
        yield Row(name, "wrong", "site.pem was not issued by the CA in ca.pem", "restore both, or " + ANEW)
    elif pki.common_name(made) != config.site:
        found = f"site.pem is for {pki.common_name(made)!r}, and site.yaml says site: {config.site}"
        yield Row(name, "wrong", found, "write in site.yaml the name that the operator invited")
    else:
        renewed = "it renews itself while the daemon runs: see below and its log why it did not"
        yield _life(name, made, now, renewed, ANEW)


def authority(config: SiteConfig, now: float) -> Iterator[Row]:
    """The consortium's CA, by its fingerprint, and how long it lasts."""
    made = _read(config.keys / "ca.pem")
    ask = "ask the operator what the consortium plans; a new CA means joining anew"
    row = _life("consortium", made, now, ask, ask)
    yield row._replace(found=f"{pki.common_name(made)}, {row.found}, fingerprint {pki.fingerprint(made)}")


def plans(config: SiteConfig) -> Iterator[Row]:
    """The key that the coordinator signs plans with, pinned when the site joined."""
    seals.load_public(config.keys / "plans.pub")
    yield Row("plans.pub", "ok", "the coordinator's key for plans can be read")


def issued_by(made: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether ``ca`` signed a certificate itself."""
    try:
        made.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def date(seconds: float) -> str:
    """A day and time, UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _life(name: str, made: x509.Certificate, now: float, soon: str, over: str) -> Row:
    until = f"until {date(pki.ends(made))}"
    if now < made.not_valid_before_utc.timestamp():
        begins = date(made.not_valid_before_utc.timestamp())
        return Row(name, "wrong", f"valid from {begins} on, which is not yet", "set this host's clock")
    if now > pki.ends(made):
        return Row(name, "wrong", f"it has expired: {until}", f"if this host's clock is right, {over}")
    if now > pki.due(made, 2 / 3):
        return Row(name, "warning", f"{until}: less than a third of its life is left", soon)
    return Row(name, "ok", until)


def _read(path: Path) -> x509.Certificate:
    return pki.read_certificate(path.read_text())
