"""Who is in a simulated round and what each trains on: the plan's sites, or a cohort of many virtual clients.

A population is dealt out of all sites' training rows. What a round costs depends on its cohort alone.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedtailor import seeds, store
from fedtailor.errors import ConfigError
from fedtailor.population import Population
from fedtailor.privacy.accounting import Charge, epsilon
from fedtailor.privacy.planning import Sampling
from fedtailor.privacy.site_accounting import epsilon_after
from fedtailor.recipe import Dataset
from fedtailor.simulations import partitions, traces
from fedtailor.simulations.arrivals import Flow, flow
from fedtailor.simulations.buffered import Clock
from fedtailor.simulations.cohort import batches_of, fed
from fedtailor.simulations.devices import Answers, Fleet, Trips, answers, trips
from fedtailor.simulations.drawn import drawn
from fedtailor.simulations.draws import drawn_of
from fedtailor.simulations.natural import natural
from fedtailor.study import Plan
from fedtailor.tree import Tree


class Fed(NamedTuple):
    """What a round's clients train on."""

    batches: Tree  # leaves [K, S, ...]
    live: Tensor  # [K, S]
    counts: Tensor  # [K] training rows


class Asked(Protocol):
    """Who answers in a round that begins in the virtual second ``now``."""

    def __call__(self, round: int, now: float = 0.0) -> list[int]:
        """The clients' numbers, ascending."""


class Lasts(Protocol):
    """How many virtual seconds a round takes that begins in the virtual second ``now``."""

    def __call__(self, round: int, now: float = 0.0) -> float | None:
        """None: there is no clock."""


class Clients(NamedTuple):
    """Who there is."""

    asked: Asked  # who answers
    fed: Callable[[int, Sequence[int]], Fed]  # round, clients -> what they train on
    many: int  # in a round, at most or on average
    lasts: Lasts = lambda round, now=0.0: None  # virtual seconds of a round
    flow: Callable[[int, Clock], Flow] | None = None  # in the place of both, where rounds do not wait
    prints: tuple[str, ...] = ()  # digests of what it rests on beside the plan, the settings and the sites' data


PARTITIONS: dict[str, Callable[..., "Dealt"]] = {
    "iid": partitions.iid,
    "dirichlet_split": partitions.dirichlet_split,
    "dirichlet_mixture": partitions.dirichlet_mixture,
    "shards": partitions.shards,
    "pathological": partitions.pathological,
    "quantity": partitions.quantity,
    "drawn": drawn,
}  # and "natural", which goes by the cells of a column


class Dealt(Protocol):
    """Which rows each client has."""

    def of(self, client: int) -> Tensor:
        """A client's rows, int64."""

    def sizes(self, clients: Sequence[int]) -> Tensor:
        """How many rows each of some clients has."""


def sites(plan: Plan, turn: Callable[[int], Plan], data: Mapping[str, Dataset], live: Tensor) -> Clients:
    """Each site of ``plan`` is a client."""
    counts = torch.tensor([float(len(data[site].train.y)) for site in plan.sites])
    number = {site: k for k, site in enumerate(plan.sites)}

    def of_round(round: int, clients: Sequence[int]) -> Fed:
        rows = torch.tensor(clients, dtype=torch.long)
        return Fed(batches_of(turn(round), data, round), live[rows], counts[rows])

    return Clients(lambda round, now=0.0: [number[site] for site in turn(round).sites], of_round, len(plan.sites))


def population(plan: Plan, dealt: Dealt, of: Population, fleet: Fleet) -> Clients:
    """Virtual clients, who have the rows that they were ``dealt``. A client without rows is never asked."""
    secret = sampling_of(plan, of).rate < 1

    def trip(round: int, asked: Sequence[int], now: float) -> Trips:
        return trips(plan, of, round, asked, now, fleet, dealt.sizes(asked).tolist())

    @lru_cache(maxsize=2)  # of this round and the one before
    def answered(round: int, now: float) -> Answers:
        rng = np.random.default_rng(seeds.number(plan.seed, "cohort", round))
        here, begins = fleet.begins(of.many, now)
        size = rng.binomial(of.many, of.cohort / of.many) if secret else min(of.cohort, here.many)
        chosen: list[int] = here.of(np.sort(rng.choice(here.many, size, replace=False, shuffle=False))).tolist()
        rows = dealt.sizes(chosen).tolist()
        asked = [k for k, some in zip(chosen, rows, strict=True) if some]
        found = answers(plan, asked, trip(round, asked, begins))
        return found if found.lasts is None else found._replace(lasts=begins - now + found.lasts)

    def draw(round: int, nth: int, count: int, without: set[int], now: float) -> list[int]:
        rng = np.random.default_rng(seeds.number(plan.seed, "cohort", round, nth))
        return drawn_of(fleet.here(of.many, now), count, without, rng, lambda some: (dealt.sizes(some) > 0).tolist())

    def of_round(round: int, clients: Sequence[int]) -> Fed:
        rows = [dealt.of(k) for k in clients]
        counts = [len(mine) for mine in rows]
        batches = fed(plan, [f"client {k}" for k in clients], counts, round, torch.cat(rows))
        live = torch.ones(len(clients), plan.local.steps)
        if plan.local.within_s is not None:  # else nobody takes fewer
            live = (torch.arange(plan.local.steps) < trip(round, clients, 0.0).taken[:, None]).float()
        return Fed(batches, live, torch.tensor(counts).float())

    prints = tuple(traces.prints(of).values())
    if isinstance(dealt, partitions.Shares) and of.partition == "natural":
        prints += (_print(dealt),)
    return Clients(
        lambda round, now=0.0: answered(round, now).clients,
        of_round,
        of.cohort,
        lambda round, now=0.0: answered(round, now).lasts,
        None
        if plan.buffer is None
        else partial(flow, plan, fills_of(plan, of), of.cohort, draw, trip, wakes=fleet.wakes),
        prints,
    )


def fills_of(plan: Plan, of: Population) -> int:
    """The answers that close a round which does not wait for more."""
    assert plan.buffer is not None
    return of.answers or plan.buffer.answers


def _print(dealt: partitions.Shares) -> str:
    found = hashlib.sha256(store.raw(dealt.offsets))
    found.update(store.raw(dealt.order))
    return found.hexdigest()


def sampling_of(plan: Plan, of: Population) -> Sampling:
    """What the accountant is told: rounds are Poisson samples where privacy is of whole clients, and no secret elsewhere.

    Raises:
        ConfigError: if it has to be told a number of clients that only the data could.
    """
    if plan.site is None:
        return Sampling(of.cohort, 1.0)
    if of.clients is None:
        raise ConfigError(
            "population.clients: null, but with privacy.unit=site the accountant goes by how many there are; give the number"
        )
    return Sampling(of.cohort, of.cohort / of.clients)


def epsilon_of(plan: Plan, rounds: int, rate: float) -> float | None:
    """Of the first ``rounds`` rounds, for whoever is asked in each; of a secret sample, for everybody."""
    if plan.site is not None:
        return epsilon_after(plan.site, rounds, rate)
    if plan.record is None or plan.record.noise_multiplier is None:
        return None
    charge = Charge(plan.record.noise_multiplier, plan.local.rate, plan.local.steps)
    return epsilon([charge] * rounds, plan.record.delta)


def deal(y: Tensor, of: Population, seed: int, cells: Sequence[str] = ()) -> Dealt:
    """Deal the rows of labels ``y`` out; of a natural population, by their ``cells``.

    Raises:
        ConfigError: naming a setting of the partition that is unknown or does not fit.
    """
    try:
        if of.partition == "natural":
            return natural(cells, **of.options)
        return PARTITIONS[of.partition](y, clients=of.clients, seed=seed, **of.options)
    except ConfigError as error:
        raise ConfigError(f"population={of.partition}: {error}") from error
    except (TypeError, ValueError, LookupError) as error:  # a word for a number, say
        given = ", ".join(f"{name}={value!r}" for name, value in of.options.items())
        raise ConfigError(
            f"population={of.partition}, {given}: {str(error).replace('()', '')}; see its settings in configs/population"
        ) from error
