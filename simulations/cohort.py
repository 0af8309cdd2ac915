"""The sites of a simulated study: their data, and what each is fed in a round."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedtailor import seeds
from fedtailor.batches import chosen, numbered, sampled, scales
from fedtailor.errors import ConfigError, ContractError, RefusedError
from fedtailor.recipe import Dataset, Part, Recipe, Table
from fedtailor.simulations.feed import Feed
from fedtailor.simulations.noise import seeded
from fedtailor.sources import DataSource
from fedtailor.study import Plan
from fedtailor.tree import Tree


def prepared(plan: Plan, recipe: Recipe, sources: Mapping[str, DataSource]) -> dict[str, Dataset]:
    """Every site's data, prepared; an error names the site."""
    return {site: one for site, _, one in read(plan, recipe, sources)}


def read(plan: Plan, recipe: Recipe, sources: Mapping[str, DataSource]) -> Iterator[tuple[str, Table, Dataset]]:
    """Every site, its table, and its data, prepared; an error names the site."""
    for site in plan.sites:
        if site not in sources:
            raise ConfigError(f"sites: there is no data for {site!r}; there is for {', '.join(sorted(sources))}")
        try:
            table = sources[site].table()
            one = recipe.prepare(table)
        except ContractError as error:
            raise ContractError(f"{site}: {error}") from error
        yield site, table, one


def with_rows(plan: Plan, data: dict[str, Dataset]) -> tuple[Plan, list[dict[str, Any]]]:
    """The plan and the data of those sites that have a row to train on, and an entry for each of the others.

    Raises:
        RefusedError: code ``quorum``, if too few have any.
    """
    sites = tuple(site for site in plan.sites if len(data[site].train.y))
    without = [site for site in plan.sites if site not in sites]
    if len(sites) < plan.quorum:
        raise RefusedError(
            f"{len(sites)} of {len(plan.sites)} sites have rows, the quorum is {plan.quorum}", code="quorum"
        )
    for site in without:
        del data[site]
    return plan.model_copy(update={"sites": sites}), [{"round": 0, "site": site, "code": "empty"} for site in without]


def rows_of(data: Mapping[str, Dataset]) -> Part:
    """All sites' training rows, one site's after another's."""
    parts = [one.train for one in data.values()]
    return Part(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))


def feed_from(plan: Plan, rows: Part | None, like: Tree) -> Feed:
    """Examples by their number in ``rows``, if they come by number, and noise of the shapes of ``like``: of what a site trains."""
    if plan.record is None or plan.record.noise_multiplier is None:
        return Feed(rows)
    return Feed(rows, seeded(like, plan.record.noise_multiplier * plan.record.clip), like)


def batches_of(plan: Plan, data: Mapping[str, Dataset], round: int) -> Tree:
    """One round's batches of the plan's sites, ``[K, S, ...]``, padded to the largest: numbers of :func:`rows_of`.

    Args:
        data: of these sites and any others, as :func:`rows_of` was given it.
    """
    sizes = {site: len(one.train.y) for site, one in data.items()}
    first = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
    batches = fed(plan, plan.sites, [sizes[site] for site in plan.sites], round)
    batches["rows"] = batches["rows"] + torch.tensor([first[site] for site in plan.sites])[:, None, None]
    return batches


def fed(plan: Plan, names: Sequence[str], sizes: Sequence[int], round: int, table: Tensor | None = None) -> Tree:
    """One round's batches of some clients, ``[K, S, ...]``, padded to the largest.

    Args:
        names: the clients', by which all that is random is drawn.
        sizes: how many rows each has.
        table: the rows of all of them, one client's after another's; None: rows are numbered from 0 within a client.
    """
    rows, live = numbered(sampled(plan.local, sizes, plan.seed, round, names), sizes)
    if table is not None:
        first = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        rows = table[rows + first[:, None, None]]
    batches = {
        "rows": rows,
        "live": live,
        "scale": scales(plan.local.poisson_rate, live, sizes),
        "seed": chosen(plan, round, names),
    }
    if plan.record is not None and plan.record.noise_multiplier is not None:
        numbers = [seeds.number(plan.seed, "noise", round, name) for name in names]
        batches["noise_seed"] = torch.tensor(numbers)
    return batches
