"""DP-SGD on adapters: what does not move has no noise and no share of the clipped norm, in both of its forms."""

import pytest
import torch
from draws import Everybody, Recorded
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fedtailor import strategies, tree
from fedtailor.adapters import adapted
from fedtailor.batches import pack
from fedtailor.client.private_training import private_train
from fedtailor.errors import ConfigError
from fedtailor.privacy.csprng import Csprng
from fedtailor.recipe import Part, Recipe, initial, losses
from fedtailor.study import LocalTraining, Plan, RecordPrivacy, Spec
from fedtailor.training import clipped, local_train, parted

KEY, N, D, CLIP = bytes(range(32)), 60, 6, 0.5
STRATEGIES = {
    "fedavg": strategies.fedavg(),
    "ffa_lora": strategies.ffa_lora(),
    "ffa_lora of scaffold": strategies.ffa_lora(strategies.scaffold(3)),
    "fedprox of fedex_lora": strategies.fedprox(0.3, strategies.fedex_lora()),
    "flora": strategies.flora(ranks=((0, 1),)),
    "ditto of ffa_lora": strategies.ditto(strategies.ffa_lora()),
    "fedper of fedex_lora": strategies.fedper(strategies.fedex_lora(), own=["2.*"]),
}


def model():
    net = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 1))
    return adapted(net, 2, where=["0"], alpha=4, exact=True, key="toy")


def bce(outputs, y):
    return binary_cross_entropy_with_logits(outputs[:, 0], y, reduction="none")


RECIPE = Recipe("toy", None, model, bce, None)


def plan(steps=4, rate=0.3, lr=0.1):
    return Plan(study="s", rounds=1, sites=("a",), quorum=1, deadline_s=1, strategy=Spec(_target_="s"),
                recipe=Spec(_target_="r"), local=LocalTraining(steps=steps, rate=rate, lr=lr),
                privacy=RecordPrivacy(epsilon=3, delta=1e-5, clip=CLIP))  # fmt: skip


@pytest.fixture
def part():
    g = torch.Generator().manual_seed(0)
    return Part(torch.randn(N, D, generator=g) * 3, (torch.rand(N, generator=g) < 0.5).float())


@pytest.fixture
def start():
    """Adapters and a shift that are not zero, so that everything has a gradient."""
    g = torch.Generator().manual_seed(1)
    return {name: 0.5 * torch.randn(p.shape, generator=g) for name, p in initial(RECIPE, 0).items()}


@pytest.mark.parametrize("batch", [7, 256])
@pytest.mark.parametrize("name", STRATEGIES)
def test_it_equals_the_reference_given_the_same_masks_and_noise(name, batch, part, start):
    strategy, the_plan, rng = STRATEGIES[name], plan(), Recorded(KEY)
    cast, memory = strategy.broadcast(strategy.init(start)), strategy.remember(start)
    got = private_train(RECIPE, part, the_plan, 0.8, strategy, cast, memory, rng, max_physical_batch=batch)
    begun = strategy.start(cast, memory)
    moving, still = (list(tree.flatten(one)) for one in parted(begun, strategy.trains))
    models = 2 if "ditto" in name else 1
    assert len(still) == models * (2 if "ffa" in name else 1) and len(moving) + len(still) == models * len(start)
    assert len(rng.noises) == the_plan.local.steps * len(moving)
    batches = pack(part, torch.stack(rng.masks).float(), the_plan.local.rate)
    drawn = [rng.noises[i : i + len(moving)] for i in range(0, len(rng.noises), len(moving))]
    nought = tree.flatten(tree.map(torch.zeros_like, begun))
    batches["noise"] = tree.stack([tree.unflatten(nought | dict(zip(moving, one, strict=True))) for one in drawn])
    train = local_train(clipped(losses(RECIPE), CLIP), strategy, the_plan.local.lr)
    expected = train(cast, memory, batches, torch.ones(4), torch.tensor(float(N)))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(tree.flatten(a), tree.flatten(b), rtol=1e-5, atol=1e-5 * N)


def released(strategy, part, start, rng, z):
    """What one step on everybody's rows changes, times the number of rows: the sum that was noised."""
    seen = {}
    watch = strategy._replace(report=lambda local: (seen.update(local.params) or {}, {}))
    cast = strategy.broadcast(strategy.init(start))
    private_train(RECIPE, part, plan(1, 1.0, 1.0), z, watch, cast, strategy.remember(start), rng)
    return {name: (start[name] - seen[name]) * len(part.y) for name in start}


@pytest.mark.parametrize("name", ["fedavg", "ffa_lora", "fedprox of fedex_lora"])
def test_the_whole_clip_is_spent_on_what_moves(name, part, start):
    """One example's clipped gradient has the length of the clip over the trained parameters alone."""
    strategy, one = STRATEGIES[name], Part(part.x[:1] * 100, 1 - (part.y[:1] > 2).float())
    change = released(strategy, one, start, Everybody(KEY), 0.0)
    still = {k: v for k, v in change.items() if not strategy.trains(k)}
    assert not any(x.any() for x in still.values()) and "0.lora_shift.weight" in still
    assert tree.norm({k: v for k, v in change.items() if k not in still}) == pytest.approx(CLIP, rel=1e-3)


def test_what_does_not_move_has_no_noise(part, start):
    change = released(STRATEGIES["ffa_lora"], part, start, Csprng(KEY), 1e6)
    assert {name for name, x in change.items() if not x.any()} == {"0.lora_a.weight", "0.lora_shift.weight"}


def test_a_cast_that_names_a_frozen_weight_is_refused(part, start):
    """Else a coordinator could put its own weights where the recipe's are, unseen."""
    strategy = STRATEGIES["fedavg"]
    for cast in ({**start, "0.base.weight": torch.zeros(5, D)}, {k: v for k, v in start.items() if "shift" not in k}):
        with pytest.raises(ConfigError, match="does not fit"):
            private_train(RECIPE, part, plan(), 1.0, strategy, {"params": cast}, {}, Csprng(KEY))
