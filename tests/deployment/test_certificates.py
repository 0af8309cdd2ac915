"""Certificates that live for seconds, under a study that goes on; and a site that is revoked in the middle of one."""

import json
import time

import pytest

from fedtailor import pki
from fedtailor.server import roster
from fedtailor.server.home import Home

pytestmark = pytest.mark.deployment
LIFE_S = 12


@pytest.fixture(scope="module")
def brief(lay_out_once):
    """Two sites and a server whose certificates are past two thirds of their life, and the next live for seconds."""
    made = lay_out_once("cleveland", "va")
    home, config = Home(made.server_home), made.server_home / "server.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pki, "SLACK", pki.SLACK + 30 * pki.DAY)  # they began a month ago
        for name, site in roster.load(home).sites.items():
            key = pki.key_of(pki.read_certificate(site.certificate))
            certificate = pki.sign(home.tls, key, name, "site", days=1)
            (home.sites / f"{name}.json").write_text(
                site.model_copy(update={"certificate": certificate}).model_dump_json()
            )
            (made.site_home(name) / "keys" / "site.pem").write_text(certificate)
    config.write_text(config.read_text().replace("_days: 30.0", f"_days: {LIFE_S / 86400}"))
    made.start_all()
    return made


def certificates(deployment):
    paths = [deployment.server_home / "tls" / "server.pem"]
    paths += [deployment.site_home(site) / "keys" / "site.pem" for site in deployment.sites]
    return [pki.read_certificate(path.read_text()) for path in paths]


@pytest.mark.slow
def test_a_study_goes_on_while_every_certificate_expires_and_is_renewed(brief):
    seen, began = [set(), set(), set()], time.monotonic()

    def renewed():
        for serials, certificate in zip(seen, certificates(brief), strict=True):
            serials.add(certificate.serial_number)
        return all(len(serials) >= 3 for serials in seen) and time.monotonic() - began > LIFE_S + 1

    run = brief.submit(brief.plan("privacy=none", "rounds=1000", "evaluation.baseline=false", "local.steps=1"))
    brief.until(renewed, 90, "every certificate is renewed twice, and the first of them have expired")
    brief.ask("Stop", run=run)
    brief.until(lambda: brief.status(run)["status"] == "stopped", 60, "the run stops")
    result = json.loads((brief.run_folder(run) / "result.json").read_text())
    assert result["rounds"] >= 3 and not result["dropped"], "no round lost an answer"
    assert all(set(entry["sites"]) == {"cleveland", "va"} for entry in result["history"])
    for site in brief.sites:
        log = (brief.folder / f"{site}.log").read_text()
        assert log.count("joined") == 1 and "could not be renewed" not in log and "Traceback" not in log, log
    assert all(pki.ends(certificate) - time.time() < LIFE_S for certificate in certificates(brief))


def test_a_site_that_is_revoked_is_out_at_its_next_poll_and_the_study_goes_on(brief):
    brief.finish(brief.submit(brief.plan("privacy=none", "rounds=1")))  # a worker's start takes as long as the deadline
    slow = ("local.steps=150", "local.lr=0.02", "evaluation.baseline=false")
    run = brief.submit(brief.plan("privacy=none", "rounds=2", "quorum=1", "deadline_s=5", *slow))
    brief.until(lambda: brief.status(run)["round"] >= 1, 60, "a first round with both")
    roster.revoke(Home(brief.server_home), "va")  # as `server revoke` does, beside the running daemon
    brief.until(lambda: not brief.ask_site("va", "Status")["connected"], 60, "the site is shut out")
    said = brief.ask_site("va", "Status")["last_error"]
    assert "has revoked this site" in said and "--new-key" in said
    result = brief.finish(run)
    assert result["rounds"] == 2 and {d["site"] for d in result["dropped"]} == {"va"}
    assert brief.ask("Status")["sites"] == {"cleveland": True}
    log = (brief.folder / "va.log").read_text()
    assert log.count("has revoked this site") <= 2, "its two threads try again only slowly"
