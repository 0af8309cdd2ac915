"""Is every example's gradient its own? Clipping bounds nothing where examples mix."""

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fedtailor.client.safe_optimizer import quiet_hooks
from fedtailor.errors import ConfigError
from fedtailor.recipe import Part, Recipe

_TOLERANCE = 1e-3  # relative; a model that mixes examples misses it by orders of magnitude


def check_private(recipe: Recipe, part: Part) -> None:
    """Refuse a recipe whose per-example gradients would not be those of single examples.

    Two tests on four examples and fresh parameters: each loss in a batch equals the loss alone, and each of Opacus'
    gradients equals the plain gradient of that example alone. What it finds depends on the recipe, hardly on the
    data; inputs that are real numbers are disturbed first, so that equal rows do not hide anything.

    Raises:
        ConfigError: code ``mixes_examples``, or ``not_private`` where Opacus cannot handle a layer.
    """
    with torch.random.fork_rng(devices=[]), quiet_hooks():
        torch.manual_seed(0)
        module, alone = recipe.model(), recipe.model()
        alone.load_state_dict(module.state_dict())
        rows = torch.arange(4) % len(part.y)
        x, y = part.x[rows], part.y[rows]
        if x.is_floating_point():
            x = x.nan_to_num(0.0, 0.0, 0.0) + torch.randn(x.shape, dtype=x.dtype)
        _layers(recipe, module)
        for net in (module, alone):
            for layer in net.modules():
                if isinstance(layer, _DropoutNd):
                    layer.eval()
        _compare(recipe, GradSampleModule(module, loss_reduction="sum"), alone, x, y)


def _layers(recipe: Recipe, module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm):
            raise ConfigError(
                f"recipe {recipe.name!r}: layer {name!r} ({type(layer).__name__}) normalises each example by the "
                "others of its batch; use GroupNorm or LayerNorm",
                code="mixes_examples",
            )
    problems = [str(error) for error in ModuleValidator.validate(module)]
    try:
        problems += [str(error) for error in GradSampleModule.validate(module, strict=False)]
    except NotImplementedError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(
            f"recipe {recipe.name!r}: Opacus cannot clip this model per example: {problems[0]}; replace that layer "
            "(opacus.layers has private LSTM, GRU and attention layers)",
            code="not_private",
        )


def _compare(recipe: Recipe, module: GradSampleModule, alone: nn.Module, x: Tensor, y: Tensor) -> None:
    mixed = ConfigError(
        f"recipe {recipe.name!r}: its loss on one example depends on the other examples of the batch, so clipping "
        "each example bounds nothing; remove what mixes rows (a mean over the batch, for example x - x.mean(0))",
        code="mixes_examples",
    )
    losses = recipe.losses(module(x), y)
    if losses.shape != y.shape[:1]:
        raise ConfigError(
            f"recipe {recipe.name!r}: losses has shape {tuple(losses.shape)} for {len(y)} examples; it must give one "
            "loss each",
            code="mixes_examples",
        )
    losses.sum().backward()  # type: ignore[no-untyped-call]
    for i in range(len(y)):
        alone.zero_grad()
        loss = recipe.losses(alone(x[i : i + 1]), y[i : i + 1])[0]
        loss.backward()  # type: ignore[no-untyped-call]
        own = [p.grad for p in alone.parameters() if p.requires_grad]
        batch = [p.grad_sample for p in module.parameters() if p.requires_grad]
        pairs = [(loss, losses[i]), *((a, b[i]) for a, b in zip(own, batch, strict=True) if a is not None)]
        if any((a - b).norm() > _TOLERANCE * a.norm() + 1e-5 for a, b in pairs):
            raise mixed
