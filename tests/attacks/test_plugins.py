"""Third-party code that a site has not approved is run by neither its daemon nor its training process.

The daemon's parts are real and in the test's process; the training process is a real one, in its cell. What is imported
in the first leaves a file, in the second a line in its log.
"""

import contextlib
import sys

import plugged
import pytest
from turned import HUB, Site
from ward import admitted, change

from fedtailor import Strategy, plugins
from fedtailor.client import plans
from fedtailor.client.daemon import Daemon
from fedtailor.client.desk import Desk
from fedtailor.client.doctor import Site as Examined
from fedtailor.client.doctor import examine, recipe_of
from fedtailor.client.workshop import Workshop
from fedtailor.config import build, load
from fedtailor.errors import FedtailorError, RefusedError
from fedtailor.inspection import sentences

OURS = ["study=heart", "privacy=none", "sites=[a,b]", "quorum=1", "rounds=3"]
RECIPE = (
    plugged.MODULE
    + """
from fedtailor import recipes
from fedtailor.recipe import Recipe
def table() -> Recipe:
    return recipes.tabular("heart")
"""
)


@pytest.fixture
def folder(tmp_path):
    with plugged.folder(tmp_path / "installed") as made:
        made.install("plug")
        yield made


class Attacked(Site):
    """A site to which a study comes that runs the plug-in; nothing of it is imported yet."""

    def __init__(self, at, folder, approved):
        super().__init__(at)
        self.folder = folder
        policy = self.config.policy.model_copy(update={"plugins": approved})
        self.config = self.visits.config = self.config.model_copy(update={"policy": policy})
        self.workshop = self.visits.workshop = Workshop(self.config, self.log)
        self.visits.plans.approved = approved
        self.desk = Desk(self.visits, lambda: None, lambda: "")

    def study(self, run="r"):
        """The coordinator has the plug-in, and proposes."""
        of = HUB.propose(load([*OURS, "strategy=plug"]).plan, run)
        self.folder.forget()
        assert "plug" not in sys.modules
        return of

    def seen(self):
        """Who has run the plug-in's code: the daemon, the training process."""
        log = self.log.read_text() if self.log.exists() else ""
        return self.folder.imported, "HERE I AM" in log


@pytest.fixture
def site(tmp_path, folder):
    made = []

    def with_approved(approved):
        at = tmp_path / f"site{len(made)}"
        at.mkdir()
        made.append(Attacked(at, folder, approved))
        return made[-1]

    yield with_approved
    for one in made:
        one.workshop.stop()
        one.ledger.close()


def sha256():
    return plugins.installed()[0].sha256()


def test_what_is_approved_runs_in_both(site):
    """What the others show is that it does not."""
    it = site({"plug": sha256()})
    left = it.asked(it.study())
    assert left.words == [] and len(left.payloads) == 1 and it.seen() == (True, True)


@pytest.mark.parametrize("approved", [{}, {"plug": "0" * 64}, {"another": "1" * 64}])
def test_what_is_not_approved_runs_nowhere(site, approved):
    it = site(approved)
    of = it.study()
    assert it.asked(of, times=2).words == ["plugin", "plugin"]
    known = it.visits.plans.find("r")  # on file, for people to see
    shown = it.desk.show({"plan": "r"})
    assert [rule["code"] for rule in shown["rules"] if not rule["ok"]] == ["plugin"]
    for ask in (it.desk.check, it.desk.approve):
        with pytest.raises(RefusedError, match=f"third-party code: the plan asks plug 1.0, sha256 {sha256()}") as error:
            ask({"plan": "r", "who": "ann"})
        assert error.value.code == "plugin"
    it.visits.plans.decide(known, "approved", "ann")  # however it came to be
    assert it.asked(of).words == ["plugin"]
    assert it.seen() == (False, False)


def test_people_see_what_would_run_and_whether_it_may(site):
    for approved, words in (({}, "NOT approved"), ({"plug": sha256()}, "this site's policy approves it")):
        it = site(approved)
        with contextlib.suppress(RefusedError):
            it.visits.plans.take(HUB.visit(it.study()))
        (line,) = [line for line in sentences(it.desk.show({"plan": "r"})) if "THIRD-PARTY" in line]
        assert f"plug 1.0, sha256 {sha256()}" in line and words in line


def test_code_that_changes_after_its_approval_does_not_run_on(site, folder):
    it = site({"plug": sha256()})
    of = it.study()
    assert it.asked(of).words == []
    (folder.path / "plug" / "__init__.py").write_text(plugged.MODULE + "\nsys.stderr.write('AND CHANGED')\n")
    assert it.asked(of).words == ["plugin"]  # in the daemon that has loaded it
    folder.forget()
    assert it.asked(of).words == ["plugin"] and it.seen()[0] is False  # and in a new one
    with pytest.raises(RefusedError, match="it has changed since, so read it again"):
        it.visits.plans.verify(of)
    assert "AND CHANGED" not in it.log.read_text()


def test_a_plugin_that_is_not_here_is_named(site, folder):
    it = site({})
    of = it.study()
    for path in folder.path.glob("plug-1.0.dist-info/*"):
        path.unlink()
    assert it.asked(of).words == ["plugin"]
    with pytest.raises(RefusedError, match="plug, not installed here; allowed is .* ask the operator for the package"):
        it.visits.plans.verify(of)


def test_a_hostile_coordinator_that_does_not_say_so_is_refused_all_the_same(site):
    """It leaves the plug-in out of its list of code, or lists it under a wrong hash."""
    for code, approved, word in (({}, {}, "plugin"), ({"plugin:plug": "0" * 64}, {"plug": sha256()}, "code")):
        it = site(approved)
        of = it.study()
        kept = {key: value for key, value in of.code.items() if not key.startswith("plugin:")}
        assert it.asked(of.model_copy(update={"code": kept | code})).words == [word]
        assert it.seen() == (False, False)


# --- each defence by itself, and none ---


@pytest.mark.parametrize("defences", [(), ("plans",), ("process",), ("plans", "process")])
def test_each_of_the_daemons_two_defences_suffices(site, monkeypatch, defences):
    it = site({})
    of = it.study()
    if "plans" not in defences:
        monkeypatch.setattr(plans, "judge_plugins", lambda *_: [])
    if "process" in defences:
        plugins.only({})
    assert it.asked(of).words == ["plugin"]  # without either by the policy's rules, which come too late
    assert it.seen() == (not defences, False)


@pytest.mark.parametrize("approved", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_training_process_refuses_by_itself(site, folder, approved):
    """The daemon, turned, asks it for what was not approved when it was started: a strategy, a recipe."""
    folder.install("plug", RECIPE)
    it = site({"plug": sha256()} if approved else {})
    entry = it.home.inbox / "e"
    entry.mkdir()
    (entry / "payload.safetensors").write_bytes(it.cast)
    (entry / "head.json").write_text(HUB.visit(it.study(), cast=it.cast).model_dump_json())
    out = str(it.home.state / "work" / "o")
    visit = {"op": "visit", "entry": str(entry), "out": out, "key": None, "memory": None}
    for asked in (visit, {"op": "describe", "recipe": {"_target_": "plug.table"}}):
        if approved:
            it.workshop.ask(**asked)
        else:
            with pytest.raises(FedtailorError) as error:
                it.workshop.ask(**asked)
            assert error.value.code == "plugin"
    assert it.seen() == (False, approved)


@pytest.mark.parametrize("approved", [False, True])
def test_a_daemon_says_before_all_else_what_it_may_import(tmp_path, folder, approved):
    home = admitted(tmp_path)
    change(home, plugins={"plug": sha256()} if approved else {})
    Daemon(home)
    with contextlib.nullcontext() if approved else pytest.raises(RefusedError, match="does not approve plug 1.0"):
        build(load([*OURS, "strategy=plug"]).plan.strategy, Strategy)
    assert folder.imported == approved


@pytest.mark.parametrize("approved", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_doctor_runs_nothing_that_is_not_approved(tmp_path, folder, approved):
    folder.install("plug", RECIPE, yaml={"recipe/plug": "_target_: plug.table\n"})
    home = admitted(tmp_path)
    site = change(home, plugins={"plug": sha256()} if approved else {})
    rows = {row.name: row for row in examine(home, "plug")}
    assert folder.imported == approved
    assert rows["data"].state == ("ok" if approved else "wrong")
    assert approved or "policy.plugins does not approve plug 1.0" in rows["data"].found
    assert recipe_of(Examined(site.home, site.config, "plug"))[0].target == "plug.table"
