"""Rows that a device does not hold: they stay on the host, and each block's come with it."""

import pytest
import torch
from strays import OTHER

from fedtailor.config import build
from fedtailor.population import Population
from fedtailor.recipe import Dataset, Part, Recipe
from fedtailor.simulations import hardware
from fedtailor.simulations.cohort import prepared
from fedtailor.simulations.hardware import HOST, across, home_of_rows
from fedtailor.simulations.run import simulate

RECORD = {"unit": "record", "epsilon": 8.0, "delta": 1e-4, "clip": 1.0, "noise_multiplier": 1.0}
SPLIT = Population(partition="iid", clients=12, cohort=5)


@pytest.mark.parametrize("privacy", [None, RECORD], ids=["plain", "record"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"path": "vmap", "block": 2},
        {"path": "loop"},
        {"population": SPLIT},
        pytest.param({"workers": 2}, marks=pytest.mark.slow),
        pytest.param({"steps": "compiled"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_does_not_show_where_rows_lie(how, privacy, plan, sources):
    events = []
    held, streamed = (
        simulate(plan(privacy=privacy), sources, rows=where, on_event=events.append, **how)
        for where in ("device", "host")
    )
    for name, p in held[1].items():
        torch.testing.assert_close(streamed[1][name], p, rtol=1e-6, atol=1e-6)
    for kind, metrics in held[0].metrics.items():
        assert streamed[0].metrics[kind] == pytest.approx(metrics, abs=1e-4)
    assert len({e["path"] for e in events if e["kind"] == "path"}) == 1


def test_a_block_brings_its_own_rows_and_no_others(monkeypatch):
    """Nothing that has a table's length leaves the host."""
    seen = []
    monkeypatch.setattr(hardware, "placed", lambda device, what: seen.append(what) or what)

    def many(cast, memory, batches, live, counts):
        assert "rows" not in batches
        return {"x": batches["x"]}, {"y": batches["y"]}

    table = Part(torch.arange(600.0).view(300, 2), torch.arange(300))
    numbers = torch.tensor([[[3, 5]], [[299, 0]]])
    one = torch.ones(2, 1)
    given = {}, {}, {"rows": numbers, "live": torch.ones(2, 1, 2)}, one, one[:, 0]
    summand, memory = across(many, HOST, HOST, table)(*given)
    assert torch.equal(summand["x"], table.x[numbers]) and torch.equal(memory["y"], numbers)
    assert all(len(leaf) == 2 for what in seen for leaf in what.values())


@pytest.mark.parametrize(
    ("asked", "free", "where"),
    [("auto", 8000, "cuda"), ("auto", 7999, "cpu"), ("device", 1, "cuda"), ("host", 10**9, "cpu")],
)
def test_rows_that_take_over_half_of_a_gpus_free_memory_stay(asked, free, where, monkeypatch):
    part = Part(torch.zeros(100, 3), torch.zeros(100, dtype=torch.long))  # 1,200 and 800 bytes
    data = {site: Dataset(part, part, "", 200) for site in "a"}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    assert home_of_rows(asked, torch.device("cuda"), data).type == where
    assert home_of_rows("auto", HOST, data) == home_of_rows("host", HOST, data) == HOST


def test_metrics_are_measured_on_the_device_wherever_parts_lie(plan, sources):
    from fedtailor.simulations.conclusion import _evaluated

    made_up = plan()
    recipe, seen = build(made_up.recipe, Recipe), []
    part = prepared(made_up, recipe, sources)["north"].test
    there = recipe._replace(
        model=lambda: recipe.model().to(OTHER), metrics=lambda outputs, y: seen.append((outputs.device, y.device)) or {}
    )
    _evaluated(there, {name: p.detach() for name, p in recipe.model().named_parameters()}, part, OTHER)
    assert seen == [(OTHER, OTHER)]
