"""DP-SGD at a site: the same as the reference, and what an attacker with bad records or many rounds can learn."""

import math

import pytest
import torch
from draws import Everybody, Recorded
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fedtailor import strategies, tree
from fedtailor.batches import pack
from fedtailor.client import private_training
from fedtailor.client.private_training import check_private, inputs_digest, private_train
from fedtailor.client.safe_optimizer import SafeDPOptimizer, quiet_hooks
from fedtailor.errors import ConfigError, FedtailorError
from fedtailor.privacy.csprng import Csprng
from fedtailor.recipe import Part, Recipe, initial, losses
from fedtailor.strategy import Strategy
from fedtailor.study import LocalTraining, Plan, RecordPrivacy, Spec
from fedtailor.training import clipped, local_train

KEY, N, D, CLIP = bytes(range(32)), 120, 6, 0.5


def mlp():
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 1))


def bce(outputs, y):
    return binary_cross_entropy_with_logits(outputs[:, 0], y, reduction="none")


def recipe(model=mlp, losses=bce):
    return Recipe("toy", None, model, losses, None)


LINEAR = recipe(lambda: nn.Linear(D, 1, bias=False), lambda outputs, y: outputs[:, 0] * y)  # gradient: x * y


def plan(steps=4, rate=0.2, lr=0.1, clip=CLIP, optimizer="sgd"):
    return Plan(study="s", rounds=1, sites=("a",), quorum=1, deadline_s=1, strategy=Spec(_target_="s"),
                recipe=Spec(_target_="r"), local=LocalTraining(steps=steps, rate=rate, lr=lr, optimizer=optimizer),
                privacy=RecordPrivacy(epsilon=3, delta=1e-5, clip=clip))  # fmt: skip


@pytest.fixture
def part():
    g = torch.Generator().manual_seed(0)
    return Part(torch.randn(N, D, generator=g) * 3, (torch.rand(N, generator=g) < 0.5).float())


GRADIENTS = Strategy(  # reports what training changed, not weighted
    init=lambda params: {"params": params},
    apply=lambda state, total, round: state,
    report=lambda local: (tree.map(torch.sub, local.cast["params"], local.params), local.memory),
)


def release(part, rng, z, *, rec=LINEAR, the_plan=None, **kw):
    cast = {"params": initial(rec, 0)}
    return private_train(rec, part, the_plan or plan(), z, GRADIENTS, cast, {}, rng, **kw)[0]


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "fedper", "ditto"])
@pytest.mark.parametrize("batch", [3, 256])
def test_it_equals_the_reference_given_the_same_masks_and_noise(name, batch, part):
    strategy = {
        "fedavg": strategies.fedavg(),
        "fedprox": strategies.fedprox(mu=0.3),
        "scaffold": strategies.scaffold(2),
        "fedper": strategies.fedper(own=["2.*"]),
        "ditto": strategies.ditto(pull=0.3),
    }[name]
    rec, the_plan, z, rng = recipe(), plan(), 0.8, Recorded(KEY)
    start = initial(rec, 1)
    cast, memory = strategy.broadcast(strategy.init(start)), strategy.remember(start)
    if name == "scaffold":
        cast["control"] = tree.map(lambda p: torch.full_like(p, 0.01), start)
    if "own" in memory:  # as after a round: not where the shared model is
        memory["own"] = tree.map(lambda p: p + 0.1, memory["own"])
    got = private_train(rec, part, the_plan, z, strategy, cast, memory, rng, max_physical_batch=batch)
    batches = pack(part, torch.stack(rng.masks).float(), the_plan.local.rate)
    paths = list(tree.flatten(strategy.start(cast, memory)))
    assert len(rng.noises) == 4 * len(paths)  # one draw for each tensor that is trained
    steps = [
        tree.unflatten(dict(zip(paths, rng.noises[i : i + len(paths)], strict=True)))
        for i in range(0, len(rng.noises), len(paths))
    ]
    batches["noise"] = tree.stack(steps)
    train = local_train(clipped(losses(rec), CLIP), strategy, the_plan.local.lr)
    expected = train(cast, memory, batches, torch.ones(4), torch.tensor(float(N)))
    weight = float(got[0]["weight"])  # fedavg multiplies what it reports by it
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(tree.flatten(a), tree.flatten(b), rtol=1e-5, atol=1e-5 * weight)


@pytest.mark.parametrize(
    ("named", "theirs"),
    [
        ({"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}, lambda ps: torch.optim.SGD(ps, 0.1, 0.9, 0, 0.1)),
        ("adam", lambda ps: torch.optim.Adam(ps, 0.1)),
        ({"name": "adamw", "weight_decay": 0.2}, lambda ps: torch.optim.AdamW(ps, 0.1, weight_decay=0.2)),
    ],
)
def test_another_optimizer_is_opacus_around_torchs(named, theirs, part):
    """Everybody drawn and no noise: what is left is clipping, and the optimizer's steps by what was released."""
    rec = recipe()
    found = release(part, Everybody(KEY), 0.0, rec=rec, the_plan=plan(rate=1.0, optimizer=named))
    start, module = initial(rec, 0), GradSampleModule(mlp(), loss_reduction="sum")
    module._module.load_state_dict(start)
    how = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "expected_batch_size": N, "loss_reduction": "mean"}
    optimizer = DPOptimizer(theirs(module._module.parameters()), **how)
    with quiet_hooks():
        for _ in range(4):
            optimizer.zero_grad()
            bce(module(part.x), part.y).sum().backward()
            optimizer.step()
    for name, p in module._module.named_parameters():
        torch.testing.assert_close(start[name] - found[name], p.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-3, 1e3 * CLIP, 1e25, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rec", [LINEAR, recipe()], ids=["linear", "mlp"])
def test_one_record_shifts_the_sum_by_at_most_the_clip(value, rec, part):
    """The whole release path without noise, with a record and with nothing in its place; the count is public."""
    the_plan = plan(steps=1, rate=1.0, lr=1.0)
    x = part.x.clone()
    x[5] = value
    without = Part(torch.cat([part.x[:5], part.x[6:]]), torch.cat([part.y[:5], part.y[6:]]))
    y = part.y.clone()
    y[5] = 1.0
    a = release(Part(x, y), Everybody(KEY), 0.0, rec=rec, the_plan=the_plan)
    b = release(without, Everybody(KEY), 0.0, rec=rec, the_plan=the_plan)
    shift = tree.norm(tree.map(lambda p, q: p * N - q * (N - 1), a, b)).item()
    assert math.isfinite(shift) and shift <= CLIP * (1 + 1e-5) + 1e-5
    if value == 1e3 * CLIP and rec is LINEAR:
        assert shift == pytest.approx(CLIP, rel=1e-3)  # the bound is reached: the test can see a larger one


def test_opacus_own_optimizer_is_poisoned_by_one_record(monkeypatch, part):
    """The attack that the safe optimizer stops: without it, one NaN tells the world that its record was drawn."""

    class Unsafe(SafeDPOptimizer):
        clip_and_accumulate = DPOptimizer.clip_and_accumulate

    part.x[7] = math.nan
    the_plan = plan(steps=1, rate=1.0)
    assert all(x.isfinite().all() for x in tree.leaves(release(part, Csprng(KEY), 1.0, the_plan=the_plan)))
    monkeypatch.setattr(private_training, "SafeDPOptimizer", Unsafe)
    with pytest.raises(FedtailorError, match="not finite") as error:
        release(part, Csprng(KEY), 1.0, the_plan=the_plan)
    assert error.value.code == "nonfinite"


def test_records_cannot_be_read_off_the_update_of_a_linear_layer():
    """Imprinting (Fowl et al. 2022, https://arxiv.org/abs/2110.13057): an input is weight gradient over bias gradient."""
    d, bins, the_plan = 64, 40, plan(steps=1, rate=1.0, lr=1.0, clip=1.0)
    rec = recipe(lambda: nn.Sequential(nn.Linear(d, bins), nn.ReLU()), lambda outputs, y: outputs.sum(1))
    g = torch.Generator().manual_seed(3)
    x = torch.randn(8, d, generator=g)
    sums = x.mean(1)
    edges = torch.linspace(sums.min() - 1e-3, sums.max(), bins)
    cast = {"params": {"0.weight": torch.full((bins, d), 1 / d), "0.bias": -edges}}

    def found(rng, z):
        out = private_train(rec, Part(x, torch.zeros(8)), the_plan, z, GRADIENTS, cast, {}, rng)[0]
        w, b = out["0.weight"].diff(dim=0), out["0.bias"].diff()
        return torch.cosine_similarity((w / b[:, None])[:, None], x[None], dim=-1).nan_to_num(0).abs().amax(0)

    assert (found(Everybody(KEY), 0.0) > 0.95).sum() >= 4  # clipping alone does not stop it
    assert (found(Csprng(KEY), 0.4) > 0.95).sum() == 0


def test_noise_has_the_deviation_that_is_charged_for_and_is_fresh():
    steps, d, z = 40, 500, 1.3
    rec = recipe(lambda: nn.Linear(d, 1, bias=False), lambda outputs, y: outputs[:, 0] * 0)
    part, the_plan, seen = Part(torch.randn(10, d), torch.zeros(10)), plan(steps=steps, rate=0.3, lr=1.0), []
    watch = GRADIENTS._replace(correct=lambda g, *_: seen.append(g["weight"].flatten() * 0.3 * 10) or g)
    cast = {"params": {"weight": torch.zeros(1, d)}}
    for key in (KEY, bytes(32)):
        private_train(rec, part, the_plan, z, watch, cast, {}, Csprng(key))
    noise = torch.stack(seen).double()
    assert abs(noise[:steps].std() / (z * CLIP) - 1) < 5 / math.sqrt(2 * steps * d) + 1e-3
    rho = torch.corrcoef(noise) - torch.eye(2 * steps)
    assert rho.abs().max() < 6 / math.sqrt(d)


def test_samples_are_poisson_and_an_empty_one_still_takes_a_noisy_step(part):
    rng = Recorded(KEY)
    out = release(part, rng, 1.0, the_plan=plan(steps=300, rate=0.002))
    sizes = torch.stack(rng.masks).sum(1).double()
    assert len(rng.masks) == len(rng.noises) == 300 and (sizes == 0).sum() > 200  # 0.24 examples a step
    assert abs(sizes.mean() - 0.24) < 5 * math.sqrt(0.24 / 300) and tree.norm(out) > 0
    rng = Recorded(KEY)
    release(part, rng, 1.0, the_plan=plan(steps=400, rate=0.2))
    sizes = torch.stack(rng.masks).sum(1).double()
    assert 0.75 < sizes.var() / (N * 0.2 * 0.8) < 1.25


def test_a_repeated_round_is_the_same_round(part):
    rec = recipe(lambda: nn.Sequential(nn.Linear(D, 5), nn.Dropout(0.5), nn.Linear(5, 1)))
    first, state = release(part, Csprng(KEY), 1.0, rec=rec), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)  # dropout did not touch the process's generator
    torch.rand(3)
    again = release(part, Csprng(KEY), 1.0, rec=rec)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["0.weight"], release(part, Csprng(bytes(32)), 1.0, rec=rec)["0.weight"])


def test_one_key_on_other_inputs_never_gives_the_same_noise(part):
    """Else the difference of two outputs would be free of noise: rows in another order, say, after a restart."""
    order = torch.arange(N).flip(0)
    flipped, the_plan = Part(part.x[order], part.y[order]), plan(steps=1, rate=1.0, lr=1.0)
    a, b = (release(p, Csprng(KEY), 1e3, the_plan=the_plan)["weight"] * N for p in (part, flipped))
    assert (a - b).norm() > 100 * CLIP
    assert inputs_digest(part, the_plan, 1.0, {}, {}) != inputs_digest(flipped, the_plan, 1.0, {}, {})
    memory = {"control": {"w": torch.zeros(3)}}
    assert inputs_digest(part, the_plan, 1.0, {}, {}) != inputs_digest(part, the_plan, 1.0, {}, memory)


class Mixes(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


BAD = {
    "batch norm": recipe(lambda: nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))),
    "centred inputs": recipe(lambda: nn.Sequential(Mixes(), nn.Linear(D, 1))),
    "centred outputs": recipe(lambda: nn.Sequential(nn.Linear(D, 1), Mixes())),
    "centred loss": recipe(losses=lambda o, y: (o[:, 0] - o[:, 0].mean()) ** 2 + y),
    "summed loss": recipe(losses=lambda o, y: bce(o, y).sum()),
}


@pytest.mark.parametrize("name", BAD)
def test_the_gate_refuses_what_mixes_examples(name, part):
    with pytest.raises(ConfigError) as error:
        check_private(BAD[name], part)
    assert error.value.code == "mixes_examples"


def test_mixing_breaks_the_bound_that_the_gate_protects():
    """Why there is a gate: with centred inputs one record turns every other record's gradient round."""
    rec = recipe(lambda: nn.Sequential(Mixes(), nn.Linear(D, 1, bias=False)), lambda outputs, y: outputs[:, 0])
    x, the_plan = torch.randn(N, D, generator=torch.Generator().manual_seed(0)), plan(steps=1, rate=1.0, lr=1.0)
    sums = []
    for outlier in (-1e4, 1e4):
        x[0] = outlier
        sums.append(release(Part(x, torch.zeros(N)), Everybody(KEY), 0.0, rec=rec, the_plan=the_plan)["1.weight"] * N)
    assert (sums[0] - sums[1]).norm() > 50 * 2 * CLIP
    with pytest.raises(ConfigError):
        check_private(rec, Part(x, torch.zeros(N)))


@pytest.mark.parametrize("rows", [1, 2, N])
def test_the_gate_accepts_ordinary_models_and_leaves_no_trace(rows, part):
    state = torch.get_rng_state()
    norm = recipe(lambda: nn.Sequential(nn.Linear(D, 4), nn.GroupNorm(2, 4), nn.Dropout(0.5), nn.Linear(4, 1)))
    words = recipe(lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(4 * D, 1)))
    part.x[0] = math.nan
    check_private(norm, Part(part.x[:rows], part.y[:rows]))
    check_private(words, Part(torch.randint(9, (rows, D), generator=torch.Generator()), part.y[:rows]))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_that_opacus_cannot_clip_is_refused_with_a_way_out(part):
    with pytest.raises(ConfigError, match="opacus.layers") as error:
        check_private(recipe(lambda: nn.LSTM(D, 1)), part)
    assert error.value.code == "not_private"


def test_a_cast_or_a_plan_that_does_not_fit_is_refused(part):
    cast = {"params": {"weight": torch.zeros(2, D)}}
    with pytest.raises(ConfigError, match="'weight'"):
        private_train(LINEAR, part, plan(), 1.0, GRADIENTS, cast, {}, Csprng(KEY))
    with pytest.raises(ConfigError, match="plan.privacy"):
        release(part, Csprng(KEY), 1.0, the_plan=plan().model_copy(update={"privacy": None}))
