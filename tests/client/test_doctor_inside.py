"""What the doctor finds inside a site: its records, its data, what confines its training process, and its daemon."""

import sqlite3
from contextlib import closing

import pytest
from hub import Hub
from ward import admitted, bad, change, only, worker

from fedtailor import control, store
from fedtailor.client import doctor
from fedtailor.client.audit import Audit, heads
from fedtailor.client.chain import Chain
from fedtailor.client.confine import Confinement
from fedtailor.client.doctor import Site
from fedtailor.client.ledger import Cap, Charge, Ledger
from fedtailor.client.signing import load_signer
from fedtailor.client.site import Home
from fedtailor.config import load
from fedtailor.privacy.planning import resolve

WELL = Confinement("both", 6, True, False, 8192, 3600)


@pytest.fixture
def site(tmp_path):
    folder = admitted(tmp_path)
    return Site(Home(folder), Home(folder).config(), None)


# --- records ---


@pytest.fixture
def records(site):
    """The site's three logs, with something in each."""
    state, hand = site.home.state, load_signer(site.config.keys)
    ledger, egress = Ledger(state / "ledger.db", hand), Chain(state / "egress.jsonl", hand)
    audit = Audit(state / "audit.jsonl", hand)
    audit.begin(ledger, egress, site.home.folder / "site.yaml")
    ledger.reserve(
        account="heart", fingerprint="f", study="s", visit="v", charge=Charge(1.0, 0.1, 1), cap=Cap(3.0, 1e-4)
    )
    egress.append(run="r", round=0, bytes=1, sha256="0" * 64, epsilon=None, metrics=[])
    audit.note("daemon", "stopped", **heads(ledger, egress))
    ledger.close()
    return state


def test_records_that_hold(records, site):
    before = {path: path.read_bytes() for path in records.iterdir() if path.is_file()}
    row = only(lambda: doctor._records(site))
    assert row.state == "ok" and "4 of the audit, 2 of the egress, 2 of the ledger" in row.found
    assert {path: path.read_bytes() for path in records.iterdir() if path.is_file()} == before


def test_a_record_that_was_changed_or_put_back(records, site):
    path = records / "egress.jsonl"
    kept = path.read_bytes()
    path.write_bytes(kept.replace(b'"bytes":1', b'"bytes":2'))
    bad(only(lambda: doctor._records(site)), "egress: record 2", "audit verify")
    path.write_bytes(kept.splitlines(keepends=True)[0])
    bad(only(lambda: doctor._records(site)), "egress: record 2", "an older copy was put back")
    path.write_bytes(b"nothing\n")
    bad(only(lambda: doctor._records(site)), "record 1")


@pytest.mark.parametrize(
    "damage", ["UPDATE events SET noise_multiplier = 9 WHERE id = 2", "UPDATE keys SET key = x'00'", "DELETE FROM keys"]
)
def test_a_ledger_that_was_changed(records, site, damage):
    with closing(sqlite3.connect(records / "ledger.db")) as db, db:
        db.execute(damage)
    bad(only(lambda: doctor._records(site)), "ledger", "record 2")


# --- data ---


def data(site, recipe=None):
    return only(lambda: doctor._data(site._replace(recipe=recipe)))


def test_data_that_satisfy_the_contract_with_what_people_should_know(site):
    row = data(site)
    assert row.state == "ok" and "303 rows satisfy the contract of study heart; ca: missing in 4" in row.found
    assert "of recipe heart_mlp" in data(site, "heart_mlp").found
    bad(data(site, "hart"), "recipe=hart", "did you mean 'heart'")


@pytest.mark.parametrize("count", [30, 100, 101])
def test_every_problem_of_the_data_is_told_and_that_they_may_quote_rows(site, count):
    path = site.config.data.path
    head, *lines = path.read_text().splitlines()
    for i in range(count):
        lines[i] = lines[i].replace(lines[i].split(",")[0], "777", 1)
    path.write_text("\n".join([head, *lines]))
    row = data(site)
    bad(row, "row 1:", "row 30:", "do not send it on")
    assert row.found.count("777") == min(count, 100)
    assert ("and more: only the first 100 are told" in row.found) == (count > 100)


@pytest.mark.parametrize(
    "text,words",
    [("age,sex\n1,1\n", "column 'cp' is missing"), ("", "is empty"), ("a,b\n1\n", "line 2"), (None, "is not a file")],
)
def test_data_that_are_no_table(site, text, words):
    site.config.data.path.unlink()
    if text is not None:
        site.config.data.path.write_text(text)
    bad(data(site), words)


def test_the_newest_proposal_says_which_contract(site):
    hub, plans = Hub("a"), site.home.state / "plans"
    for i, (run, recipe) in enumerate([("old", "heart"), ("new", "heart_mlp"), ("older", "heart")]):
        plan = resolve(load(["study=heart", "sites=[a]", "quorum=1", f"recipe={recipe}"]).plan)
        made = hub.propose(plan, run, created=[2, 3, 1][i])
        (plans / run).mkdir(parents=True)
        store.write_text(plans / run / "proposal.json", made.canonical())
    assert doctor.recipe_of(site)[0].model_extra["model"] == "mlp" and "of run new" in data(site).found


def test_without_a_plan_or_an_installed_study_a_recipe_can_be_named(site):
    site = change(site.home.folder, studies=["lung"])
    bad(data(site), "303 rows", "no plan has come yet", "--recipe", state="warning")
    assert data(site, "heart").state == "ok"


# --- the training process ---


def look(site, held=True):
    return [row for row in doctor.tried("worker", lambda: doctor._worker(site, held))]


def test_a_host_that_offers_less_is_said_and_is_wrong_where_the_site_requires_it(site, monkeypatch):
    for found, state, strict in [
        (WELL, "ok", "ok"),
        (WELL._replace(network="seccomp", missing=("a network namespace: no",)), "warning", "warning"),
        (WELL._replace(files=0, missing=("files: no Landlock",)), "warning", "wrong"),
        (WELL._replace(network="none", missing=("no sockets",)), "warning", "wrong"),
    ]:
        worker(monkeypatch, found._asdict(), {})
        for config in (site.config, change(site.home.folder, confinement="required").config):
            (row,) = look(site._replace(config=config))
            assert row.state == (strict if config.confinement == "required" else state), row
            assert row.found.startswith("network: ") and all(text in row.found for text in found.missing)
            assert bool(row.mend) == (row.state != "ok")
    assert not [path for path in site.home.state.iterdir() if path.name.startswith(".doctor")]


def test_a_training_process_that_ends_or_may_not_read_the_data(site, monkeypatch):
    worker(monkeypatch)
    (row,) = look(site)
    bad(row, "ended with code 1", "it said: gone")
    worker(monkeypatch, WELL._asdict(), {"error": "contract", "text": "data: cannot read it: Permission denied"})
    confined, row = look(site)
    assert confined.state == "ok"
    bad(row, "Permission denied", "root's neither")
    assert len(look(site, held=False)) == 1  # what is wrong with the data was said before


def test_a_running_daemons_scratch_folder_is_left_alone(site, monkeypatch):
    (site.home.state / "work").mkdir()
    (site.home.state / "work" / "answer").touch()
    worker(monkeypatch, WELL._asdict(), {})
    look(site)
    assert (site.home.state / "work" / "answer").exists()


# --- the daemon ---


def test_a_daemon_that_runs_and_one_that_does_not(site):
    bad(only(lambda: doctor._daemon(site.home)), "none runs", "fedtailor client up", state="warning")
    server = control.serve(control.socket_of(site.home.folder), "Site", {}, {})
    try:
        assert only(lambda: doctor._daemon(site.home)).state == "ok"
    finally:
        server.stop(0).wait()
