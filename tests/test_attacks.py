"""The attacks of the benchmarks do what they say, and the benchmark shows what they do."""

import math
from pathlib import Path

import pytest
import torch

from fedtailor import tree
from fedtailor.strategies import fedavg, robust
from fedtailor.strategy import Local

ROOT = Path(__file__).parent.parent


@pytest.fixture
def attacks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import attacks

    return attacks


@pytest.fixture
def updates():
    rng = torch.Generator().manual_seed(0)
    honest = {"w": 1 + torch.randn(16, 6, generator=rng), "b": {"c": torch.randn(16, generator=rng)}}
    return honest, tree.map(lambda x: x[:4] * 3, honest)


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("none", lambda h, o: o),
        ("sign flip", lambda h, o: -h.mean(0)),
        ("sign flip, 5", lambda h, o: -5 * o),
        ("inner product, 0.5", lambda h, o: -0.5 * h.mean(0)),
        ("inner product, 10", lambda h, o: -10 * h.mean(0)),
        ("a little", lambda h, o: h.mean(0) - 1.5 * h.std(0)),
        ("label flip", lambda h, o: o),
        ("model replacement", lambda h, o: 20 * o),
        ("NaN", lambda h, o: torch.full_like(o, math.nan)),
    ],
)
def test_what_liars_send(attacks, updates, name, sent):
    honest, own = updates
    expected = tree.map(lambda h, o: sent(h, o).expand_as(o), honest, own)
    torch.testing.assert_close(attacks.ATTACKS[name].send(honest, own), expected, equal_nan=True)
    assert attacks.ATTACKS[name].turned == (name in ("label flip", "model replacement"))


def test_noise_drowns_what_is_sent_and_repeats(attacks, updates):
    honest, own = updates
    first, second = (torch.cat([x.reshape(-1) for x in tree.leaves(attacks.noise(honest, own))]) for _ in range(2))
    assert torch.equal(first, second) and 120 < first.std() < 280 and first.mean().abs() < 120


def test_min_max_goes_as_far_as_the_honest_are_apart(attacks, updates):
    honest, own = updates
    lies = attacks.ATTACKS["min-max"].send(honest, own)
    flat, lie = (torch.cat([x["w"], x["b"]["c"][:, None]], 1) for x in (honest, lies))
    apart = torch.cdist(flat, flat).max()
    assert (flat - lie[0]).norm(dim=1).max() == pytest.approx(apart.item(), rel=1e-4)
    assert ((flat.mean(0) - lie[0]) / flat.std(0)).std() < 1e-4


def test_the_last_clients_lie_and_keep_their_weights(attacks):
    strategy = attacks.attacked(fedavg(), attacks.same(lambda h: h.mean(0) * 0 + 100), 1)
    state, acc = strategy.init({"w": torch.zeros(2)}), None
    for rows, end in ((1.0, 2.0), (3.0, 6.0), (4.0, 7.0)):
        params, count = {"w": torch.full((2,), end)}, torch.tensor(rows)
        summand, _ = strategy.report(Local(strategy.broadcast(state), {}, params, count, count, 0.1))
        acc = strategy.reduce.add(acc, tree.at(summand, None))
    assert strategy.apply(state, acc, 0)["params"]["w"].tolist() == pytest.approx([(2 + 18 + 400) / 8] * 2)


def test_model_replacement_ruins_fedavg_and_not_robust(attacks):
    from benchmarks import strategies as bench

    if not bench.MNIST.exists():
        pytest.skip(f"{bench.MNIST}: there is no MNIST here (FEDTAILOR_DATA)")
    data = bench.mnist(3000)
    world = bench.World(*data, bench.dirichlet(data[1], 20, 0.5, 0))
    send, _ = attacks.ATTACKS["model replacement"]
    fooled, held = (
        bench.accuracy(world, attacks.attacked(strategy, send, 4), 4, 0, turned=4)
        for strategy in (fedavg(), robust(attackers=4))
    )
    assert fooled < 30 < 50 < held


def test_partitions_share_out_every_row_once(attacks):
    from benchmarks import strategies as bench

    y = torch.arange(10).repeat(100)
    for parts in (bench.dirichlet(y, 10, 0.5, 0), bench.two_classes(y, 10)):
        assert torch.cat(parts).sort().values.tolist() == list(range(1000))
    assert all(len(y[part].unique()) == 2 for part in bench.two_classes(y, 10))
