"""Binary classification of a table: logistic regression, or a small perceptron with LayerNorm."""

import hashlib
from collections import OrderedDict
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, validate_call
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fedtailor.adapters import adapted
from fedtailor.contract import Column, Contract, Row, check, load_contract
from fedtailor.errors import ConfigError
from fedtailor.recipe import Dataset, Part, Recipe, Table
from fedtailor.recipes.metrics import binary
from fedtailor.recipes.splits import held_out


class Logit(nn.Module):
    """A network with one output, as logits ``[B]``."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D]`` to ``[B]``."""
        out: Tensor = self.layers(x)[:, 0]
        return out


@validate_call
def tabular(
    contract: str | Contract,
    model: Literal["logistic", "mlp"] = "logistic",
    hidden: PositiveInt = 16,
    adapters: PositiveInt | None = None,
    exact: bool = False,
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.33,
    split_seed: int = 0,
) -> Recipe:
    """A recipe for a table that satisfies ``contract``.

    Preparation uses the contract only, so it costs no privacy: numbers are scaled by their declared bounds, a missing
    value becomes the declared default and an indicator of its own, categories become one column a declared code.

    Args:
        contract: the name of an installed contract, or one.
        model: ``logistic``: one linear layer, started at zero; ``mlp``: Linear, LayerNorm, GELU, Linear.
        hidden: width of the mlp.
        adapters: freeze the mlp's first layer at random features, the same at every site and for every seed, and train an
            adapter of this rank beside it; the other layers are trained as ever. None: train all of it.
        exact: give the adapter a shift, for strategies that aggregate products exactly.
        test_fraction: share of subjects held out at each site, stratified by label.
        split_seed: draws them.
    """
    if model != "mlp" and adapters is not None:
        raise ConfigError(f"adapters: rank {adapters} for model={model}; only model=mlp has a layer to adapt")
    if exact and adapters is None:
        raise ConfigError("exact: true without adapters; set their rank, as in adapters: 4")
    agreed = load_contract(contract) if isinstance(contract, str) else contract
    width = sum(_width(column) for column in agreed.columns)
    name = f"tabular-{model}-{agreed.name}"

    def module() -> nn.Module:
        if model == "mlp":
            body, norm = nn.Linear(width, hidden), nn.LayerNorm(hidden)
            net = Logit(body=body, norm=norm, act=nn.GELU(), head=nn.Linear(hidden, 1))
            return adapted(net, adapters, where=("layers.body",), exact=exact, key=name) if adapters else net
        linear = nn.Linear(width, 1)
        nn.init.zeros_(linear.weight)  # a convex problem: every start is as good, and zero is fair to all sites
        nn.init.zeros_(linear.bias)
        return Logit(head=linear)

    def prepare(table: Table) -> Dataset:
        rows = check(agreed, table)
        x = torch.tensor([encode(agreed, row) for row in rows], dtype=torch.float32)
        y = torch.tensor([row.label for row in rows], dtype=torch.float32)
        test = torch.tensor(held_out(rows, test_fraction, split_seed))
        train, held = Part(x[~test], y[~test]), Part(x[test], y[test])
        notes = tuple(_notes(agreed, rows))
        return Dataset(train, held, _fingerprint(rows), len(rows), notes, (~test).nonzero()[:, 0])

    def losses(outputs: Tensor, y: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(outputs, y, reduction="none")

    return Recipe(name, prepare, module, losses, binary, agreed.model_dump_json())


def _width(column: Column) -> int:
    return 2 if column.kind == "number" else len(column.codes) + 1


def encode(contract: Contract, row: Row) -> list[float]:
    """A row as numbers, each from -2 to 2."""
    out: list[float] = []
    for column, value in zip(contract.columns, row.values, strict=True):
        if column.kind == "category":
            out += [float(value == i) for i in range(len(column.codes))]
        else:
            assert column.bounds is not None
            low, high = column.bounds
            middle = (low + high) / 2
            used = value if value is not None else column.default if column.default is not None else middle
            out.append((used - middle) / ((high - low) / 4))
        out.append(float(value is None))
    return out


def _fingerprint(rows: list[Row]) -> str:
    lines = sorted(repr((row.values, row.label, row.subject)) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _notes(contract: Contract, rows: list[Row]) -> list[str]:
    notes = []
    for i, column in enumerate(contract.columns):
        if count := sum(row.values[i] is None for row in rows):
            notes.append(f"{column.name}: missing in {count} of {len(rows)} rows")
    return notes
