"""The imprint attack: a coordinator crafts the first layer so that its gradient holds the records themselves.

Fowl et al. 2022, "Robbing the Fed", https://arxiv.org/abs/2110.13057. Every neuron measures the same direction and opens
at a threshold of its own; the difference of two neighbours' gradients is the sum of the records between two thresholds.
The training is the product's own: plain, and Opacus with the demo's privacy.
"""

import pytest
import torch
from torch import Tensor, nn

from fedtailor.batches import pack
from fedtailor.client.private_training import private_train
from fedtailor.config import build, load
from fedtailor.privacy.csprng import Csprng
from fedtailor.privacy.planning import resolve
from fedtailor.recipe import Part, Recipe, losses
from fedtailor.strategy import Strategy
from fedtailor.training import local_train, plain

WIDTH, BINS, ROWS = 64, 256, 8
DEMO = resolve(load(["study=heart"]).plan)
PLAN = DEMO.model_copy(update={"local": DEMO.local.model_copy(update={"steps": 1, "rate": 1.0, "lr": 1.0})})
FEDAVG = build(PLAN.strategy, Strategy)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, BINS), nn.ReLU(), nn.Linear(BINS, 1))


RECIPE = Recipe(
    "imprinted",
    prepare=lambda table: pytest.fail("not used"),
    model=model,
    losses=lambda out, y: nn.functional.binary_cross_entropy_with_logits(out[:, 0], y, reduction="none"),
    metrics=lambda out, y: {},
)


def records(seed: int) -> Part:
    rng = torch.Generator().manual_seed(seed)
    return Part(torch.randn(ROWS, WIDTH, generator=rng), torch.zeros(ROWS))


def crafted() -> dict[str, Tensor]:
    """Neuron i opens where the mean of a record passes the i-th quantile of what a mean of normals may be."""
    direction = torch.full((WIDTH,), 1 / WIDTH)
    quantiles = torch.distributions.Normal(0.0, WIDTH**-0.5).icdf((torch.arange(BINS) + 1) / (BINS + 1))
    return {
        "0.weight": direction.repeat(BINS, 1),
        "0.bias": -quantiles,
        "2.weight": torch.full((1, BINS), 0.01),
        "2.bias": torch.zeros(1),
    }


def recovered(delta: dict[str, Tensor]) -> Tensor:
    """What each pair of neighbouring neurons says: the record between their thresholds, if there is one."""
    weight, bias = delta["0.weight"], delta["0.bias"]
    more, count = weight[:-1] - weight[1:], bias[:-1] - bias[1:]
    kept = count.abs() > 1e-9
    return more[kept] / count[kept, None]


def best_match(found: Tensor, truth: Tensor) -> Tensor:
    """For each record, the greatest cosine of a guess with it."""
    if not len(found):
        return torch.zeros(len(truth))
    unit = torch.nn.functional.normalize
    return (unit(truth, dim=1) @ unit(found, dim=1).T).max(1).values


def plainly(part: Part, seed: int) -> dict[str, Tensor]:
    cast = {"params": crafted()}
    batches = pack(part, torch.ones(1, ROWS), PLAN.local.rate)
    train = local_train(plain(losses(RECIPE)), FEDAVG, PLAN.local.lr)
    return train(cast, {}, batches, torch.ones(1), torch.tensor(float(ROWS)))[0]["delta"]


def privately(part: Part, seed: int, noise: float) -> dict[str, Tensor]:
    key = Csprng(seed.to_bytes(32, "little"))
    return private_train(RECIPE, part, PLAN, noise, FEDAVG, {"params": crafted()}, {}, key)[0]["delta"]


def shares(train) -> tuple[float, float]:
    """Over 20 sets of records: the share recovered (cosine above 0.95), and the mean of the best cosines."""
    matches = torch.cat([best_match(recovered(train(records(seed), seed)), records(seed).x) for seed in range(20)])
    return float((matches > 0.95).float().mean()), float(matches.mean())


def chance() -> float:
    """The best cosine of as many random guesses."""
    rng = torch.Generator().manual_seed(99)
    guesses = torch.randn(BINS - 1, WIDTH, generator=rng)
    return float(torch.cat([best_match(guesses, records(seed).x) for seed in range(20)]).mean())


def test_without_privacy_an_update_gives_the_records_away():
    share, _ = shares(plainly)
    assert share > 0.8


def test_clipping_alone_does_not_help():
    """It is called clipping here, and never differential privacy."""
    share, _ = shares(lambda part, seed: privately(part, seed, noise=0.0))
    assert share > 0.5


def test_with_the_demos_privacy_nothing_is_recovered():
    assert DEMO.privacy is not None and DEMO.privacy.noise_multiplier is not None
    share, mean = shares(lambda part, seed: privately(part, seed, noise=DEMO.privacy.noise_multiplier))
    assert share == 0.0
    assert mean == pytest.approx(chance(), abs=0.05)
