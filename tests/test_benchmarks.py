"""The benchmarks measure what they say: sizes and metrics by hand, the coordinator's own path, training that learns."""

import json
import math
from pathlib import Path

import pytest
import torch

from fedtailor.strategies import fedavg
from fedtailor.training import plain

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def one(values):
    """A linear model of one feature with slope 1, and rows with ``values``."""
    return {"weight": torch.ones(1, 1), "bias": torch.zeros(1)}, torch.tensor(values)[:, None]


def test_the_c_index_counts_known_pairs_and_half_of_a_tie():
    from benchmarks.flamby_data import c_index

    params, x = one([3.0, 1.0, 1.0, 2.0])
    y = torch.tensor([[1.0, 1.0], [1.0, 2.0], [0.0, 2.0], [1.0, 3.0]])  # event, time
    # 0 before 1, 2 and 3: right; 1 before 3: wrong; 1 before 2, who is censored when 1 dies: a tie.
    assert c_index(params, x, y) == pytest.approx(100 * 3.5 / 5)


def test_coxs_loss_is_over_who_is_at_risk_and_live():
    from benchmarks.flamby_data import cox

    params, x = one([0.0, math.log(2), math.log(3), 50.0])
    y = torch.tensor([[1.0, 3.0], [1.0, 1.0], [0.0, 2.0], [1.0, 9.0]])
    live = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert cox(params, x, y, live).tolist() == pytest.approx([0.0, math.log(3), 0.0, 0.0], abs=1e-6)
    slope = torch.func.grad(lambda p: cox(p, x, y, live).sum())(params)["weight"]
    among = (2 * math.log(2) + 3 * math.log(3)) / 6  # the mean feature at risk, by exp(score)
    assert float(slope) == pytest.approx(among - math.log(2), abs=1e-5)


def test_flambys_sites_have_flambys_sizes():
    from benchmarks import flamby_data as data

    for folder in (data.HEART, data.BRCA):
        if not folder.exists():
            pytest.skip(f"{folder}: it is not there (FEDTAILOR_DATA)")
    heart, brca = data.heart(), data.brca()
    assert [(len(s.x), len(s.test_x)) for s in heart.each] == [(199, 104), (172, 89), (30, 16), (85, 45)]
    # FLamby's own results of a model that says "ill" of everybody, site by site
    assert [round(float(s.test_y.mean()), 4) for s in heart.each] == [0.4615, 0.3708, 0.9375, 0.7778]
    assert heart.pooled.x.shape == (486, 13) and all(s.x.mean(0).abs().max() < 1e-5 for s in heart.each)
    sizes = [(248, 63), (156, 40), (164, 42), (129, 33), (129, 33), (40, 11)]
    assert [(len(s.x), len(s.test_x)) for s in brca.each] == sizes and brca.pooled.x.shape == (866, 39)


def test_a_pass_has_every_row_once():
    from benchmarks.data import passes

    index, live = passes(torch.arange(100, 111), 4, 7, torch.Generator().manual_seed(0))
    assert index.shape == live.shape == (7, 4) and live.sum(1).tolist() == [4, 4, 3, 4, 4, 3, 4]
    first, second = (index[part][live[part] > 0].tolist() for part in (slice(0, 3), slice(3, 6)))
    assert first != second and sorted(first) == sorted(second) == list(range(100, 111))


def test_federated_and_lone_training_learn_a_line():
    from benchmarks.flamby import TASKS, Arm, adam, federated
    from benchmarks.flamby_data import Site, Sites

    x = torch.randn(60, 13, generator=torch.Generator().manual_seed(1))
    y = (x[:, :1] > 0).float()
    each = [Site(x[part], y[part], x, y) for part in (slice(0, 20), slice(20, 60))]
    task, pooled = TASKS["heart"], Site(x, y, x, y)
    model = federated(task, Sites(each, pooled), Arm(fedavg()), 0.3, 2, seed=0)
    assert (
        task.score(model, x, y) > 90 > task.score(federated(task, Sites(each, pooled), Arm(fedavg()), 0.3, 0, 0), x, y)
    )
    assert task.score(adam(task._replace(adam=(0.1, 20)), pooled, False, 0, "pooled"), x, y) > 90


def test_the_network_trains_by_the_gradient_that_simulations_use():
    from benchmarks import lenet

    rng = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(4, 784, generator=rng), "y": torch.tensor([1, 2, 3, 4])}
    batch |= {"live": torch.tensor([1.0, 1.0, 1.0, 0.0]), "scale": torch.tensor(1 / 3)}
    params = lenet.start(0)
    torch.testing.assert_close(lenet.gradient(params, batch), plain(lenet.losses)(params, batch))
    assert torch.equal(params["1.weight"], lenet.start(0)["1.weight"])
    assert not torch.equal(params["1.weight"], lenet.start(1)["1.weight"])


def test_folding_is_measured_on_the_coordinators_own_path(tmp_path, monkeypatch):
    from benchmarks import folding

    monkeypatch.setattr(folding, "keep_heaps_few", lambda: None)  # it is for a process of its own
    (tmp_path / "transit").mkdir()
    root = folding.write_reply(tmp_path / "transit", 200_000)
    assert len(list((tmp_path / "transit").iterdir())) > 3  # a payload that is not inline
    assert folding.fold(tmp_path / "transit", root, 200_000, 3) >= 0  # says itself that all three were folded
    (tmp_path / "transit" / root).write_bytes(b"")
    with pytest.raises(AssertionError, match="format"):
        folding.fold(tmp_path / "transit", root, 200_000, 3)


def test_pfl_researchs_model_is_the_whole_of_it():
    from benchmarks.simulation_models import MODELS

    assert sum(p.numel() for p in MODELS["cnn"]().parameters()) == 1_626_442
    assert MODELS["cnn"]()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_ratio_is_of_a_turn_to_the_first_sides_around_it():
    from benchmarks.turns import Figures, Rounds, Side, in_turns, plain, table

    order, drift = [], iter(range(1, 100))

    def side(name, times, warm_up):
        def turn():
            order.append(name)
            return Rounds([times * next(drift)] * 3, warm_up)

        return turn

    sides = {"ours": Side(side("ours", 1, []), 2, (5.0, 1.0)), "loop": Side(side("loop", 3, []), 1, (4.0, 2.0), 30.0)}
    sides["peer"] = Side(side("peer", 7, [2.0, 9.0]))
    found = in_turns(sides, 2)
    assert order == ["ours", "loop", "ours", "peer", "ours", "loop", "ours", "peer", "ours"]
    assert found["ours"] == Figures([1, 3, 5, 7, 9], [], [[5.0, 1.0]], None, 2)
    assert found["loop"] == Figures([6, 18], [3, 3], [[4.0, 2.0]], 30.0, 1)  # although all grow slower and slower
    assert found["peer"] == Figures([28, 56], [7, 7], [[2.0, 9.0]] * 2, None, 1)
    rows = table({"a model": found}).splitlines()
    assert rows[2] == "| a model | ours | 5000.0 (1000.0 to 9000.0) | 1 | 6000.0 |  |"
    assert rows[3] == "| a model | loop | 12000.0 (6000.0 to 18000.0) | 3.00 (3.00 to 3.00) | 6000.0 | 30.0 |"
    assert json.loads(json.dumps(plain({"a model": found})))["a model"]["loop"] == found["loop"]._asdict()


def test_rounds_that_do_not_count_are_told_apart(monkeypatch, capsys):
    from benchmarks.peer_rounds import say
    from benchmarks.turns import Rounds, here

    threads, clock, took = [], [0.0], iter([40.0, 3.0, *[0.05] * 100])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def run():
        clock[0] += next(took)

    side = here(run, lambda: clock[0], threads=2, compiles=True)
    turn = side.turn()
    assert (side.warm_up_s, side.threads, set(threads)) == (pytest.approx((3.0, 0.05)), 2, {2})
    assert side.compile_s is not None and here(run, lambda: clock[0]).compile_s is None
    assert turn.seconds == pytest.approx([0.05] * 6) and not turn.warm_up_s  # three tenths of a second of them
    assert next(took) == 0.05 and len([*took]) == 100 - 1 - (1 + 6) - 2 - 1  # one before them does not count
    say([1.0, 6.0, 9.0, 10.0, 12.0])
    assert Rounds(**json.loads(capsys.readouterr().out)) == Rounds([1.0, 2.0], [5.0, 3.0])


def test_what_clipping_costs_is_a_multiple_of_the_run_without(monkeypatch):
    from benchmarks import simulation

    class Rehearsed:
        def __init__(self, model, clients, steps):
            self.model = model

        def ours(self, clip=None):
            return clip

    monkeypatch.setattr(simulation, "World", Rehearsed)
    monkeypatch.setattr(simulation, "here", lambda run: run)
    monkeypatch.setattr(simulation, "in_turns", lambda sides, turns: list(sides.items()))
    for sides in simulation.clipping(1, simulation.Peers()).values():
        assert sides == [("without clipping", None), ("with clipping", 1.0)]


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_whole_round_draws_its_batches_anew(monkeypatch):
    from benchmarks import simulation_world

    seen, asked = [], simulation_world.simulate_round
    monkeypatch.setattr(simulation_world, "simulate_round", lambda *a, **k: seen.append((a[4], asked(*a, **k))))
    world = simulation_world.World("tabular", 5, 4)
    for run in (world.whole(1.0, 1.0), world.ours(1.0, 1.0)):
        run()
        run()
    (first, _), (second, model), (there, _), (still, _) = seen
    assert first["live"].sum((1, 2)).tolist() != second["live"].sum((1, 2)).tolist() and still["live"] is there["live"]
    assert all((first["rows"][k] // 40 == k)[first["live"][k] > 0].all() for k in range(5))  # each of its own rows
    assert not torch.equal(model[0]["params"]["0.weight"], world.start["0.weight"])

    drawn = [len(rows) for _ in range(5) for rows in simulation_world._sampled(world.rows[0])]
    assert len(drawn) == 20 and len(set(drawn)) > 1 and 5 < sum(drawn) / 20 < 15
    world.opacus(1.0, 1.0, anew=True, draws=True)()


@pytest.mark.parametrize("epochs,times", [(1, 1), (3, 1), (1, 2)])
def test_every_client_sees_its_own_rows_once_an_epoch_in_an_order_of_the_rounds_own(epochs, times):
    from benchmarks import simulation_world

    world = simulation_world.World("tabular", 5, 4, epochs, times)
    for round, rows in enumerate(world.rounds):
        assert rows.shape == (5, 4 * epochs, 10)
        for client, mine in enumerate(rows):
            own = torch.arange(40) + 40 * (client + 5 * (round % times))
            assert all(torch.equal(epoch.sort()[0], own) for epoch in mine.view(epochs, 40))
    assert len({tuple(rows.flatten().tolist()) for rows in world.rounds}) == len(world.rounds)


def test_what_is_nearest_has_as_many_turns_as_any(monkeypatch):
    from benchmarks import simulation

    asked = []
    monkeypatch.setattr(simulation, "World", lambda *of: None)
    monkeypatch.setattr(simulation, "_compiled", lambda world, cores: {"ours": None})
    monkeypatch.setattr(simulation, "in_turns", lambda sides, turns: asked.append((list(sides), turns)))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    simulation.stock(7, simulation.Peers(pfl=Path("pfl"), ray=Path("ray")))
    assert asked == [(["ours", "pfl-research, processes: 2", "Flower on Ray, as it comes"], 7)]


def test_figures_come_with_the_machine_and_the_versions(tmp_path, monkeypatch, capsys):
    from benchmarks import machine, simulation
    from benchmarks.turns import Figures

    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some Core 9\nmodel name\t: Some Core 9\n")
    assert machine.processor(tmp_path / "cpuinfo") == "Some Core 9"
    assert machine.processor(tmp_path / "none")
    monkeypatch.setitem(simulation.PARTS, "tiny", lambda turns, peers: {"tiny": {"a": Figures([1.0], [], [], None, 1)}})
    monkeypatch.setattr(simulation, "keep_pages", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr("sys.argv", ["simulation", "--json", "tiny"])
    simulation.main()
    told = json.loads(capsys.readouterr().out)
    assert told["versions"]["torch"] == torch.__version__ and set(told["versions"]) > {"python", "numpy", "opacus"}
    assert told["machine"]["cores"] > 0 and told["figures"]["tiny"]["a"]["seconds"] == [1.0]
