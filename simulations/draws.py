"""Who of a population begins: uniform draws without repeats, whatever the size of the population."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class There(NamedTuple):
    """The clients that can be drawn, in ascending order; by their rank, so that nobody has to list them.

    They are those whose number leaves one of ``places`` when divided by ``period``.
    """

    many: int
    places: Ints  # ascending
    period: int

    def of(self, ranks: Ints) -> Ints:
        """The clients of some ranks."""
        found: Ints = ranks // len(self.places) * self.period + self.places[ranks % len(self.places)]
        return found

    def ranks(self, clients: Sequence[int]) -> Ints:
        """The ranks of those of some clients who are there, ascending."""
        which = np.array(sorted(clients), np.int64)
        place = np.searchsorted(self.places, which % self.period)
        here = self.places[np.minimum(place, len(self.places) - 1)] == which % self.period
        found: Ints = (which // self.period * len(self.places) + place)[here]
        return found


def there(clients: int, places: Ints, period: int) -> There:
    """Of the clients from 0 to ``clients``, those of some ``places`` in each ``period``.

    >>> some = there(10, np.array([0, 2]), 4)  # 0, 2, 4, 6, 8
    >>> some.many, some.of(np.array([1, 4])).tolist(), some.ranks([3, 4]).tolist()
    (5, [2, 8], [2])
    """
    whole, rest = divmod(clients, period)
    return There(whole * len(places) + int(np.searchsorted(places, rest)), places, period)


def everybody(clients: int) -> There:
    """All of a population."""
    return there(clients, np.zeros(1, np.int64), 1)


def drawn_of(
    here: There, count: int, without: set[int], rng: np.random.Generator, fit: Callable[[list[int]], list[bool]]
) -> list[int]:
    """``count`` clients, ascending, or as many as there are: a uniform draw of those that ``fit``, not one of ``without``."""
    found, out = list[int](), set(without)
    while len(found) < count:
        gone = here.ranks(list(out)) if here.many else np.zeros(0, np.int64)
        free = here.many - len(gone)
        if free <= 0:
            break
        ranks = rng.choice(free, min(count - len(found), free), replace=False, shuffle=False)
        ranks += np.searchsorted(gone - np.arange(len(gone)), ranks, side="right")  # over those who cannot
        picked = here.of(ranks).tolist()
        out |= set(picked)
        found += [k for k, one in zip(picked, fit(picked), strict=True) if one]
    return sorted(found)
