"""The natural partition: each distinct value of one column of the sites' tables is a client."""

import difflib
from collections.abc import Mapping, Sequence

from fedtailor.errors import ConfigError
from fedtailor.population import Population
from fedtailor.recipe import Dataset, Recipe, Table
from fedtailor.simulations.cohort import read
from fedtailor.simulations.partitions import Shares, by_column
from fedtailor.sources import DataSource
from fedtailor.study import Plan

SITE = "site"  # where no table has a column of this name, it is the site's own


def read_with(
    column: object, plan: Plan, recipe: Recipe, sources: Mapping[str, DataSource]
) -> tuple[dict[str, Dataset], list[str]]:
    """Every site's data, prepared, and each training row's cell of ``column``, one site's rows after another's.

    Cells are compared as they are written; one that two sites have is one client.

    Raises:
        ConfigError: if a table has no such column, or the recipe does not say which rows it trains on.
        ContractError: naming the site whose data do not satisfy the contract.
    """
    if not isinstance(column, str) or not column:
        raise ConfigError(f"population.column: {column!r}; name the column whose values are the clients")
    data, cells, without = dict[str, Dataset](), list[str](), dict[str, Table]()
    for site, table, one in read(plan, recipe, sources):
        places = one.places
        if places is None or len(places) != len(one.train.y):
            raise ConfigError(
                f"population=natural: recipe {recipe.name} does not say which rows of a table it trains on "
                "(Dataset.places); choose another partition, or another recipe"
            )
        data[site] = one
        if column in table:
            cells += [table[column][place] for place in places.tolist()]
        else:
            without[site] = dict.fromkeys(table, ())
            cells += [site] * len(places)
    if without and not (column == SITE and len(without) == len(data)):
        site, table = next(iter(without.items()))
        near = difflib.get_close_matches(column, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"population.column: {column!r} is no column at {site}; there are {', '.join(table)}{hint}")
    return data, cells


def natural(cells: Sequence[str], column: str, minimum: int = 1) -> Shares:
    """Client k has the rows of the k-th of the sorted distinct ``cells``; each has ``minimum`` rows at least.

    Raises:
        ConfigError: naming ``column``, if a row has no value or a client too few rows.
    """
    try:
        return by_column(cells, minimum)
    except ConfigError as error:
        raise ConfigError(f"column={column!r}: {str(error).removeprefix('column: ')}") from error


def counted(of: Population, clients: int) -> Population:
    """The population with the number of its clients, which the data give.

    Raises:
        ConfigError: if the settings say another one, or ask more of them in a round than there are.
    """
    told = f"the sites' training rows have {clients} values of {of.options['column']!r}"
    if of.clients not in (None, clients):
        raise ConfigError(f"population.clients: {of.clients}, but {told}; use null, or {clients}")
    if of.cohort > clients:
        raise ConfigError(f"population.cohort: {of.cohort}, but {told}; ask {clients} clients at most")
    return of.model_copy(update={"clients": clients})
