"""What people bring that is wrong or too large, through a whole simulation: a clear word, or the same result."""

import pytest
import torch

from fedtailor.datasets import Loaded
from fedtailor.errors import ContractError
from fedtailor.population import Population
from fedtailor.simulations import crew, paths
from fedtailor.simulations.cohort import rows_of
from fedtailor.simulations.run import simulate
from fedtailor.simulations.setting import prepare

RECORD = {"unit": "record", "epsilon": 8.0, "delta": 1e-4, "clip": 1.0, "noise_multiplier": 1.0}


def test_a_class_that_the_contract_does_not_know_is_named_with_its_row(plan, sources):
    table = {name: list(cells) for name, cells in sources["south"].table().items()}
    table["ill"][6] = "2"
    with pytest.raises(ContractError, match=r"south.*ill.*(7|row 6).*'2'|ill.*row.*2"):
        simulate(plan(), sources | {"south": Loaded(table)})


def test_a_table_without_rows_is_refused_by_its_contract(plan, sources):
    """A site whose rows are all held out takes no part and is named: tests/simulations/test_cohort.py."""
    empty = Loaded({name: [] for name in sources["south"].table()})
    with pytest.raises(ContractError, match="south: 0 rows; the contract 'made-up' asks for at least 20"):
        simulate(plan(), sources | {"south": empty})


@pytest.mark.parametrize("privacy", [None, RECORD], ids=["plain", "record"])
def test_clients_of_one_row_or_two(plan, sources, privacy):
    """All are far smaller than a batch, and most steps of most see nobody."""
    tiny = Population(partition="iid", clients=60, cohort=30)
    ends = [simulate(plan(privacy=privacy), sources, population=tiny, block=block)[1] for block in (1, 7, 64)]
    for end in ends:
        torch.testing.assert_close(end, ends[0], rtol=1e-5, atol=1e-6)
        assert all(bool(p.isfinite().all()) for p in end.values())


def short_of_memory(monkeypatch, most, sizes):
    """A block engine that has room for so many clients."""
    whole = paths.block_train

    def block_train(*given, **how):
        inner = whole(*given, **how)

        def many(cast, memory, batches, live, counts):
            sizes.append(len(live))
            if len(live) > most:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
            return inner(cast, memory, batches, live, counts)

        return many

    monkeypatch.setattr(paths, "block_train", block_train)


@pytest.mark.parametrize("privacy", [None, RECORD], ids=["plain", "record"])
def test_a_simulation_that_runs_out_of_memory_halves_its_blocks_and_goes_on(plan, sources, monkeypatch, privacy):
    many, events, sizes = Population(partition="iid", clients=20, cohort=16), [], []
    expected = simulate(plan(privacy=privacy), sources, population=many)[1]
    short_of_memory(monkeypatch, 5, sizes)
    found = simulate(plan(privacy=privacy), sources, population=many, on_event=events.append)[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert max(sizes) > 5 and [e["block"] for e in events if e.get("why") == "out of memory"] == [8, 4]
    assert sum(size > 5 for size in sizes) == 2, "it forgot from round to round what fits"


def test_so_does_a_worker_and_remembers_it(plan, sources, monkeypatch, capsys):
    how = {"block": 64, "path": "block", "policies": None, "step_s": None, "population": None}
    setting = prepare(plan(), sources, **how, on_event=lambda event: None)
    duty, sizes = setting.duty(1), []
    fed = setting.clients.fed(0, [0, 1, 2])
    told = {"cast": setting.strategy.broadcast(setting.strategy.init(setting.start)), "memory": {}}
    told |= {"batches": fed.batches, "live": fed.live, "counts": fed.counts}
    expected = crew.served(duty, rows_of(setting.data))(told)
    short_of_memory(monkeypatch, 1, sizes)
    work = crew.served(duty, rows_of(setting.data))
    for _ in range(2):
        torch.testing.assert_close(work(told), expected, rtol=1e-5, atol=1e-6)
    assert sizes == [3, 1, 1, 1, 1, 1, 1] and "1 at once from now on" in capsys.readouterr().err
