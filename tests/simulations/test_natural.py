"""The natural partition: whose rows are whose follows from a column of the sites' tables."""

from collections import defaultdict

import pytest
import torch

from fedtailor.config import build, load
from fedtailor.datasets import Loaded
from fedtailor.errors import ConfigError
from fedtailor.population import Population
from fedtailor.recipe import Recipe
from fedtailor.result import model_bytes
from fedtailor.simulations.natural import read_with
from fedtailor.simulations.run import simulate
from fedtailor.simulations.setting import prepare

QUIET = {"evaluation": {"baseline": False}}
SITE = {"unit": "site", "epsilon": 8.0, "delta": 1e-4, "clip": 1.0, "noise_multiplier": 2.0}


def with_wards(sources, wards=7):
    """Each site's rows are of wards in turn; no feature is in the column."""
    found = {}
    for shift, (site, source) in enumerate(sources.items()):
        table = source.table()
        found[site] = Loaded(table | {"ward": [f"w{(i + shift) % wards}" for i in range(len(table["ill"]))]})
    return found


def people(column="ward", cohort=3, **more):
    return Population(partition="natural", column=column, cohort=cohort, **more)


def ready(plan, sources, of):
    how = {"block": 64, "path": "loop", "policies": None, "step_s": None}
    return prepare(plan, sources, **how, population=of, on_event=lambda event: None)


def test_a_client_has_the_training_rows_of_one_value(plan, sources):
    """Which are found again by their content, on a way of their own: a row's cell stands beside what it became."""
    sources = with_wards(sources)
    study = ready(plan(), sources, people())
    assert study.population.clients == 7
    rows, recipe = torch.cat([one.train.x for one in study.data.values()]), build(plan().recipe, Recipe)
    wards = defaultdict(set)
    for source in sources.values():
        table = source.table()
        for ward in sorted(set(table["ward"])):
            mine = [i for i, one in enumerate(table["ward"]) if one == ward]
            parts = recipe.prepare({name: [cells[i] for i in mine] * 4 for name, cells in table.items()})
            wards[ward] |= {tuple(x.tolist()) for x in torch.cat([parts.train.x, parts.test.x])}
    seen = []
    for client, ward in enumerate(sorted(wards)):
        of = study.clients.fed(0, [client])
        mine = of.batches["rows"][0][of.batches["live"][0] > 0].unique()
        assert len(mine) and {tuple(x.tolist()) for x in rows[mine]} <= wards[ward]
        seen.append(int(of.counts))
    assert sum(seen) == len(rows) and min(seen) > 10


def test_places_are_the_training_rows_in_the_table(plan, sources):
    recipe, table = build(plan().recipe, Recipe), sources["west"].table()
    found = recipe.prepare(table)
    again = [float(table["ill"][place]) for place in found.places.tolist()]
    assert found.train.y.tolist() == again and 50 < len(again) < 90 and 0 < sum(again) < len(again)


def test_sites_as_clients_train_as_sites(plan, sources):
    """One client a site, all of them asked and each taking one step on all rows: a round is the plan's own."""
    made = plan(**QUIET, local={"steps": 1, "rate": 1.0, "lr": 0.3})
    by_sites, by_column = simulate(made, sources)[1], simulate(made, sources, population=people("site"))[1]
    assert all(torch.allclose(by_sites[name], by_column[name], atol=1e-6) for name in by_sites)


@pytest.mark.slow
def test_the_result_says_how_many_and_a_sweep_knows_it_again(plan, sources):
    of = people()
    result, params = simulate(plan(**QUIET), with_wards(sources), population=of)
    assert result.population["clients"] == 7 and of.made(result.population) and of.clients is None
    told, again = simulate(plan(**QUIET), with_wards(sources), population=people(clients=7), block=1)
    assert all(torch.allclose(params[name], again[name], atol=1e-6) for name in params)
    assert people(clients=7).made(told.population) and not people(cohort=2).made(result.population)
    assert not people(clients=8).made(result.population) and not of.made(None)


def test_a_checkpoint_of_other_clients_is_refused(plan, sources, tmp_path):
    """The same rows, whose owners are others now: nothing else tells the two apart."""
    made, at = plan(**QUIET), {"checkpoint": tmp_path / "checkpoint", "every_s": 0.0, "population": people(clients=7)}

    def stop(event):
        if event["kind"] == "round" and event["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(made, with_wards(sources), **at, on_event=stop)
    other = with_wards(sources)
    other["north"].table()["ward"].reverse()
    with pytest.raises(ConfigError, match="other settings or other data"):
        simulate(made, other, **at, resume=True)
    whole = simulate(made, with_wards(sources), population=people(clients=7))[1]
    assert model_bytes(simulate(made, with_wards(sources), **at, resume=True)[1]) == model_bytes(whole)


@pytest.mark.parametrize(
    ("of", "words"),
    [
        (
            {"column": "wrad"},
            "population.column: 'wrad' is no column at north; there are a, b, c, ill, ward; did you mean",
        ),
        ({"column": None}, "population.column: None; name the column"),
        ({"column": 3}, "population.column: 3; name the column"),
        ({"clients": 9}, "population.clients: 9, but the sites' training rows have 7 values of 'ward'; use null, or 7"),
        ({"cohort": 8}, "population.cohort: 8, but .* 7 values of 'ward'; ask 7 clients at most"),
        ({"minimum": 30}, "population=natural: column='ward': minimum=30: 'w[0-9]' has [0-9]+ rows"),
        ({"alpha": 1.0}, "population=natural, column='ward', alpha=1.0: .*unexpected keyword argument 'alpha'"),
    ],
)
def test_what_does_not_fit_is_named(plan, sources, of, words):
    with pytest.raises(ConfigError, match=words):
        ready(plan(), with_wards(sources), people(**of))


def test_what_only_the_data_know_is_refused_where_it_must_be_known_before(plan, sources):
    some = with_wards(sources)
    some["south"].table()["ward"][:] = [""] * 60
    with pytest.raises(ConfigError, match="population=natural: column='ward': [0-9]+ of [0-9]+ rows have no value"):
        ready(plan(), some, people())
    with pytest.raises(ConfigError, match="population.clients: null, but with privacy.unit=site the accountant"):
        ready(plan(privacy=SITE), with_wards(sources), people())
    assert ready(plan(privacy=SITE), with_wards(sources), people(clients=7)).duty(1).sampling == (3, 3 / 7)
    scaffold = {"_target_": "fedtailor.strategies.scaffold", "population": 4}
    with pytest.raises(ConfigError, match="strategy.population: 4, but there are 7 clients"):
        ready(plan(strategy=scaffold), with_wards(sources), people())
    with pytest.raises(ConfigError, match="clients: null is for population=natural"):
        load(["study=heart", "population=iid", "population.clients=null"])
    own = {**with_wards(sources), "north": Loaded(sources["north"].table() | {"site": ["x"] * 40})}
    with pytest.raises(ConfigError, match="population.column: 'site' is no column at south"):
        ready(plan(), own, people("site"))


def test_a_recipe_that_does_not_say_which_rows_is_refused(plan, sources):
    recipe = build(plan().recipe, Recipe)
    silent = recipe._replace(prepare=lambda table: recipe.prepare(table)._replace(places=None))
    with pytest.raises(ConfigError, match="does not say which rows of a table it trains on .Dataset.places."):
        read_with("ward", plan(), silent, with_wards(sources))


def test_it_is_a_choice_of_the_command_line():
    of = load(["study=heart", "population=natural", "population.column=subject"]).simulation.population
    assert of.clients is None and of.options == {"column": "subject", "minimum": 1}
