"""A coordinator and sites on one machine, in one process: for tests and measurements, which play both roles."""

from pathlib import Path

from fedtailor import pki
from fedtailor.client.joining import Joining, Settings, join, request_of
from fedtailor.client.site import SiteConfig
from fedtailor.invitation import Answer
from fedtailor.server import roster
from fedtailor.server.home import Home


def admit(home: Home, site: str, folder: Path, settings: Settings) -> SiteConfig:
    """Invite ``site``, have it join under ``folder`` and approve it, without a network."""
    invited = roster.invite(home, site)
    serial = pki.serial(pki.read_certificate(invited.certificate))

    def ask(it: Joining) -> Answer:
        return roster.enrol(home, site, serial, request_of(it))

    def approve(it: Joining) -> None:
        roster.approve(home, site, it.fingerprint)

    config = join(folder, invited.text(), settings, say=approve, ask=ask)
    assert config is not None
    return config
