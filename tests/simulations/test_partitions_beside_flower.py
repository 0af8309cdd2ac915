"""Partitions beside those of Flower Datasets that are the same thing; ``make test-slow`` installs it.

Where both can be given the same draws, ours is held against theirs row by row or to within the one row by which they
round otherwise; elsewhere their laws are compared over many seeds, which are fixed. Flower has no counterpart to rows that
``dirichlet_mixture`` deals once a class has run out, nor to shards of unequal size; ours has none to its linear, square and
exponential sizes, which grow with a client's number, nor to its continuous, grouped and vertical partitions.
"""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, ks_2samp

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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The specified min_partition_size:UserWarning"),  # Flower's: it draws again
    pytest.mark.filterwarnings("ignore:The sum of the partition_sizes:UserWarning"),  # Flower's: rows that nobody has
    pytest.mark.filterwarnings("ignore:Specifying null_placement:FutureWarning"),  # pyarrow's, of how datasets sorts
]
UNEVEN = torch.arange(10).repeat_interleave(150 + 10 * torch.arange(10))  # 10 classes of 150 to 240 rows
UNEVEN = UNEVEN[torch.randperm(len(UNEVEN), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def flower():
    """Flower's partitioners, and the data sets of rows in memory that they work on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # read when they are imported
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        data = pytest.importorskip("datasets")
        return SimpleNamespace(rows=data.Dataset.from_dict, **vars(pytest.importorskip("flwr_datasets.partitioner")))


@pytest.fixture
def drawing(monkeypatch):
    """Have ours draw from a generator that the test makes of the seed."""
    return lambda make: monkeypatch.setattr(partitions, "_rng", lambda seed, kind: make(seed))


def labelled(flower, y):
    return flower.rows({"label": y.tolist(), "row": list(range(len(y)))})


def theirs(partitioner, rows):
    """Each client's rows, in ascending order."""
    partitioner.dataset = rows
    return [sorted(partitioner.load_partition(k)["row"][:]) for k in range(partitioner.num_partitions)]


def ours(shares):
    return [shares.of(k).tolist() for k in range(len(shares.offsets) - 1)]


def table(parts, y):
    """Rows of each class at each client, [N, C]."""
    return torch.stack([torch.bincount(y[part], minlength=int(y.max()) + 1) for part in parts])


def apart(left, right):
    """The largest distance between two samples' distribution functions."""
    return ks_2samp(np.asarray(left).ravel(), np.asarray(right).ravel()).statistic


def test_even_parts_of_rows_shuffled_alike(flower, drawing):
    drawing(np.random.default_rng)
    for count, seed in ((1, 0), (7, 1), (40, 2)):
        rows = labelled(flower, UNEVEN).shuffle(generator=np.random.default_rng(seed))
        assert ours(iid(UNEVEN, count, seed)) == theirs(flower.IidPartitioner(count), rows)


def test_shards_shuffled_alike(flower, drawing):
    """Theirs draws the shards of one client after the other, ours each shard's client: one permutation, and its inverse."""
    drawing(
        lambda seed: SimpleNamespace(
            permutation=lambda count: np.argsort(np.random.default_rng(seed).permutation(count))
        )
    )
    y = UNEVEN[:1800]  # theirs leaves out what does not go into equal shards
    for count, each, seed in ((20, 2, 0), (10, 1, 1), (25, 3, 2)):
        cut = flower.ShardPartitioner(count, "label", num_shards_per_partition=each, seed=seed)
        assert ours(shards(y, count, each, seed)) == theirs(cut, labelled(flower, y))


@pytest.mark.parametrize(
    "values",
    [
        ["va", "hu", "Va", "ch", "10", "9", "hu", "va", "9"],
        [7, -1, 10, 9, 7, 10, -1, 0, 3],
        [0.5, -2.0, 0.25, 0.5, 1e9, -2.0, 3.0, 0.25, 0.5],
    ],
)
def test_natural_parts_are_the_same_in_the_same_order(flower, values):
    rows = flower.rows({"site": values, "row": list(range(len(values)))})
    assert ours(by_column(values)) == theirs(flower.NaturalIdPartitioner("site"), rows)


@pytest.mark.parametrize(
    ("law", "spread"), [("power", 0.0), ("power", 0.5), ("power", 2.0), ("lognormal", 0.5), ("lognormal", 1.5)]
)
def test_sizes_follow_the_same_law(flower, drawing, law, spread):
    """To one row; all that theirs rounds off goes to its last client."""
    drawing(np.random.default_rng)
    laws = {
        "power": lambda ids: ids**-spread,
        "lognormal": lambda ids: np.random.default_rng(5).lognormal(0.0, spread, len(ids)),
    }
    parts = theirs(flower.IdToSizeFncPartitioner(12, laws[law]), labelled(flower, UNEVEN))
    sizes = quantity(UNEVEN, 12, law, spread, 5, minimum=0).offsets.diff()
    assert sum(map(len, parts)) == sizes.sum() == len(UNEVEN)
    assert (sizes - torch.tensor([len(part) for part in parts]))[:-1].abs().max() <= 1


@pytest.mark.parametrize(("alpha", "minimum"), [(0.1, 0), (0.5, 60), (5.0, 0), (0.9, 100)])
def test_a_split_is_theirs_where_the_draws_are(flower, drawing, alpha, minimum):
    """``dirichlet_split`` is their DirichletPartitioner: a class is cut at the same places, to one row, and with a minimum
    it is the first draw to meet it that counts in both."""
    shuffle = np.random.default_rng(0).permutation
    drawing(lambda seed: SimpleNamespace(permutation=shuffle, dirichlet=np.random.default_rng(seed).dirichlet))
    again = 0
    for seed in range(10):
        cut = flower.DirichletPartitioner(8, "label", alpha, min_partition_size=minimum, seed=seed)
        found = table(ours(dirichlet_split(UNEVEN, 8, alpha, seed, minimum)), UNEVEN)
        assert (found - table(theirs(cut, labelled(flower, UNEVEN)), UNEVEN)).abs().max() <= 1
        again += int(not found.equal(table(ours(dirichlet_split(UNEVEN, 8, alpha, seed, 0)), UNEVEN)))
    assert (again > 0) == (minimum > 0)  # the minimum was not met at once each time


def test_a_split_and_no_mixture_follows_their_dirichlet_law(flower):
    """Of 80 seeds: 8,000 cells, apart by 0.022 at the 5 % level, and 800 sizes, apart by 0.068. Allowed are 0.025, which an
    alpha of 0.45 or 0.55 exceeds, and 0.07. The mixture, whose clients are of one size, is far off with either alpha."""
    rows, seeds = labelled(flower, UNEVEN), range(80)

    def both(deal):
        tables = torch.stack([table(deal(seed), UNEVEN) for seed in seeds])
        return tables, tables.sum(2)

    cells, sizes = both(lambda seed: theirs(flower.DirichletPartitioner(10, "label", 0.5, 1, seed=seed), rows))
    found, sized = both(lambda seed: ours(dirichlet_split(UNEVEN, 10, 0.5, seed, minimum=1)))
    assert apart(found, cells) < 0.025 and apart(sized, sizes) < 0.07
    for alpha in (0.5, 5.0):  # as it stands; and what makes the mixtures of labels alike, 0.5 for each of 10 classes
        other, its_sizes = both(lambda seed, alpha=alpha: ours(dirichlet_mixture(UNEVEN, 10, alpha, seed)))
        assert apart(other, cells) > 0.1 and apart(its_sizes, sizes) > 0.4


def test_a_mixture_and_no_split_follows_their_inner_dirichlet_law(flower):
    """``dirichlet_mixture`` is their InnerDirichletPartitioner with alpha times the prior, as long as no class has run out:
    20 clients of 80, the others' rows are left. Of 100 seeds: 2,000 clients, apart by 0.043 at the 5 % level; allowed are 0.06, which an alpha
    of 1.5 or 2.4 exceeds. The split is far off, of whatever size its clients are."""
    prior, alpha, size = torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), 2.0, 50
    y = torch.arange(4).repeat_interleave((prior * size * 80).long())
    rows, found, other, cells = labelled(flower, y), [], [], []
    for seed in range(100):
        inner = flower.InnerDirichletPartitioner([size] * 20, "label", (alpha * prior).tolist(), seed=seed)
        cells.append(table(theirs(inner, rows), y))
        found.append(table(ours(dirichlet_mixture(y, 80, alpha, seed))[:20], y))
        other.append(table(ours(dirichlet_split(y, 80, alpha, seed))[:20], y))
    cells, found, other = torch.stack(cells), torch.stack(found), torch.stack(other)
    assert found.sum(2).equal(cells.sum(2))
    for label in range(4):
        assert apart(found[..., label], cells[..., label]) < 0.06
        assert apart(other[..., label], cells[..., label]) > 0.1
    assert apart((found > 0).sum(2), (cells > 0).sum(2)) < 0.06


def test_each_client_has_as_many_classes_and_as_much_of_them(flower):
    """Beside their deterministic assignment, which gives each class as many holders, as ours does: the same numbers of
    rows in each class, to the row."""
    for count, each in ((10, 1), (20, 3), (30, 7), (10, 10)):
        cut = flower.PathologicalPartitioner(count, "label", each, class_assignment_mode="deterministic")
        cells = table(theirs(cut, labelled(flower, UNEVEN)), UNEVEN)
        found = table(ours(pathological(UNEVEN, count, each, 0)), UNEVEN)
        assert (found > 0).sum(1).equal((cells > 0).sum(1))
        assert found.sort(0).values.equal(cells.sort(0).values)


def test_each_set_of_classes_is_as_likely(flower):
    """Beside their random assignment: which 3 of 10 classes a client has, of 2,000 clients each. Theirs draws for each
    client anew, ours from packs, so that only ours never leaves a class out."""
    hands, y = {"ours": Counter(), "theirs": Counter()}, torch.arange(600) % 10
    for seed in range(100):
        cut = flower.PathologicalPartitioner(20, "label", 3, seed=seed)
        dealt = {"ours": ours(pathological(y, 20, 3, seed)), "theirs": theirs(cut, labelled(flower, y))}
        for who, parts in dealt.items():
            found = table(parts, y)
            assert ((found > 0).sum(1) == 3).all()
            hands[who].update(tuple(row.nonzero()[:, 0].tolist()) for row in found)
            spread = found.max(0).values - torch.where(found > 0, found, 600).min(0).values
            assert spread.max() <= 1  # a class is split evenly over those who have it
    sets = sorted(hands["ours"] | hands["theirs"])
    assert len(sets) == 120
    assert chi2_contingency([[drawn[hand] for hand in sets] for drawn in hands.values()]).pvalue > 0.01
