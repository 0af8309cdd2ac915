"""What may leave a site in one answer: tensors by name, dtype and shape, their norm and bytes, and metrics by name.

It follows from a plan without making the model. Both ends compare an answer with it.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from fedtailor import recipe as recipes
from fedtailor import tree, treefile
from fedtailor.config import build
from fedtailor.errors import WireError
from fedtailor.privacy.planning import strategy_of
from fedtailor.recipe import Metrics, Recipe
from fedtailor.store import Spec
from fedtailor.strategy import Strategy, standing
from fedtailor.study import Frozen, Plan
from fedtailor.tree import Params, Tree, finite, map
from fedtailor.treefile import Flat, slices_of

HUGE = 1e6  # of a weight that is cast
GREATEST_METRIC = 1e6  # of a loss or an error; what is larger tells nobody anything
SHARES = ("auroc", "auprc", "accuracy", "f1", "precision", "recall", "c_index")  # from 0 to 1
BESIDE = (
    1.2  # the length of what stands beside the values of a private summand: a one, and a half where the clip adapts
)
FEW = 2**18  # parameters
METRIC_DIGITS = 4  # of what a site measures; a metric then carries at most 14 bits
METRICS = ("auroc", "auprc", "accuracy", "f1", "precision", "recall", "loss", "c_index", "mae", "rmse")


class Tensor(Frozen):
    """One tensor of an answer."""

    name: Annotated[str, Field(max_length=1000)]
    dtype: Annotated[str, Field(pattern=r"^(int64|float64|float32|int32|bfloat16|float16|int16|int8|uint8|bool)$")]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, le=2**40)], ...], Field(max_length=16)]


class Leaving(Frozen):
    """All that leaves a site in one answer, beside row counts and seconds of work."""

    tensors: tuple[Tensor, ...]
    metrics: tuple[str, ...]  # by name; each rounded to METRIC_DIGITS
    models: PositiveInt = 1  # that an evaluation measures: 2 where the site has one of its own beside the shared one
    norm: PositiveFloat | None  # the greatest L2 norm, over all tensors together; None: not bounded
    bytes: PositiveInt  # of the tensors' file, at most
    packed: bool = False  # by the daemon, without loss, after it has checked them (fedtailor/packing.py)

    def spec(self) -> Spec:
        """The tensors as they are compared."""
        return {one.name: (getattr(torch, one.dtype), one.shape) for one in self.tensors}

    def check(self, flat: Flat, *, train: bool) -> None:
        """Compare an answer's tensors with the list; a visit that does not train brings none.

        Raises:
            WireError: naming what is wrong; code ``norm`` where the whole is longer than agreed.
        """
        check(flat, self.spec() if train else {})
        if self.norm is not None and (found := length(flat)) > self.norm * (1 + 1e-6):
            raise WireError(f"an L2 norm of {found:.6g}; agreed is at most {self.norm:g}", code="norm")

    def rounded(self, metrics: Metrics) -> Metrics:
        """Only metrics that are listed and in their range, with few digits: little is left of a row encoded in one.

        Raises:
            WireError: code ``metrics``.
        """
        if unknown := metrics.keys() - set(self.metrics):
            raise WireError(f"{len(unknown)} metrics that were not agreed", code="metrics")
        kept: Metrics = {}
        for name, value in metrics.items():
            if value is not None and not 0 <= value <= (1.0 if name in SHARES else math.inf):  # NaN is in no range
                raise WireError(f"{name} is out of its range", code="metrics")
            kept[name] = None if value is None or value > GREATEST_METRIC else round(value, METRIC_DIGITS)
        return kept

    def bits(self) -> int:
        """What the tensors of one answer could carry at most, if whoever trains were free to choose them."""
        return sum(
            torch.empty(0, dtype=dtype).element_size() * 8 * _count(shape) for dtype, shape in self.spec().values()
        )


@lru_cache(maxsize=16)
def agreed(plan_text: str) -> Leaving:
    """What a plan makes leave, worked out without making the model: a hostile plan may name one of any size."""
    plan = Plan.parse(plan_text)
    recipe, strategy = build(plan.recipe, Recipe), strategy_of(plan)
    spec = spec_of(followed(recipe, lambda params: summand(plan, strategy, params)))
    tensors = [
        Tensor(name=n, dtype=str(dtype).removeprefix("torch."), shape=s) for n, (dtype, s) in sorted(spec.items())
    ]
    return Leaving(
        tensors=tuple(tensors),
        metrics=METRICS,
        models=1 if strategy.personal is None else 2,
        norm=_bound(plan, strategy),
        bytes=size_limit(spec),
        packed=strategy.packed,
    )


def _bound(plan: Plan, strategy: Strategy) -> float | None:
    """The greatest norm of one answer. A private strategy has one of its own, and a site that goes beyond it could
    drown the others' summands in the rounding of the sum, on which their privacy rests."""
    if strategy.sensitivity is None:
        return plan.norm
    return min(plan.norm or math.inf, math.hypot(strategy.sensitivity, BESIDE))


def spec_of(expected: Tree) -> Spec:
    """The names, dtypes and shapes that ``expected`` promises."""
    return treefile.spec_of(tree.flatten(expected))


def followed(recipe: Recipe, through: Callable[[Params], Tree]) -> Tree:
    """What becomes of a recipe's parameters, for its names, dtypes and shapes alone; nothing large is made.

    Few parameters are zeros: arithmetic on tensors without memory imports torch's compiler, a second and a half and 75 MB.
    """
    params = recipes.shapes(recipe)
    few = sum(x.numel() for x in params.values()) <= FEW
    with torch.device("cpu" if few else "meta"):
        return through({name: torch.zeros(x.shape, dtype=x.dtype) for name, x in params.items()} if few else params)


def summand(plan: Plan, strategy: Strategy, params: Tree) -> Tree:
    """What every site's summand looks like: the strategy's own report of a client that did nothing."""
    report = standing(strategy, params, plan.local.lr)
    return map(lambda x: x.new_zeros(()).expand(x.shape), report)  # shapes only: no memory


def check(flat: Flat, spec: Spec) -> None:
    """Compare a received tree with what was agreed: same keys, dtypes and shapes, every value finite.

    Raises:
        WireError: with code ``keys``, ``dtype``, ``shape`` or ``nonfinite``, naming the tensor.
    """
    found = treefile.spec_of(flat)
    if found.keys() != spec.keys():
        missing, extra = sorted(spec.keys() - found.keys()), sorted(found.keys() - spec.keys())
        raise WireError(f"tensors missing: {missing[:3]}, not agreed: {extra[:3]}", code="keys")
    for path, (dtype, shape) in found.items():
        if dtype != spec[path][0]:
            raise WireError(f"{path} is {dtype}, agreed is {spec[path][0]}", code="dtype")
        if shape != spec[path][1]:
            raise WireError(f"{path} has shape {shape}, agreed is {spec[path][1]}", code="shape")
        if not all(finite(piece) for piece in slices_of(flat, path)):
            raise WireError(f"{path} holds a value that is not finite", code="nonfinite")


def plausible(flat: dict[str, torch.Tensor]) -> None:
    """Refuse a model with weights of a size that no training needs: they are a way to steer what the answer says.

    Raises:
        WireError: code ``huge``.
    """
    for path, tensor in flat.items():
        if tensor.is_floating_point() and tensor.numel() and max(-float(tensor.min()), float(tensor.max())) > HUGE:
            raise WireError(f"{path} holds a value beyond {HUGE:g}", code="huge")


def size_limit(spec: Spec) -> int:
    """The most bytes that a payload of this spec may have: its tensors and a generous safetensors header."""
    tensors = sum(torch.empty(0, dtype=dtype).element_size() * _count(shape) for dtype, shape in spec.values())
    return tensors + header_limit(spec)


def header_limit(spec: Spec) -> int:
    """The most bytes of that header: parsed, it takes many times as much memory as it has bytes."""
    return 4096 + 512 * len(spec)


def length(flat: Flat) -> float:
    """The L2 norm over all tensors together, in slices: never a second copy of a tensor."""
    pieces = (piece for path in treefile.spec_of(flat) for piece in slices_of(flat, path))
    return math.sqrt(sum(float(piece.double().square().sum()) for piece in pieces))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
