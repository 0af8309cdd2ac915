"""A recipe is what a study customises: a contract, a way to prepare data, a model, a loss and its metrics."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedtailor import adapters, seeds
from fedtailor.training import Losses
from fedtailor.tree import Params, Tree

Table = Mapping[str, Sequence[str]]  # column name -> raw cells as text, "" where a cell is empty; all of one length
Metrics = dict[str, float | None]  # None: not estimable from this part, and never printed as a number


class Part(NamedTuple):
    """Prepared examples."""

    x: Tensor  # [N, ...]
    y: Tensor  # [N]


class Dataset(NamedTuple):
    """One site's data, prepared and split by subject."""

    train: Part
    test: Part
    fingerprint: str  # SHA-256 over the prepared rows, independent of their order
    rows: int  # of the source, train and test together
    notes: tuple[str, ...] = ()  # what a person should know: "chol: 123 of 123 missing"
    places: Tensor | None = None  # [N] int64, each training row's number in the table; None: the recipe does not say


class Recipe(NamedTuple):
    """Everything the algorithms need to know of a model and its data. ``prepare`` uses only public knowledge."""

    name: str
    prepare: Callable[[Table], Dataset]  # raises ContractError naming column, row and value
    model: Callable[[], nn.Module]  # a fresh module: x [B, ...] -> outputs [B, ...]; what it freezes is always the same
    losses: Callable[[Tensor, Tensor], Tensor]  # outputs, y -> loss of each example [B]
    metrics: Callable[[Tensor, Tensor], Metrics]  # outputs, y of a test part -> named metrics
    contract: str = ""  # the data contract that ``prepare`` goes by, as canonical text


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a study is about, by name: what is trained, and the shifts of adapters.

    What a recipe freezes otherwise is part of the recipe: it does not travel, and every module of the recipe has it.
    """
    named = module.named_parameters()
    return {name: p for name, p in named if p.requires_grad or adapters.is_part(name, adapters.SHIFT)}


def initial(recipe: Recipe, seed: int) -> Params:
    """The parameters that every run of this recipe and seed starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeds.generator(seed, "init", recipe.name).initial_seed() % 2**63))
        return {name: p.detach() for name, p in parameters(recipe.model()).items()}  # of a module that nobody else has


def shapes(recipe: Recipe) -> Params:
    """Parameters without memory behind them: names, dtypes and shapes of a model that may be too large to make."""
    with torch.device("meta"):
        return {name: p.detach() for name, p in parameters(recipe.model()).items()}


def losses(recipe: Recipe) -> Losses:
    """The recipe's loss as a pure function of parameters."""
    module = _pure(recipe.model())

    def fn(params: Tree, x: Tensor, y: Tensor) -> Tensor:
        return recipe.losses(torch.func.functional_call(module, params, (x,)), y)

    return fn


def _pure(module: nn.Module) -> nn.Module:
    """``module`` without running averages: they are no parameters and so do not travel, and a BatchNorm that had them would
    measure by what it began with. It goes by its batch, always."""
    torch.func.replace_all_batch_norm_modules_(module)
    return module


def evaluate(recipe: Recipe, params: Params, part: Part, minimum: int = 10) -> Metrics:
    """Metrics of ``params`` on ``part``, without dropout; every one is None where the part has fewer than ``minimum``
    examples."""
    module = _pure(recipe.model()).eval()
    with torch.no_grad():
        measured = recipe.metrics(torch.func.functional_call(module, params, (part.x,)), part.y)
    return measured if len(part.y) >= minimum else {name: None for name in measured}
