"""The doctor: each check finds what it is for, says how to mend it, and none takes the others with it."""

import io
import json
import os
import shutil

import pytest
from ward import admitted, bad, only, worker

from fedtailor import pki
from fedtailor.cli import app
from fedtailor.cli.rehearsal import admit
from fedtailor.client import doctor, papers
from fedtailor.client.confine import Confinement
from fedtailor.client.doctor import Site, examine
from fedtailor.client.joining import Settings
from fedtailor.client.site import Home
from fedtailor.server import home as server

GOOD = ("home", "site.yaml", "keys", "certificate", "consortium", "plans.pub", "proxy", "name", "port", "TLS",
        "admission", "clock", "disk", "records", "data")  # fmt: skip
WELL = Confinement("both", 6, True, False, 8192, 3600)


@pytest.fixture
def folder(tmp_path):
    return admitted(tmp_path)


@pytest.fixture
def site(folder):
    return Site(Home(folder), Home(folder).config(), None)


# --- whole ---


def test_a_site_in_order_has_nothing_wrong_and_a_worker_of_the_doctors_reads_its_data(hub):
    folder = admitted(hub.folder, hub.home)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    rows = examine(folder)
    assert [(r.name, r.state, r.mend) for r in rows if r.name in GOOD] == [(name, "ok", "") for name in GOOD], rows
    assert [r.name for r in rows if r.name not in GOOD] == ["memory", "worker", "daemon"]
    worker = next(r for r in rows if r.name == "worker")
    assert worker.state != "wrong" and "network: none" in worker.found
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_says_it_to_people_and_machines_and_by_its_exit_code(hub, monkeypatch, capsys, broken):
    folder = admitted(hub.folder, hub.home)
    worker(monkeypatch, WELL._asdict(), {})
    if broken:
        (folder / "keys" / "plans.pub").unlink()
    said = []
    for arguments in ([], ["--json"]):
        with pytest.raises(SystemExit) as end:
            app(["client", "doctor", "--home", str(folder), *arguments])
        assert end.value.code == (1 if broken else 0)
        said.append(capsys.readouterr().out)
    document = json.loads(said[1])
    assert document["ok"] is not broken
    for row in document["rows"]:
        measured = row["name"] in ("disk", "memory", "clock")  # from one run to the next it is another number
        assert row["name"] in said[0] and row["mend"] in said[0] and (measured or row["found"] in said[0])


def test_without_settings_the_others_say_so_and_the_daemon_is_looked_for_all_the_same(folder):
    (folder / "site.yaml").write_text("site: a\nserver: [")
    rows = {row.name: row for row in examine(folder)}
    bad(rows["site.yaml"], "site.yaml", "cannot be read", "docs/sites.md")
    assert {name for name, row in rows.items() if row.found == "not checked: site.yaml"} == set(doctor.WITHIN)
    bad(rows["daemon"], "none runs", "client up", state="warning")
    assert rows["home"].state == "ok"


def test_a_check_that_breaks_is_a_row_and_what_others_said_cannot_move_the_cursor():
    def breaks():
        raise ZeroDivisionError("\x1b[2J")
        yield

    row = only(breaks)
    bad(row, "could not be checked: ZeroDivisionError:  [2J")


# --- home and settings ---


def test_a_home_that_others_can_enter_or_that_is_somebody_elses(folder, monkeypatch):
    folder.chmod(0o750)
    bad(only(lambda: doctor._home(Home(folder))), "mode 750", f"chmod 700 {folder}")
    folder.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    bad(only(lambda: doctor._home(Home(folder))), "run this as the daemon's user", state="warning")
    bad(only(lambda: doctor._home(Home(folder / "no"))), "is not there", "--home")


def test_settings_that_others_can_change_or_that_have_no_policy(folder, site):
    (folder / "site.yaml").chmod(0o660)
    bad(only(lambda: doctor._settings(site)), "can be changed by others", "chmod 600")
    (folder / "site.yaml").write_text("site: a\n")
    bad(next(row for row in examine(folder) if row.name == "site.yaml"), "policy is missing")


# --- keys ---


@pytest.mark.parametrize("name", papers.FILES)
def test_a_file_of_the_keys_that_is_missing_or_open_to_others(site, name):
    path = site.config.keys / name
    path.chmod(0o666)
    bad(
        only(lambda: papers.files(site.config)),
        f"{path} has mode 666",
        f"chmod {'600' if name == 'site.key' else 'go-w'} {path}",
    )
    path.unlink()
    bad(only(lambda: papers.files(site.config)), f"{name} is missing", "fresh invitation")


def test_a_folder_of_keys_that_is_missing_or_open_and_a_former_key_that_is(site):
    keys = site.config.keys
    shutil.copy(keys / "site.key", keys / "old.key")
    (keys / "old.key").chmod(0o640)
    keys.chmod(0o711)
    bad(only(lambda: papers.files(site.config)), "has mode 711", f"chmod 700 {keys}", f"chmod 600 {keys / 'old.key'}")
    shutil.rmtree(keys)
    bad(only(lambda: papers.files(site.config)), "is not there")


def test_a_key_that_is_none(site):
    (site.config.keys / "site.key").write_text("nothing")
    (site.config.keys / "plans.pub").write_text("nothing")
    bad(only(lambda: papers.files(site.config)), "site.key is not a readable private key")
    bad(only(lambda: papers.plans(site.config)), "plans.pub is not a readable public key")


def test_a_certificate_of_another_key_ca_or_site(site, tmp_path):
    keys, now = (
        site.config.keys,
        pki.ends(pki.read_certificate((site.config.keys / "site.pem").read_text())) - 86400 * 29,
    )
    hub = server.Home(tmp_path / "hub")
    admit(hub, "b", tmp_path / "b", Settings(tmp_path / "data.csv", ["heart"], 3.0, 1e-4))
    looked = lambda: only(lambda: papers.certificate(site.config, now))  # noqa: E731
    assert looked().state == "ok"
    (keys / "site.pem").write_text((tmp_path / "b" / "keys" / "site.pem").read_text())
    bad(looked(), "not for the key in site.key")
    public = pki.load_key(keys / "site.key").public_key()
    pki.make_ca(tmp_path / "other", "other")
    (keys / "site.pem").write_text(pki.sign(tmp_path / "other", public, "a", "site", days=30))
    bad(looked(), "not issued by the CA")
    (keys / "site.pem").write_text(pki.sign(hub.tls, public, "c", "site", days=30))
    bad(looked(), "is for 'c'", "site: a")


@pytest.mark.parametrize(
    "days,state,words",
    [(-1, "wrong", "not yet"), (1, "ok", "until"), (19.9, "ok", "until"), (20.1, "warning", "a third of its life"),
     (29.9, "warning", "a third"), (30.1, "wrong", "has expired")],
)  # fmt: skip
def test_a_certificate_by_how_much_of_its_life_is_left(site, days, state, words):
    begins = pki.ends(pki.read_certificate((site.config.keys / "site.pem").read_text())) - 30 * 86400
    row = only(lambda: papers.certificate(site.config, begins + days * 86400))
    assert row.state == state and words in row.found
    assert bool(row.mend) == (state != "ok")


def test_the_consortium_is_named_with_the_fingerprint_that_people_compare(site):
    ca = pki.read_certificate((site.config.keys / "ca.pem").read_text())
    row = only(lambda: papers.authority(site.config, pki.ends(ca) - 1))
    bad(row, pki.fingerprint(ca), "less than a third", "operator", state="warning")


# --- host ---


def test_a_disk_that_is_nearly_full_or_cannot_be_written(folder, site, monkeypatch):
    needed = 3 * site.config.policy.max_download_mb
    usage = shutil.disk_usage(folder)
    for free, state in ((needed, "ok"), (needed - 1, "warning")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free * 2**20))
        row = only(lambda: doctor._disk(site))
        assert row.state == state and f"{free} MB" in row.found
    bad(row, "policy.max_download_mb", state="warning")

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", lambda **_: Full())
    bad(only(lambda: doctor._disk(site)), "nothing can be written", "No space left", "make room")


@pytest.mark.parametrize(
    "total,free,state,words",
    [(8192, 700, "ok", "700 of 8192"), (8191, 8000, "warning", "lower it"), (9000, 599, "warning", "close other")],
)
def test_memory_is_held_against_what_the_policy_allows(site, total, free, state, words):
    row = only(lambda: doctor._memory(site, total, free))
    assert row.state == state and words in row.found + row.mend


def test_the_hosts_memory_is_in_megabytes():
    total, free = doctor.host_memory()
    assert 100 < free <= total < 10**8 and total <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
