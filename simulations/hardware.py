"""Where a simulation computes, and what lies where.

A device holds the rows, packed once, and the test parts, and while a block is trained its parameters, its clients'
memories and the numbers of their rows. Rows that are too many for it stay on the host, with the test parts, and a block's
are copied when it is trained. The host keeps what it makes anew for every round (who is asked, whose rows, seeds
of noise) and all clients' memories, of which a round needs few. The server's state lies where its strategy is applied.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtailor import heap, tree
from fedtailor.config import Rows
from fedtailor.errors import ConfigError
from fedtailor.recipe import Dataset, Part, Recipe
from fedtailor.simulations.cohort import rows_of
from fedtailor.simulations.engine import Many
from fedtailor.strategy import Strategy
from fedtailor.study import Plan
from fedtailor.tree import Tree

HOST = torch.device("cpu")
KEPT = 1 << 30  # bytes that may lie free between two steps; a larger block is mapped anew each time
HOSTS_OWN = "noise_seed"  # of a batch: whose streams the host draws


def keep_pages() -> None:
    """Have what a step makes lie where the step before had it: a convolution's outputs are tens of megabytes, and gone
    after each. It holds for all of this process."""
    heap.keep(free=KEPT, large=KEPT)


def device_of(asked: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here; ``auto`` is a GPU where there is one.

    Raises:
        ConfigError: naming the devices there are.
    """
    cards = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    known = {"auto": (["cpu", *cards])[:2][-1], "cpu": "cpu"} | {card: card for card in cards}
    known |= {"cuda": cards[0]} if cards else {}
    if asked not in known:
        raise ConfigError(f"simulation.device: {asked!r} is not here; there is {', '.join(known)}")
    return torch.device(known[asked])


def placed(device: torch.device, what: Tree) -> Tree:
    """``what`` on ``device``, as it is where it lies there already."""
    return tree.map(lambda x: x.to(device), what)


def recipe_on(recipe: Recipe, device: torch.device) -> Recipe:
    """``recipe`` with its models on ``device``: made on the host first, so that they begin alike on every device."""
    if device == HOST:
        return recipe
    return recipe._replace(
        model=lambda: recipe.model().to(device), metrics=lambda outputs, y: recipe.metrics(outputs.cpu(), y.cpu())
    )


def home_of_rows(asked: Rows, device: torch.device, data: Mapping[str, Dataset]) -> torch.device:
    """Where training rows are to lie: on ``device``, unless they would take more than half of the memory it has free."""
    if asked != "auto" or device.type != "cuda":
        return HOST if asked == "host" else device
    size = sum(x.numel() * x.element_size() for one in data.values() for x in (*one.train, *one.test))
    free, _ = torch.cuda.mem_get_info(device)
    return HOST if size > free // 2 else device


def packed(data: Mapping[str, Dataset], device: torch.device) -> tuple[Part, dict[str, Dataset]]:
    """All training rows on ``device``, one after another, and the data with views of them, and with test parts there."""
    rows = Part(*(x.to(device) for x in rows_of(data)))
    sizes = [len(one.train.y) for one in data.values()]
    views = map(Part, torch.split(rows.x, sizes), torch.split(rows.y, sizes))
    tests = (Part(*(x.to(device) for x in one.test)) for one in data.values())
    return rows, {
        site: one._replace(train=train, test=test)
        for (site, one), train, test in zip(data.items(), views, tests, strict=True)
    }


def home_of(plan: Plan, strategy: Strategy, device: torch.device) -> torch.device:
    """Where the state lies: with the sums on ``device``; on the host, where noise is drawn or all answers are compared."""
    return device if strategy.reduce.is_sum and plan.site is None else HOST


def given(
    device: torch.device,
    cast: Tree,
    memory: Tree,
    batches: Tree,
    live: Tensor,
    counts: Tensor,
    rows: Part | None = None,
) -> tuple[Tree, Tree, Tree, Tensor, Tensor]:
    """What a :data:`fedtailor.simulations.engine.Many` is given, on ``device``; examples of ``rows``, if it has none there."""
    if rows is not None:
        numbers = batches["rows"]
        batches = {name: leaf for name, leaf in batches.items() if name != "rows"}
        batches |= {"x": rows.x[numbers], "y": rows.y[numbers]}
    there = {name: leaf for name, leaf in batches.items() if name != HOSTS_OWN}
    fed = placed(device, there) | {name: batches[name] for name in batches.keys() - there.keys()}
    return placed(device, cast), placed(device, memory), fed, live.to(device), counts.to(device)


def across(many: Many, device: torch.device, home: torch.device, rows: Part | None = None) -> Many:
    """``many`` on ``device``, given anything from anywhere; summands come to ``home``, memories to the host.

    Args:
        rows: on the host, where ``many`` has none to look up examples in.
    """

    def moved(cast: Tree, memory: Tree, batches: Tree, live: Tensor, counts: Tensor) -> tuple[Tree, Tree]:
        summands, kept = many(*given(device, cast, memory, batches, live, counts, rows))
        return placed(home, summands), placed(HOST, kept)

    return moved


def drawn(device: torch.device) -> Tensor:
    """Where the generators stand that nobody keyed: what draws from them without being told to changes it."""
    if device.type != "cuda":
        return torch.get_rng_state()
    return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(device)])
