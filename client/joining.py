"""Joining: a key that is made here, a certificate request under an invitation, and what the coordinator answers.

What is under way lies in ``joining/`` of the site's home, so that joining can be left and taken up again. The daemon
finds ``site.yaml`` only when the keys are whole.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError

from fedtailor import control, invitation, pki, store
from fedtailor.client import connection
from fedtailor.client.site import Home, SiteConfig
from fedtailor.config import readable
from fedtailor.errors import ConfigError, ConnectionFailed, WireError
from fedtailor.invitation import ENROL, Address, Answer, Invitation

Ask = Callable[["Joining"], Answer]
SLOWEST_S = 10.0  # between questions whether the operator has approved


class Settings(NamedTuple):
    """What a site decides when it joins for the first time."""

    data: Path
    studies: list[str]
    epsilon: float
    delta: float


class Joining(NamedTuple):
    """A site that is about to ask."""

    home: Home
    invitation: Invitation
    server: str  # name:port
    key: Path  # the site's private key
    keys: Path  # where it and the certificates will lie
    fingerprint: str  # of the site's key
    ca_fingerprint: str

    @property
    def draft(self) -> Path:
        """The folder of what is under way."""
        return self.home.folder / "joining"


def join(
    folder: Path,
    text: str | None,
    settings: Settings | None,
    *,
    server: str | None = None,
    new_key: bool = False,
    wait: bool = True,
    say: Callable[[Joining], None] = lambda _: None,
    ask: Ask | None = None,
) -> SiteConfig | None:
    """Ask for a certificate under an invitation, wait for the operator, and set the site up under ``folder``.

    Args:
        text: the invitation; None: the one of an earlier attempt.
        settings: None: those of an earlier attempt, or of a site that is set up already and joins anew.
        server: name:port; None: where the invitation says.
        new_key: make a new key even where there is one.
        wait: until the operator decides; otherwise ask once.
        say: is told what both sides should compare, after the first question was taken.
        ask: how to ask; None: over the network.

    Returns:
        The settings; None if ``wait`` is false and the operator has not decided.

    Raises:
        ConfigError: naming what is missing or out of range.
        ConnectionFailed: with what to check; ``code`` is ``invitation``, ``used``, ``key`` or ``expired`` where it is
            the invitation that is refused.
    """
    home = Home(folder)
    home.folder.mkdir(parents=True, exist_ok=True)
    home.folder.chmod(0o700)
    with control.only_one(home.folder):
        it = prepare(home, text, settings, server=server, new_key=new_key)
        answer, pause = _asked(it, ask), 0.3
        say(it)
        while answer.certificate is None:
            if not wait:
                return None
            time.sleep(pause)
            pause = min(pause * 1.2, SLOWEST_S)
            try:
                answer = _asked(it, ask)
            except ConnectionFailed as error:
                if error.code != ConnectionFailed.code:
                    raise
                pause = SLOWEST_S  # the coordinator is away: it will be back
        return complete(it, answer)


def address(url: str) -> str:
    """``name:port`` of ``https://name:port``; ConfigError if it is something else."""
    found = url.removeprefix("https://").removesuffix("/")
    try:
        return TypeAdapter(Address).validate_python(found)
    except ValidationError as error:
        raise ConfigError(f"URL {url!r}: the coordinator's address looks like https://fl.example.org:8443") from error


def prepare(
    home: Home, text: str | None, settings: Settings | None, *, server: str | None = None, new_key: bool = False
) -> Joining:
    """Keep the invitation and the settings, and make the site's key, unless an earlier attempt has."""
    draft, known = home.folder / "joining", (home.folder / "site.yaml").exists()
    kept = draft / "invitation.txt"
    if text is None and not kept.exists():
        raise ConfigError("--invitation is missing: the file that the operator handed over, or - to paste it")
    invited = invitation.parse(kept.read_text() if text is None else text)
    if invited.ends < time.time():
        raise ConnectionFailed(_lapsed(invited), code="expired")
    if known and settings is not None:
        raise ConfigError(
            f"{home.folder / 'site.yaml'} exists: to join anew with its settings, leave --data, --study and --epsilon "
            "out; or choose another --home"
        )
    server = server or invited.server
    if known:
        config = home.config()
        if config.site != invited.site:
            raise ConfigError(f"--invitation: it is for site {invited.site!r}, and this is {config.site!r}")
        server, keys = config.server, config.keys
    else:
        keys = home.folder / "keys"
        raw = _settings(draft, invited.site, server, settings)
    other = not kept.exists() or kept.read_text() != invited.text()  # than the invitation of an earlier attempt
    home.make()
    draft.mkdir(mode=0o700, exist_ok=True)
    if not known:
        store.write_text(draft / "site.yaml", yaml.safe_dump(raw, sort_keys=False))
    store.write_text(kept, invited.text())
    for name, pem in (("ca.pem", invited.ca), ("bootstrap.pem", invited.certificate), ("bootstrap.key", invited.key)):
        store.write_text(draft / name, pem)
    key = keys / "site.key" if known and not new_key and not (draft / "site.key").exists() else draft / "site.key"
    if not key.exists() or (new_key and other):
        pki.make_key(key)
    fingerprint = pki.fingerprint(pki.load_key(key).public_key())
    return Joining(home, invited, server, key, keys, fingerprint, pki.fingerprint(pki.read_certificate(invited.ca)))


def over_network(it: Joining) -> Answer:
    """Ask the coordinator, as the holder of the invitation."""
    context = connection.tls(it.draft / "ca.pem", it.draft / "bootstrap.pem", it.draft / "bootstrap.key")
    return connection.ask(context, it.server, ENROL, request_of(it))


def request_of(it: Joining) -> str:
    """The site's certificate request."""
    return pki.make_request(pki.load_key(it.key), it.invitation.site)


def complete(it: Joining, answer: Answer) -> SiteConfig:
    """Check what the coordinator answered, and write the keys and then ``site.yaml``."""
    if answer.certificate is None or answer.plans is None:
        raise WireError(f"{it.server} answered without a certificate or plans.pub", code="certificate")
    key, keys = pki.load_key(it.key), it.keys
    pki.check_issued(answer.certificate, it.invitation.ca, key.public_key(), it.invitation.site)
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    store.write_text(keys / "ca.pem", it.invitation.ca)
    store.write_text(keys / "plans.pub", answer.plans)
    store.write_text(keys / "site.key", pki.secret_text(key))
    store.write_text(keys / "site.pem", answer.certificate)
    if not (it.home.folder / "site.yaml").exists():
        store.write_text(it.home.folder / "site.yaml", (it.draft / "site.yaml").read_text())
    shutil.rmtree(it.draft)
    return it.home.config()


def _asked(it: Joining, ask: Ask | None) -> Answer:
    try:
        return (ask or over_network)(it)
    except ConnectionFailed as error:
        if error.code == "expired" or it.invitation.ends < time.time():
            raise ConnectionFailed(_lapsed(it.invitation), code="expired") from error
        raise


def _lapsed(invited: Invitation) -> str:
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(invited.ends))
    return (
        f"this invitation expired at {until}, by this machine's clock; ask the operator for a fresh one: the key that "
        "was made here is kept"
    )


def _settings(draft: Path, site: str, server: str, settings: Settings | None) -> Any:
    """What will be ``site.yaml``; ConfigError names what is missing or out of range."""
    if settings is not None:
        if not settings.data.is_file():
            raise ConfigError(f"--data {settings.data}: there is no such file")
        raw = {
            "site": site,
            "server": server,
            "keys": "keys",
            "data": {"name": (settings.studies or [""])[0], "path": str(settings.data.resolve())},
            "policy": {"studies": list(settings.studies), "epsilon": settings.epsilon, "delta": settings.delta},
        }
    elif (draft / "site.yaml").exists():
        raw = yaml.safe_load((draft / "site.yaml").read_text()) | {"site": site, "server": server}
    else:
        raise ConfigError("--data, --study and --epsilon are needed when a site joins for the first time")
    try:
        SiteConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(readable(error)) from error
    return raw
