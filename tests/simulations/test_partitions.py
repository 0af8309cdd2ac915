"""Who has which rows: every row once, the same for the same seed, and skewed as each law says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor.errors import ConfigError
from fedtailor.simulations import partitions
from fedtailor.simulations.partitions import (
    by_column,
    dirichlet_mixture,
    dirichlet_split,
    iid,
    pathological,
    quantity,
    shards,
)

DIGITS = torch.arange(6000) % 10
ALL = {
    "iid": lambda y, n, seed: iid(y, n, seed),
    "split": lambda y, n, seed: dirichlet_split(y, n, 0.3, seed, minimum=0),
    "mixture": lambda y, n, seed: dirichlet_mixture(y, n, 0.3, seed),
    "shards": lambda y, n, seed: shards(y, n, 1, seed),
    "pathological": lambda y, n, seed: pathological(y, n, int(y.unique().numel()), seed),
    "power": lambda y, n, seed: quantity(y, n, "power", 1.2, seed),
    "lognormal": lambda y, n, seed: quantity(y, n, "lognormal", 2.0, seed),
}


def dealt(shares, rows):
    """The shares once they have been found to be whole: each row once, each client's in ascending order."""
    assert shares.order.dtype == shares.offsets.dtype == torch.int64
    assert shares.order.sort().values.equal(torch.arange(rows))
    assert shares.offsets[0] == 0 and shares.offsets[-1] == rows
    inner = torch.ones(rows, dtype=torch.bool)
    inner[shares.offsets[shares.offsets < rows]] = False  # where a client begins
    assert (shares.order.diff()[inner[1:]] > 0).all()
    return shares


def table(shares, y):
    """Rows of each class at each client, [N, C]."""
    found = [torch.bincount(y[shares.of(k)], minlength=int(y.max()) + 1) for k in range(len(shares.offsets) - 1)]
    return torch.stack(found).double()


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_each_row_is_dealt_once(name, data):
    classes = data.draw(st.integers(1, 5))
    clients = data.draw(st.integers(1, 12))
    y = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), max_size=40)), dtype=torch.int64)
    y = torch.cat([y, torch.arange(classes).repeat(clients)])  # so that no class is too small for "pathological"
    shares = dealt(ALL[name](y, clients, 7), len(y))
    assert len(shares.offsets) == clients + 1


@pytest.mark.parametrize("name", ALL)
def test_a_seed_and_nothing_else_decides(name):
    first = ALL[name](DIGITS, 20, 3)
    torch.rand(3), np.random.default_rng().random(3)
    again, other = ALL[name](DIGITS, 20, 3), ALL[name](DIGITS, 20, 4)
    assert all(map(torch.equal, first, again)) and not first.order.equal(other.order)


def test_names_of_labels_do_not_matter():
    for share in ALL.values():
        assert share(DIGITS, 20, 0).order.equal(share(DIGITS.double() * 2.5 - 9, 20, 0).order)


def test_iid_is_even_and_without_skew():
    shares = iid(DIGITS[:-3], 40, 0)
    assert shares.offsets.diff().tolist() == [150] * 37 + [149] * 3
    assert (table(shares, DIGITS) - 15).abs().max() < 16  # four deviations of a binomial of 150


def test_a_split_class_follows_its_dirichlet_law():
    """A share's mean is 1/N and its variance (1/N)(1 - 1/N) / (N alpha + 1)."""
    y, n, alpha = torch.arange(400_000) % 400, 10, 0.5
    found = table(dirichlet_split(y, n, alpha, 0), y) / 1000  # 400 draws from one Dirichlet
    torch.testing.assert_close(found.mean(1), torch.full((n,), 0.1).double(), atol=0.03, rtol=0)
    assert found.var().item() == pytest.approx(0.1 * 0.9 / (n * alpha + 1), rel=0.08)


def test_a_mixture_follows_its_dirichlet_law():
    """A class of prior p has mean p and variance p (1 - p) / (alpha + 1), and more by drawing a finite number of rows."""
    prior, alpha, size = torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), 2.0, 400
    y = torch.arange(4).repeat_interleave((prior * size * 800).long())
    shares = dealt(dirichlet_mixture(y, 800, alpha, 0), len(y))
    assert (shares.offsets.diff() == size).all()
    early = table(shares, y)[:400] / size  # while no class has run out
    torch.testing.assert_close(early.mean(0), prior, atol=0.06, rtol=0)
    between = prior * (1 - prior) / (alpha + 1) * (1 + alpha / size)
    torch.testing.assert_close(early.var(0), between, atol=0, rtol=0.3)


def test_a_mixture_of_large_alpha_is_the_prior_and_of_small_alpha_one_class():
    y = torch.arange(4).repeat_interleave(torch.tensor([1000, 2000, 3000, 4000]))
    like = table(dirichlet_mixture(y, 20, 1e6, 0), y)[:15]
    assert (like - torch.tensor([50, 100, 150, 200])).abs().max() < 55  # a multinomial's deviations
    pure = table(dirichlet_mixture(y, 20, 1e-4, 0), y)
    assert ((pure[:8] > 0).sum(1) == 1).all()  # before the first class, the smallest, has run out at two clients


def test_what_runs_out_is_filled_up_with_the_rest(monkeypatch):
    monkeypatch.setattr(partitions, "BLOCK", 3)
    y = (torch.arange(100) < 4).long()
    for seed in range(20):
        shares = dealt(dirichlet_mixture(y, 10, 0.05, seed), 100)
        assert shares.offsets.diff().tolist() == [10] * 10


def test_shards_as_mcmahan_dealt_mnist():
    """60,000 rows, 100 clients, two shards of 300 each: at most two digits a client, and most have two."""
    y = torch.randperm(60_000, generator=torch.Generator().manual_seed(0)) % 10
    shares = dealt(shards(y, 100, 2, 0), 60_000)
    found = table(shares, y)
    assert set(found.unique().tolist()) == {0, 300, 600}
    assert (found.sum(1) == 600).all() and (found > 0).sum(1).double().mean() > 1.7
    at = torch.argsort(y, stable=True).argsort()  # each row's place when sorted
    for k in range(100):
        assert torch.bincount(at[shares.of(k)] // 300).unique().tolist() in ([0, 300], [300])


def test_each_client_has_exactly_its_classes():
    for clients, each, seed in ((20, 1, 0), (3, 10, 0), (5, 2, 0), (40, 3, 0), (40, 3, 1), (40, 4, 0), (40, 7, 0)):
        found = table(dealt(pathological(DIGITS, clients, each, seed), 6000), DIGITS)
        assert ((found > 0).sum(1) == each).all()
        holders = (found > 0).sum(0)
        assert holders.max() - holders.min() <= 1
        for label in found.T:
            held = label[label > 0]
            assert held.max() - held.min() <= 1
    pairs = {tuple(row.nonzero()[:, 0].tolist()) for row in table(pathological(DIGITS, 60, 2, 0), DIGITS)}
    assert len(pairs) > 25  # of 45: classes are not dealt in one order


def test_a_power_law_is_met_to_one_row():
    shares = quantity(DIGITS, 5, "power", 1.0, 0, minimum=0)
    wanted = 6000 / torch.arange(1, 6) / (137 / 60)
    assert (shares.offsets.diff() - wanted).abs().max() <= 1
    floor = quantity(DIGITS, 5, "power", 8.0, 0, minimum=100).offsets.diff()
    assert floor[1:].tolist() == [pytest.approx(100 + 5500 * k**-8 / 1.00408, abs=1) for k in range(2, 6)]
    assert quantity(DIGITS, 7, "lognormal", 0.0, 0).offsets.diff().unique().tolist() == [857, 858]


def test_log_normal_sizes_have_their_spread():
    y = torch.zeros(1_000_000)
    logs = quantity(y, 500, "lognormal", 1.0, 0, minimum=0).offsets.diff().double().log()
    assert logs.std().item() == pytest.approx(1.0, abs=0.1)
    assert ((logs - logs.mean()) / logs.std()).pow(3).mean().abs() < 0.4  # and are symmetric


def test_a_column_makes_its_own_clients():
    shares = dealt(by_column(["va", "ch", "va", "hu", "ch", "va"]), 6)
    assert [shares.of(k).tolist() for k in range(3)] == [[1, 4], [3], [0, 2, 5]]
    assert by_column(torch.tensor([7, -1, 7])).order.tolist() == [1, 0, 2]


def test_the_minimum_is_kept():
    skewed = dirichlet_split(DIGITS, 10, 0.3, 0, minimum=0).offsets.diff()
    kept = dirichlet_split(DIGITS, 10, 0.3, 0, minimum=200).offsets.diff()
    assert skewed.min() < 200 <= kept.min()


def test_a_million_clients():
    y = (torch.arange(1_000_000) % 3 == 0).long()
    dealt(dirichlet_split(y, 1_000_000, 0.5, 0, minimum=0), len(y))
    with pytest.raises(ConfigError, match="in 4 draws"):
        dirichlet_split(y, 1_000_000, 0.5, 0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: iid(DIGITS, 0, 0), "clients=0: not a whole number from 1 to 6000"),
        (lambda: shards(DIGITS, 6001, 1, 0), "clients=6001"),
        (lambda: iid(DIGITS, 2.0, 0), "clients=2.0"),
        (lambda: iid(torch.zeros(0), 1, 0), "y: shape"),
        (lambda: iid(torch.zeros(4, 2), 1, 0), "y: shape"),
        (lambda: quantity(torch.tensor([1.0, math.nan]), 1, "power", 1.0, 0), "y: 1 of 2 labels are NaN"),
        (lambda: dirichlet_split(DIGITS, 4, 0.0, 0), "alpha=0.0: not a number from"),
        (lambda: dirichlet_mixture(DIGITS, 4, -1.0, 0), "alpha=-1.0"),
        (lambda: dirichlet_mixture(DIGITS, 4, math.nan, 0), "alpha=nan"),
        (lambda: dirichlet_split(DIGITS, 4, math.inf, 0), "alpha=inf"),
        (lambda: dirichlet_split(DIGITS, 4, 1.0, 0, minimum=1501), "minimum=1501: .* from 0 to 1500 each"),
        (lambda: dirichlet_split(DIGITS, 4, 1e-3, 0, minimum=1400), "in 50 draws .* larger alpha, fewer clients"),
        (lambda: shards(DIGITS, 10, 601, 0), "each=601: .* from 1 to 600 each"),
        (lambda: shards(DIGITS, 10, 0, 0), "each=0"),
        (lambda: pathological(DIGITS, 10, 11, 0), "classes=11: the data have 10"),
        (lambda: pathological(DIGITS, 10, 0, 0), "classes=0"),
        (lambda: pathological(DIGITS, 3, 3, 0), "3 clients would leave out .* from 4 classes"),
        (lambda: pathological(DIGITS[:20], 20, 2, 0), "the 2 rows of class number 0 do not suffice for the 4 of 20"),
        (lambda: quantity(DIGITS, 4, "power", math.nan, 0), "spread=nan"),
        (lambda: quantity(DIGITS, 4, "power", -1.0, 0), "spread=-1.0"),
        (lambda: quantity(DIGITS, 4, "zipf", 1.0, 0), "law='zipf': there are 'power' and 'lognormal'"),
        (lambda: quantity(DIGITS, 4, "power", 1.0, 0, minimum=-1), "minimum=-1"),
        (lambda: by_column(["a", "", "b", ""]), "2 of 4 rows have no value"),
        (lambda: by_column(torch.tensor([1.0, math.nan])), "1 of 2 rows have no value"),
        (lambda: by_column(["a", "b", "b"], minimum=2), "minimum=2: 'a' has 1 rows, one of 1 values"),
        (lambda: by_column([]), "column: shape"),
        (lambda: by_column(["a", None]), "column: shape"),
    ],
)
def test_what_is_wrong_is_named(wrong, words):
    with pytest.raises(ConfigError, match=words):
        wrong()
