"""Who may take part: one file a site, and a list of what is revoked. Operators and the running daemon change them here.

A site is invited, asks with a certificate request, is approved, renews by itself, and may be revoked. Each change is
one file that is whole or not there, made under a lock, so that commands work with the daemon up or down; the daemon
looks at the files before each request.
"""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from fedtailor import pki, store
from fedtailor.errors import ConfigError, WireError
from fedtailor.invitation import Answer, Invitation
from fedtailor.server.home import Home
from fedtailor.study import Frozen, Name


class Invited(Frozen):
    """An invitation, and what was asked under it."""

    serial: str  # of its certificate
    until: float  # seconds since the epoch
    key: str | None = None  # the public key (PEM) of the one request that was accepted
    approved: bool = False


class Site(Frozen):
    """``sites/<name>.json``."""

    name: Name
    invited: Invited | None = None
    certificate: str | None = None  # PEM, the newest


class Revoked(Frozen):
    """An entry of ``revoked.json``: a key that never gets in again."""

    name: Name
    key: str  # PEM
    time: float


class Row(NamedTuple):
    """A site as an operator sees it."""

    site: str
    state: str  # invited, lapsed, waiting, admitted or revoked
    fingerprint: str | None  # of its key, or of the key it asks with
    until: float | None  # when its certificate or invitation expires, seconds since the epoch


class Roster(NamedTuple):
    """All sites and all revoked keys at one moment."""

    sites: dict[str, Site]
    revoked: frozenset[str]  # public keys, PEM

    def key(self, name: str) -> str | None:
        """The key (PEM) that admits a site; None for a site that is not admitted."""
        site = self.sites.get(name)
        if site is None or site.certificate is None:
            return None
        key = pki.key_text(pki.key_of(pki.read_certificate(site.certificate)))
        return None if key in self.revoked else key


def load(home: Home) -> Roster:
    """Read all of it.

    Raises:
        ConfigError: naming a file that cannot be read.
    """
    sites = {path.stem: _read(home, path.stem) for path in sorted(home.sites.glob("[!.]*.json"))}
    return Roster(sites, frozenset(entry.key for entry in _revoked(home)))


def admitted(home: Home) -> dict[str, str]:
    """Name -> public key (PEM) of every site that may take part."""
    roster = load(home)
    return {name: key for name in roster.sites if (key := roster.key(name)) is not None}


def rows(home: Home) -> list[Row]:
    """Every site and its state."""
    roster, found = load(home), []
    for site in roster.sites.values():
        invited = site.invited if site.invited and site.invited.until > time.time() else None
        certificate = pki.read_certificate(site.certificate) if site.certificate else None
        key, until = (pki.key_of(certificate), pki.ends(certificate)) if certificate else (None, None)
        if invited and invited.key and not invited.approved:
            state, key, until = "waiting", pki.read_key_text(invited.key), invited.until
        elif roster.key(site.name):
            state = "admitted"
        elif invited:
            state, key, until = "invited", None, invited.until
        else:
            state = "revoked" if certificate else "lapsed"
        found.append(Row(site.name, state, pki.fingerprint(key) if key else None, until))
    return found


def invite(home: Home, name: str, hours: float = 72.0) -> Invitation:
    """Invite a site, new or known, to ask for a certificate. The invitation before it, if any, is void.

    Raises:
        ConfigError: for a name that no plan could list, or a site whose request waits for an answer.
    """
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError as error:
        raise ConfigError(
            f"site {name!r}: a name has up to 64 small letters, digits, '_', '.' and '-', and begins with a "
            "letter or digit"
        ) from error
    config = home.config()
    with _changing(home):
        known = _read(home, name) if _path(home, name).exists() else Site(name=name)
        if known.invited and known.invited.key and not known.invited.approved and known.invited.until > time.time():
            raise ConfigError(f"site {name!r} has asked and waits: approve it, or deny it first")
        key = pki.new_key()  # it goes with the invitation, and is kept nowhere here
        certificate = pki.sign(home.tls, key.public_key(), name, "invitation", days=hours / 24)
        made = Invitation(
            site=name,
            server=f"{config.hosts[0]}:{config.port}",
            ca=(home.tls / "ca.pem").read_text(),
            certificate=certificate,
            key=pki.secret_text(key),
        )
        serial = pki.serial(pki.read_certificate(certificate))
        _write(home, known.model_copy(update={"invited": Invited(serial=serial, until=made.ends)}))
    return made


def enrol(home: Home, name: str, invitation: str, request: str) -> Answer:
    """Take a site's request under its invitation; the same key may ask again, another may not.

    Args:
        invitation: the serial number of the invitation's certificate.
        request: a certificate request, PEM.

    Raises:
        WireError: codes ``request``, ``invitation``, ``used``, ``key``.
    """
    key = pki.key_text(pki.read_request(request))
    with _changing(home):
        roster = load(home)
        site = roster.sites.get(name)
        if site is None or site.invited is None or site.invited.serial != invitation:
            raise WireError("this invitation was withdrawn or replaced; ask the operator", code="invitation")
        if site.invited.key == key and site.invited.approved:
            return Answer(certificate=site.certificate, plans=(home.signing / "plans.pub").read_text())
        if site.invited.key == key:
            return Answer()
        if site.invited.key is not None:
            raise WireError("this invitation was used with another key; ask the operator", code="used")
        if key in roster.revoked or any(roster.key(other) == key for other in roster.sites if other != name):
            raise WireError("this key was revoked, or is another site's; join with a new one", code="key")
        _write(home, site.model_copy(update={"invited": site.invited.model_copy(update={"key": key})}))
    return Answer()


def approve(home: Home, name: str, fingerprint: str | None = None) -> Row:
    """Sign what a site has asked for. A key that it had before is revoked.

    Raises:
        ConfigError: if it has not asked, or ``fingerprint`` is not its key's (code ``fingerprint``).
    """
    with _changing(home):
        site = _known(home, name)
        invited = site.invited
        if invited is None or invited.key is None or invited.approved or invited.until < time.time():
            raise ConfigError(f"site {name!r} has not asked to join; see: fedtailor server sites")
        key = pki.read_key_text(invited.key)
        if fingerprint is not None and _plain(fingerprint) != _plain(pki.fingerprint(key)):
            raise ConfigError(
                f"--fingerprint: the key of site {name!r} has another, {pki.fingerprint(key)}; "
                "somebody else may have used its invitation: deny it, and ask the site",
                code="fingerprint",
            )
        before = load(home).key(name)
        if before is not None and before != invited.key:
            _revoke(home, name, before)
        certificate = pki.sign(home.tls, key, name, "site", days=home.config().site_days)
        block(home, name).unlink(missing_ok=True)
        _write(home, Site(name=name, invited=invited.model_copy(update={"approved": True}), certificate=certificate))
    return Row(name, "admitted", pki.fingerprint(key), pki.ends(pki.read_certificate(certificate)))


def deny(home: Home, name: str) -> None:
    """Withdraw a site's invitation, and forget what it asked. ConfigError if there is none."""
    with _changing(home):
        site = _known(home, name)
        if site.invited is None or site.invited.approved:
            raise ConfigError(f"site {name!r} is not invited; see: fedtailor server sites, or revoke it")
        block(home, name).unlink(missing_ok=True)
        if site.certificate is None:
            _path(home, name).unlink()
        else:
            _write(home, site.model_copy(update={"invited": None}))


def revoke(home: Home, name: str) -> None:
    """Shut a site's key out for good, and withdraw its invitation. ConfigError if it is not admitted."""
    with _changing(home):
        site, key = _known(home, name), load(home).key(name)
        if key is None:
            raise ConfigError(f"site {name!r} is not admitted; see: fedtailor server sites, or deny it")
        _revoke(home, name, key)
        _write(home, site.model_copy(update={"invited": None}))


def renew(home: Home, name: str, request: str) -> Answer:
    """The next certificate of an admitted site, for the key it has; the one it has, while that is still young.

    Raises:
        WireError: codes ``request``, ``key``.
    """
    asked = pki.read_request(request)
    with _changing(home):
        roster, days = load(home), home.config().site_days
        site = roster.sites.get(name)
        if site is None or site.certificate is None or roster.key(name) != pki.key_text(asked):
            raise WireError("a site renews the certificate of the key it was admitted with", code="key")
        if time.time() < pki.due(pki.read_certificate(site.certificate), 0.5, days):
            return Answer(certificate=site.certificate)
        certificate = pki.sign(home.tls, asked, name, "site", days=days)
        _write(home, site.model_copy(update={"certificate": certificate}))
    return Answer(certificate=certificate)


def block(home: Home, name: str) -> Path:
    """Where a site's invitation lies for the operator, until it is approved or denied."""
    return home.invitations / f"{name}.txt"


@contextmanager
def _changing(home: Home) -> Iterator[None]:
    home.sites.mkdir(parents=True, exist_ok=True)
    with (home.sites / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(home: Home, name: str) -> Site:
    path = _path(home, name)
    try:
        site = Site.model_validate_json(path.read_bytes())
        if site.certificate is not None:
            pki.read_certificate(site.certificate)
        return site
    except (OSError, ValidationError, ConfigError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it or delete it to forget the site") from error


def _known(home: Home, name: str) -> Site:
    if not (known := sorted(path.stem for path in home.sites.glob("[!.]*.json"))) or name not in known:
        raise ConfigError(f"site {name!r}: there is no such site; there are: {', '.join(known) or 'none yet'}")
    return _read(home, name)


def _write(home: Home, site: Site) -> None:
    store.write_text(_path(home, site.name), site.model_dump_json(indent=1))


def _path(home: Home, name: str) -> Path:
    return home.sites / f"{name}.json"


def _revoked(home: Home) -> list[Revoked]:
    try:
        text = home.revoked.read_bytes() if home.revoked.exists() else b"[]"
        return TypeAdapter(list[Revoked]).validate_json(text)
    except (OSError, ValidationError) as error:
        raise ConfigError(f"{home.revoked} cannot be read ({error}); restore it from a copy") from error


def _revoke(home: Home, name: str, key: str) -> None:
    entries = [*_revoked(home), Revoked(name=name, key=key, time=time.time())]
    store.write_text(home.revoked, json.dumps([entry.model_dump() for entry in entries], indent=1))


def _plain(fingerprint: str) -> str:
    return "".join(fingerprint.split()).replace(":", "").lower()
