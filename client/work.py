"""What a site does in one visit: evaluate what was cast, train from it, report. Pure but for the data it is given."""

import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from fedtailor import leaving, tree
from fedtailor import recipe as recipes
from fedtailor.baseline import train_alone
from fedtailor.batches import choices, draw, pack
from fedtailor.config import build
from fedtailor.errors import RefusedError
from fedtailor.optimizers import optimizer_of
from fedtailor.privacy.csprng import Csprng
from fedtailor.privacy.planning import strategy_of
from fedtailor.recipe import Dataset, Part, Recipe
from fedtailor.strategy import Strategy, model_in
from fedtailor.study import Plan
from fedtailor.training import local_train, plain
from fedtailor.tree import Params, Tree
from fedtailor.wire import Report, Visit


class Work(NamedTuple):
    """A visit's outcome. Only ``summand`` and the report's fields may leave, and only through the airlock."""

    report: Report
    summand: Tree
    memory: Tree
    model: Tree = {}  # the study's end for this site, to stay here: the better of its own model and the shared one


@lru_cache(maxsize=4)
def prepared(plan_text: str) -> tuple[Plan, Recipe, Strategy]:
    """A plan and what it names, built once."""
    plan = Plan.parse(plan_text)
    return plan, build(plan.recipe, Recipe), strategy_of(plan)


def perform(
    visit: Visit, cast: Tree, data: Dataset, memory: Tree, *, site: str, key: bytes | None, minimum: int = 10
) -> Work:
    """Do what ``visit`` asks.

    Args:
        cast: what the server broadcast; compared with what the strategy says it casts.
        key: 32 secret bytes for a private study's noise and samples; the same key gives the same work again.
        minimum: metrics of fewer held-out rows than this are None.

    Raises:
        WireError: if the cast is not what the strategy casts.
        RefusedError: if a private study comes without a key.
    """
    began = time.monotonic()
    plan, recipe, strategy = prepared(visit.plan)
    expected = leaving.followed(recipe, lambda params: strategy.broadcast(strategy.init(params)))
    leaving.check(tree.flatten(cast), leaving.spec_of(expected))
    leaving.plausible(tree.flatten(cast))
    report = Report(run=visit.run, round=visit.round, rows=data.rows, train_rows=len(data.train.y),
                    summand_sha256="0" * 64, salt="0" * 64)  # fmt: skip
    update: dict[str, object] = {}
    model: Tree = {}
    if not memory and strategy.remember(expected["params"]):
        memory = strategy.remember(recipes.initial(recipe, plan.seed))
    if visit.evaluate:
        update["metrics"] = recipes.evaluate(recipe, model_in(cast), data.test, minimum)
        if strategy.personal is not None:
            own = strategy.personal(cast, memory)
            update["personal"] = recipes.evaluate(recipe, own, data.test, minimum)
            model = better(recipe, own, model_in(cast), data.test) if not visit.train else {}
    if visit.baseline:
        update["baseline"] = recipes.evaluate(recipe, train_alone(recipe, data.train, plan, site), data.test, minimum)
    summand: Tree = {}
    if visit.train:
        over = after(plan.local.within_s)
        if plan.record is None:
            mask = draw(plan.local, len(data.train.y), plan.seed, visit.round, site)
            batches = pack(data.train, mask, plan.local.poisson_rate) | {"seed": choices(plan, visit.round, site)}
            losses = recipes.losses(recipe)
            train = local_train(plain(losses), strategy, plan.local.lr, losses, over, optimizer_of(plan.local))
            count = torch.tensor(float(len(data.train.y)))
            summand, memory = train(cast, memory, batches, torch.ones(plan.local.steps), count)
        else:
            if key is None or plan.record.noise_multiplier is None:
                raise RefusedError("a private study needs a key from the ledger", code="ledger")
            from fedtailor.client.private_training import check_private, private_train  # Opacus: nearly a second

            check_private(recipe, data.train)
            noise = plan.record.noise_multiplier
            summand, memory = private_train(
                recipe,
                data.train,
                plan,
                noise,
                strategy,
                cast,
                memory,
                Csprng(key),
                seed=choices(plan, visit.round, site)[0],
                over=over,
            )
    update["seconds"] = time.monotonic() - began
    return Work(report.model_copy(update=update), summand, memory, model)


def better(recipe: Recipe, own: Params, shared: Params, part: Part) -> Params:
    """Whichever has the lower mean loss on ``part``; a site's own where they are equal, or there is nothing to measure."""
    losses = recipes.losses(recipe)
    with torch.no_grad():
        found = [float(losses(params, part.x, part.y).mean()) for params in (own, shared)]
    return shared if found[1] < found[0] else own


def after(seconds: float | None) -> Callable[[], bool]:
    """Whether so many seconds have passed since now; None: never."""
    end = float("inf") if seconds is None else time.monotonic() + seconds
    return lambda: time.monotonic() > end
