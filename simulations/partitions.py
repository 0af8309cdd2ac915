"""How one data set is dealt out to many virtual clients: who has which rows, in memory of the order of rows + clients.

Every function gives the same shares for the same arguments, whatever else was drawn before, and deals each row exactly
once. What all of them raise: ConfigError, naming the argument, its value and the way out.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtailor import seeds
from fedtailor.errors import ConfigError

Ints = NDArray[np.int64]
TRIES = 50  # draws of one partition until every client has enough rows; of a million clients only four
BLOCK = 4096  # clients whose mixtures are in memory at once


class Shares(NamedTuple):
    """Client k has the rows ``order[offsets[k]:offsets[k + 1]]``, in ascending order."""

    order: Tensor  # [M] int64: each row once
    offsets: Tensor  # [N + 1] int64, ascending from 0 to M

    def of(self, client: int) -> Tensor:
        """One client's rows, without a copy."""
        return self.order[self.offsets[client] : self.offsets[client + 1]]

    def sizes(self, clients: Sequence[int]) -> Tensor:
        """How many rows each of some clients has."""
        which = torch.as_tensor(clients, dtype=torch.long)
        return self.offsets[which + 1] - self.offsets[which]


def iid(y: Tensor, clients: int, seed: int) -> Shares:
    """Rows at random; sizes differ by one at most, the first clients have more.

    >>> iid(torch.zeros(5), 2, seed=0).offsets
    tensor([0, 3, 5])
    """
    _classes(y, clients)
    owner = np.empty(len(y), np.int64)
    owner[_rng(seed, "iid").permutation(len(y))] = np.repeat(np.arange(clients), _even(len(y), clients))
    return _shares(owner, clients)


def dirichlet_split(y: Tensor, clients: int, alpha: float, seed: int, minimum: int = 1) -> Shares:
    """Each class is split over the clients by shares from Dirichlet(alpha): labels and sizes are both skewed.

    Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022. Partitions are drawn until one gives each client ``minimum``
    rows, so that what comes back follows the law under that condition; after ``TRIES`` draws that is an error.

    Args:
        alpha: concentration; towards 0 each class is at one client, towards infinity all clients are alike.
        minimum: rows that each client has at least; 0 allows clients without any.
    """
    classes = _classes(y, clients)
    _positive("alpha", alpha)
    _enough(len(y), clients, minimum)
    rng, least, counts = _rng(seed, "dirichlet split"), 0, np.bincount(classes)
    tries = min(TRIES, 3 + 1_000_000 // clients)
    for _ in range(tries):
        owner = np.empty(len(y), np.int64)
        for rows in np.split(_by_class(classes, rng), counts.cumsum()[:-1]):
            owner[rows] = np.repeat(np.arange(clients), _cut(rng.dirichlet(np.full(clients, alpha)), len(rows)))
        smallest = int(np.bincount(owner, minlength=clients).min())
        if smallest >= minimum:
            return _shares(owner, clients)
        least = max(least, smallest)
    raise ConfigError(
        f"minimum={minimum}: in {tries} draws of alpha={alpha:g} over {clients} clients and {len(y)} rows the smallest "
        f"client never had more than {least}; a larger alpha, fewer clients, a smaller minimum, or dirichlet_mixture, "
        "whose clients are of one size"
    )


def dirichlet_mixture(y: Tensor, clients: int, alpha: float, seed: int) -> Shares:
    """Each client draws its mixture of classes from Dirichlet(alpha * prior); all are of one size, but for one row.

    Hsu et al. 2019, section 2, https://arxiv.org/abs/1909.06335: rows are drawn without replacement, and a class that has
    run out is drawn no more. Here the prior is the data's own; since every row is dealt, the last clients take what is left.

    Args:
        alpha: concentration; towards 0 each client has one class, towards infinity all clients are alike.
    """
    classes = _classes(y, clients)
    _positive("alpha", alpha)
    rng, sizes, left = _rng(seed, "dirichlet mixture"), _even(len(y), clients), np.bincount(classes)
    prior, dealt, k = left / left.sum(), [], 0
    while k < clients:
        sized = sizes[k : k + BLOCK]
        mixtures = rng.dirichlet(alpha * prior, len(sized))
        counts = rng.multinomial(sized, _of_what_is_left(mixtures, left))
        fits = (counts.cumsum(0) <= left).all(1)
        whole = len(sized) if fits.all() else int(fits.argmin())  # those before the first who runs a class out
        left -= counts[:whole].sum(0)
        if whole < len(sized):
            counts[whole] = np.minimum(counts[whole], left)
            left -= counts[whole]
            while missing := sized[whole] - counts[whole].sum():  # each time round a class runs out, or this is done
                found = rng.multinomial(missing, _of_what_is_left(mixtures[whole : whole + 1], left)[0])
                found = np.minimum(found, left)
                counts[whole] += found
                left -= found
            whole += 1
        dealt.append(np.repeat(np.tile(np.arange(len(prior)), whole), counts[:whole].ravel()))
        k += whole
    places = np.argsort(np.concatenate(dealt), kind="stable")  # class by class, as the rows are
    owner = np.empty(len(y), np.int64)
    owner[_by_class(classes, rng)] = np.repeat(np.arange(clients), sizes)[places]
    return _shares(owner, clients)


def shards(y: Tensor, clients: int, each: int, seed: int) -> Shares:
    """Rows sorted by label are cut into ``clients * each`` shards, and each client has ``each`` of them, at random.

    McMahan et al. 2017, section 3, https://arxiv.org/abs/1602.05629 (two of 300 rows). Shards differ by one row at most.
    """
    classes = _classes(y, clients)
    if each < 1 or clients * each > len(y):
        raise ConfigError(
            f"each={each}: {clients} clients with {each} shards each need from {clients} to {len(y)} shards in all, of "
            f"{len(y)} rows; from 1 to {len(y) // clients} each are possible"
        )
    holders = _rng(seed, "shards").permutation(clients * each) // each
    owner = np.empty(len(y), np.int64)
    owner[np.argsort(classes, kind="stable")] = np.repeat(holders, _even(len(y), clients * each))
    return _shares(owner, clients)


def pathological(y: Tensor, clients: int, classes: int, seed: int) -> Shares:
    """Each client has exactly ``classes`` classes, at random; a class is split evenly over those who have it.

    Classes are dealt like shuffled packs of cards, one pack after the other, so that two classes differ by one holder at
    most in number; whoever would get a class twice gets the next card instead.
    """
    labels = _classes(y, clients)
    counts, rng = np.bincount(labels), _rng(seed, "pathological")
    if not 1 <= classes <= len(counts):
        raise ConfigError(f"classes={classes}: the data have {len(counts)}; a client can have from 1 to {len(counts)}")
    if clients * classes < len(counts):
        needed = math.ceil(len(counts) / clients)
        raise ConfigError(
            f"classes={classes}: {clients} clients would leave out some of {len(counts)} classes; from {needed} classes each"
        )
    hands, pack = np.empty((clients, classes), np.int64), np.empty(0, np.int64)
    for hand in hands:
        if len(pack) < classes:
            fresh, held = rng.permutation(len(counts)), pack
            twice = np.isin(fresh, held)
            pack = np.concatenate([held, fresh[~twice], fresh[twice]])
        hand[:], pack = pack[:classes], pack[classes:]
    cards = np.argsort(hands.ravel(), kind="stable") // classes  # the holders of class 0, of class 1, ...
    holding = np.bincount(hands.ravel(), minlength=len(counts))
    owner, rows = np.empty(len(y), np.int64), np.split(_by_class(labels, rng), counts.cumsum()[:-1])
    for label, holders in enumerate(np.split(cards, holding.cumsum()[:-1])):
        if len(holders) > counts[label]:
            raise ConfigError(
                f"classes={classes}: the {counts[label]} rows of class number {label} do not suffice for the "
                f"{len(holders)} of {clients} clients that would hold it; fewer clients, or fewer classes each"
            )
        owner[rows[label]] = np.repeat(rng.permutation(holders), _even(len(rows[label]), len(holders)))
    return _shares(owner, clients)


def quantity(
    y: Tensor, clients: int, law: Literal["power", "lognormal"], spread: float, seed: int, minimum: int = 1
) -> Shares:
    """Rows at random, in unequal numbers: ``minimum`` for each client, and of the others a share, to within one row.

    Args:
        law: "power": client k's share goes as ``(k + 1) ** -spread``, the first is the largest; "lognormal": as
            ``exp(spread * z)``, z from N(0, 1), as in Li et al. 2020, https://arxiv.org/abs/1812.06127, whose spread is 2.
        spread: 0 makes all equal.
    """
    _classes(y, clients)
    _enough(len(y), clients, minimum)
    if not 0 <= spread < 100:
        raise ConfigError(f"spread={spread}: not a number from 0, all equal, to below 100")
    rng = _rng(seed, "quantity")
    if law == "power":
        weights = np.arange(1.0, clients + 1) ** np.float64(-spread)
    elif law == "lognormal":
        logs = spread * rng.standard_normal(clients)
        weights = np.exp(logs - logs.max())
    else:
        raise ConfigError(f"law={law!r}: there are 'power' and 'lognormal'")
    sizes = minimum + _cut(weights, len(y) - clients * minimum)
    owner = np.empty(len(y), np.int64)
    owner[rng.permutation(len(y))] = np.repeat(np.arange(clients), sizes)
    return _shares(owner, clients)


def by_column(column: Tensor | Sequence[Any], minimum: int = 1) -> Shares:
    """The natural partition: client k has the rows of the column's k-th value, of its distinct values sorted.

    >>> by_column(["va", "ch", "va"]).order
    tensor([1, 0, 2])
    """
    values = np.asarray(column)
    if values.ndim != 1 or not len(values) or values.dtype == object:
        raise ConfigError(f"column: shape {list(values.shape)} of {values.dtype} is not a list of words or of numbers")
    missing = values != values if values.dtype.kind == "f" else values == ""
    if np.any(missing):
        raise ConfigError(f"column: {missing.sum()} of {len(values)} rows have no value; leave them out, or give one")
    names, owner, sizes = np.unique(values, return_inverse=True, return_counts=True)
    if sizes.min() < minimum:
        raise ConfigError(
            f"minimum={minimum}: {str(names[sizes.argmin()])!r} has {sizes.min()} rows, one of {(sizes < minimum).sum()} "
            "values with too few; leave those rows out, join values, or take a smaller minimum"
        )
    return _shares(owner.astype(np.int64), len(names))


def _classes(y: Tensor, clients: int) -> Ints:
    """The number of each row's class, from 0 without gaps, once the arguments that all have in common are in order."""
    if y.ndim != 1 or not len(y):
        raise ConfigError(f"y: shape {list(y.shape)} is not that of a list of labels; one for each row")
    if bool((y != y).any()):
        raise ConfigError(f"y: {int((y != y).sum())} of {len(y)} labels are NaN; leave those rows out")
    if not isinstance(clients, int) or not 1 <= clients <= len(y):
        raise ConfigError(f"clients={clients}: not a whole number from 1 to {len(y)}, one row for each client")
    found: Ints = np.unique(y.cpu().numpy(), return_inverse=True)[1].astype(np.int64)
    return found


def _positive(name: str, value: float) -> None:
    if not 1e-6 <= value <= 1e6:  # so that nothing underflows
        raise ConfigError(f"{name}={value}: not a number from 1e-6 to 1e6")


def _enough(rows: int, clients: int, minimum: int) -> None:
    if not 0 <= minimum * clients <= rows:
        raise ConfigError(
            f"minimum={minimum}: {clients} clients of {rows} rows in all can have from 0 to {rows // clients} each"
        )


def _rng(seed: int, kind: str) -> np.random.Generator:
    return np.random.default_rng(seeds.number(seed, "partition", kind))


def _even(total: int, parts: int) -> Ints:
    """``parts`` sizes that differ by one at most, the larger first."""
    return total // parts + (np.arange(parts) < total % parts).astype(np.int64)


def _cut(weights: NDArray[np.float64], total: int) -> Ints:
    """``total`` in whole parts, each within one of its share by ``weights``."""
    sums = weights.cumsum()
    edges: Ints = np.rint(sums / sums[-1] * total).astype(np.int64)
    return np.diff(edges, prepend=0)


def _by_class(classes: Ints, rng: np.random.Generator) -> Ints:
    """All rows, class by class, at random within each."""
    rows = rng.permutation(len(classes))
    found: Ints = rows[np.argsort(classes[rows], kind="stable")]
    return found


def _of_what_is_left(mixtures: NDArray[np.float64], left: Ints) -> NDArray[np.float64]:
    """Mixtures ``[B, C]`` without the classes that have run out; what is left itself, where that leaves nothing."""
    kept = np.where(left > 0, mixtures, 0.0)
    kept = np.where(kept.sum(1, keepdims=True) > 0, kept, left.astype(np.float64))
    found: NDArray[np.float64] = kept / kept.sum(1, keepdims=True)
    return found


def _shares(owner: Ints, clients: int) -> Shares:
    """From each row's client ``[M]``."""
    offsets = np.concatenate([[0], np.bincount(owner, minlength=clients).cumsum()])
    return Shares(torch.from_numpy(np.argsort(owner, kind="stable")), torch.from_numpy(offsets.astype(np.int64)))
