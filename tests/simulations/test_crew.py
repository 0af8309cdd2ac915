"""Several processes that share a round's clients: they give what one gives, whatever is trained, and die loudly."""

import os
import signal

import pytest
import torch

from fedtailor.errors import ConfigError, FedtailorError
from fedtailor.policy import Policy
from fedtailor.population import Population
from fedtailor.simulations import crew as crews
from fedtailor.simulations.cohort import rows_of
from fedtailor.simulations.crew import Died, crew
from fedtailor.simulations.paths import Unfit
from fedtailor.simulations.run import simulate
from fedtailor.simulations.setting import prepare

QUIET = {"evaluation": {"baseline": False}}
HOW = {"block": 64, "path": "auto", "policies": None, "step_s": None, "population": None}
SITE = {"unit": "site", "epsilon": 8.0, "delta": 1e-4, "clip": 1.0, "noise_multiplier": 1.0}
PLANS = {
    "a sum": {},
    "a stack": {"strategy": {"_target_": "fedtailor.strategies.median"}},
    "memories": {"strategy": {"_target_": "fedtailor.strategies.scaffold", "population": 3}},
    "packed": {"strategy": {"_target_": "fedtailor.strategies.topk", "fraction": 0.5, "of": {"name": "fedavg"}}},
    "record-level": {"privacy": {"epsilon": 3.0, "delta": 1e-4, "clip": 1.0}},
    "site-level": {"privacy": SITE},
    "answers on their way": {"buffer": {"answers": 2}, "quorum": 1},
}


def equal(one, other):
    (a, p), (b, q) = one, other
    for name in p:
        torch.testing.assert_close(p[name], q[name], rtol=1e-5, atol=1e-6)
    assert {s: r.bytes_sent for s, r in a.sites.items()} == {s: r.bytes_sent for s, r in b.sites.items()}


FIRST = ("record-level",)  # the others are tried by `make test-slow`


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.slow) for n in PLANS])
def test_two_give_what_one_gives(plan, sources, name):
    made = plan(**QUIET, **PLANS[name])
    equal(simulate(made, sources), simulate(made, sources, workers=2))


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 7])
def test_a_population_in_blocks_of_any_size_by_more_processes_than_clients_too(plan, sources, block):
    made = plan(**QUIET, strategy={"_target_": "fedtailor.strategies.scaffold", "population": 40})
    of = Population(partition="dirichlet_split", clients=40, cohort=9, alpha=1.0)
    alone = simulate(made, sources, population=of)
    equal(alone, simulate(made, sources, population=of, block=block, workers=2))
    two = plan(**QUIET)
    few = Population(partition="iid", clients=40, cohort=1)
    equal(simulate(two, sources, population=few), simulate(two, sources, population=few, workers=2))


@pytest.mark.slow
def test_rules_see_every_sites_answer(plan, sources):
    made = plan(**QUIET, quorum=2, norm=50.0)
    rules = dict.fromkeys(made.sites, Policy(studies=("made-up",), epsilon=9.0, delta=1e-3, without_privacy=True))
    alone, together = (simulate(made, sources, policies=rules, workers=n) for n in (1, 2))
    equal(alone, together)
    assert [d["site"] for d in together[0].dropped] == ["west"] == [d["site"] for d in alone[0].dropped]


@pytest.mark.slow
def test_a_run_of_two_goes_on_from_its_checkpoint(plan, sources, tmp_path):
    at = {"checkpoint": tmp_path / "checkpoint", "every_s": 0.0, "workers": 2}
    whole = simulate(plan(**QUIET), sources, workers=2)[1]

    def stop(event):
        if event["kind"] == "round" and event["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(plan(**QUIET), sources, **at, on_event=stop)
    with pytest.raises(ConfigError, match="other settings"):  # sums of other parts are rounded otherwise
        simulate(plan(**QUIET), sources, **at | {"workers": 1}, resume=True)
    again = simulate(plan(**QUIET), sources, **at, resume=True)[1]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.fixture
def two(plan, sources):
    study = prepare(plan(**QUIET), sources, **HOW, on_event=lambda event: None)
    with crew(2, study.duty(1), rows_of(study.data)) as running:
        yield study, running


def given(study):
    at = study.begin()
    fed = study.clients.fed(0, [0, 1, 2])
    return study.strategy.broadcast(at.state), at.memory, fed.batches, fed.live, fed.counts


def test_one_that_is_killed_ends_the_simulation_and_says_what_to_do(two):
    study, running = two
    assert running.many(*given(study))
    os.kill(running.processes[1].pid, signal.SIGKILL)
    with pytest.raises(Died, match="ended with signal 9; where memory was short, take fewer simulation.workers"):
        running.many(*given(study))
    running.__exit__()
    assert all(process.returncode is not None for process in running.processes)


def test_what_one_of_them_starts_can_neither_read_nor_write_their_pipes(two):
    study, running = two
    running.many(*given(study))
    for process in running.processes:
        open_there = {
            int(fd): os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")
        }
        ours = {os.readlink(f"/proc/self/fd/{pipe.fileno()}") for pipe in (process.stdin, process.stdout)}
        assert open_there[0] == "/dev/null" and ours <= set(open_there.values())
        assert not ours & {open_there[fd] for fd in (0, 1, 2)}, "who is started inherits these three"


def test_what_goes_wrong_in_one_is_said_in_its_words(two):
    study, running = two
    cast, memory, batches, live, counts = given(study)
    with pytest.raises(FedtailorError, match="KeyError: 'layers.head.weight'"):
        running.many({"params": {"layers.head.bias": torch.zeros(1)}}, memory, batches, live, counts)


def test_they_end_with_whoever_started_them(plan, sources, monkeypatch):
    started = []
    monkeypatch.setattr(crews.Crew, "many", lambda self, *_: started.extend(self.processes) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        simulate(plan(**QUIET), sources, workers=2)
    assert len(started) == 2 and all(process.returncode is not None for process in started)


def test_a_model_that_cannot_be_batched_is_refused_before_anything_is_started(plan, sources, monkeypatch):
    monkeypatch.setattr("fedtailor.simulations.paths.unfit", lambda *_: Unfit("it mixes examples"))
    with pytest.raises(ConfigError, match="simulation.path: block, but it mixes examples"):
        simulate(plan(**QUIET), sources, path="block", workers=2)
