"""Record-level DP-SGD at a site: Poisson samples, Opacus' per-example clipping, noise that cannot be guessed."""

import hashlib
from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from fedtailor import tree
from fedtailor.client.private_gate import check_private
from fedtailor.client.safe_optimizer import SafeDPOptimizer, quiet_hooks
from fedtailor.errors import ConfigError, FedtailorError
from fedtailor.optimizers import Kept, descended, optimizer_of
from fedtailor.privacy.csprng import Csprng
from fedtailor.recipe import Part, Recipe, parameters
from fedtailor.strategy import Local, Strategy
from fedtailor.study import Plan
from fedtailor.training import NO_LOSS
from fedtailor.tree import Tree

__all__ = ["check_private", "inputs_digest", "private_train"]


def inputs_digest(part: Part, plan: Plan, noise_multiplier: float, cast: Tree, memory: Tree) -> str:
    """SHA-256 over everything that determines a round's output, but the key: name the ledger's visit by it.

    Two rounds with equal digests and one key are one release. Unequal ones must be charged apart.
    """
    digest = hashlib.sha256(f"{plan.canonical()}\n{float(noise_multiplier)!r}\n".encode())
    for name, x in tree.flatten({"cast": cast, "memory": memory, "part": {"x": part.x, "y": part.y}}).items():
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def private_train(
    recipe: Recipe,
    part: Part,
    plan: Plan,
    noise_multiplier: float,
    strategy: Strategy,
    cast: Tree,
    memory: Tree,
    rng: Csprng,
    *,
    max_physical_batch: int = 256,
    seed: Tensor | None = None,
    over: Callable[[], bool] = lambda: False,
) -> tuple[Tree, Tree]:
    """One round of DP-SGD from ``cast["params"]``: the same as ``local_train(clipped(...))``, for real data.

    Formal guarantee: the pair it returns is, whatever the optimizer, the post-processed output of ``plan.local.steps``
    Gaussian mechanisms of multiplier ``noise_multiplier``, each on a Poisson sample of rate ``plan.local.rate``; the cost
    is the :class:`~fedtailor.privacy.accounting.Charge` of those three numbers. Neighbours: one record counts as zero. It
    needs a recipe that :func:`check_private` accepts, and a key of ``rng`` that is secret.

    The noise is bound to all inputs: the same key repeats a round bit for bit after a crash, but with other data,
    another order of the rows or another model its noise is unrelated, so that two outputs cannot be subtracted.
    Abadi et al. 2016, Algorithm 1, https://arxiv.org/abs/1607.00133.

    Args:
        noise_multiplier: 0 is for tests of sensitivity; no charge can be made for less than 0.4.
        max_physical_batch: examples whose gradients are held in memory at once; it does not change the result.
        seed: a public number for the strategy's own random choices.
        over: asked before every step but the first, whether the time is over. Fewer steps cost what all would: the
            clock is not what the guarantee is about, and a round that is repeated may stop elsewhere.

    Raises:
        ConfigError: if the plan has no record-level privacy, ``cast`` does not fit the recipe's model, or the strategy
            needs a loss, which the guarantee would not cover.
        FedtailorError: code ``nonfinite``, if the model's parameters overflow.
    """
    if plan.record is None:
        raise ConfigError("plan.privacy: not of a record; this site trains with record-level privacy only")
    if strategy.needs_loss:
        raise ConfigError(NO_LOSS)
    if len(part.y) == 0:
        raise ConfigError("part: no examples to train on")
    rng = rng.derive(f"round/{inputs_digest(part, plan, noise_multiplier, cast, memory)}")
    with torch.random.fork_rng(devices=[]), quiet_hooks():
        torch.manual_seed(rng.seed("dropout"))  # a repeated round must repeat this too
        params = strategy.start(cast, memory)
        module, named = _module(recipe, params, strategy.trains)
        moving = [p for p in named.values() if p.requires_grad]  # what stays is neither clipped nor noised
        optimizer = SafeDPOptimizer(
            torch.optim.SGD(moving, lr=plan.local.lr),  # makes no step: clipping and noise are all that is asked of it
            noise_multiplier=noise_multiplier,
            max_grad_norm=plan.record.clip,
            rng=rng,
        )
        own, kept, rate, steps = optimizer_of(plan.local), Kept(), torch.tensor(plan.local.lr), 0
        while steps < plan.local.steps and not (steps and over()):
            mask = rng.bernoulli_mask(len(part.y), plan.local.rate)
            _sum_gradients(recipe, part, mask, module, optimizer, max_physical_batch)
            grads = _release(named, plan.local.rate * len(part.y), optimizer)
            grads = strategy.correct(grads, params, cast, memory)
            moved, kept = descended(own, params, grads, kept, rate, steps)
            params = tree.joined(params, moved)
            _load(named, params)
            steps += 1
    count, taken = torch.tensor(float(len(part.y))), torch.tensor(float(steps))
    return strategy.report(Local(cast, memory, params, count, taken, plan.local.lr, seed))


class _Together(nn.Module):
    """Several models of one recipe that see the same examples."""

    def __init__(self, recipe: Recipe, names: list[str]) -> None:
        super().__init__()
        self.models = nn.ModuleDict({name: recipe.model() for name in names})

    def forward(self, x: Tensor) -> list[Tensor]:
        return [model(x) for model in self.models.values()]


def _module(
    recipe: Recipe, params: Tree, trains: Callable[[str], bool]
) -> tuple[GradSampleModule, dict[str, nn.Parameter]]:
    several = [name for name, one in params.items() if isinstance(one, dict)]
    module = (_Together(recipe, several) if several else recipe.model()).train()
    named = _named(module)
    own = {name: tuple(p.shape) for name, p in named.items()}
    theirs = {name: tuple(p.shape) for name, p in tree.flatten(params).items()}
    if own != theirs:
        wrong = min(set(own.items()) ^ set(theirs.items()))
        raise ConfigError(f"cast: parameter {wrong[0]!r} {wrong[1]} does not fit the model of recipe {recipe.name!r}")
    for path, p in named.items():
        p.requires_grad_(trains(path.rpartition("/")[2]))
    _load(named, params)
    return GradSampleModule(module, loss_reduction="sum"), named


def _named(module: nn.Module) -> dict[str, nn.Parameter]:
    """The study's parameters by the paths that they have in a strategy's tree."""
    if not isinstance(module, _Together):
        return parameters(module)
    return {f"{which}/{name}": p for which, one in module.models.items() for name, p in parameters(one).items()}


def _load(named: dict[str, nn.Parameter], params: Tree) -> None:
    flat = tree.flatten(params)
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(flat[name])


def _sum_gradients(
    recipe: Recipe, part: Part, mask: Tensor, module: GradSampleModule, optimizer: SafeDPOptimizer, most: int
) -> None:
    for rows in mask.nonzero()[:, 0].split(most):  # type: ignore[no-untyped-call]
        if len(rows):
            outputs = module(part.x[rows])
            each = outputs if isinstance(outputs, list) else [outputs]
            losses = torch.stack([recipe.losses(one, part.y[rows]).sum() for one in each])
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.accumulate()


def _release(named: dict[str, nn.Parameter], expected: float, optimizer: SafeDPOptimizer) -> Tree:
    """The noisy mean gradient: the only thing that leaves the examples."""
    optimizer.add_noise()
    grads = {name: p.grad / expected for name, p in named.items() if p.grad is not None}
    if not all(tree.finite(g) for g in grads.values()):
        raise FedtailorError(
            "training: the noisy gradient is not finite; the model or the clip is too large for float32",
            code="nonfinite",
        )
    return tree.unflatten(grads)
