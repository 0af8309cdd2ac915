"""Local training against torch.optim, and per-example clipping against its promise."""

import math

import pytest
import torch
from torch.nn.functional import mse_loss

from fedtailor import strategies, tree
from fedtailor.training import clipped, local_train, plain

B, D = 6, 3


def losses(params, x, y):
    return (x @ params["w"] + params["b"] - y).square()


@pytest.fixture
def params():
    return {"w": torch.randn(D, generator=torch.Generator().manual_seed(0)), "b": torch.tensor(0.3)}


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(1)
    live = torch.tensor([1.0, 1, 1, 1, 0, 0])
    x, y = torch.randn(B, D, generator=rng), torch.randn(B, generator=rng)
    return {"x": x, "y": y, "live": live, "scale": torch.tensor(1 / 4)}


def still(params, batch):
    return batch | {"noise": tree.map(torch.zeros_like, params)}


def assert_close(a, b, **tolerance):
    for path, value in tree.flatten(a).items():
        torch.testing.assert_close(value, tree.flatten(b)[path], **tolerance)


def test_the_gradient_is_autograds_mean_over_live_examples(params, batch):
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    mse_loss(batch["x"][:4] @ leaves["w"] + leaves["b"], batch["y"][:4]).backward()
    assert_close(plain(losses)(params, batch), {name: p.grad for name, p in leaves.items()})


def test_padding_does_not_count(params, batch):
    other = batch | {"x": batch["x"].clone()}
    other["x"][4:] = 1e6
    assert_close(plain(losses)(params, batch), plain(losses)(params, other), rtol=0, atol=0)
    gradient = clipped(losses, 1.0)
    assert_close(gradient(params, still(params, batch)), gradient(params, still(params, other)), rtol=0, atol=0)


def test_a_huge_clip_and_no_noise_is_plain(params, batch):
    assert_close(clipped(losses, 1e9)(params, still(params, batch)), plain(losses)(params, batch))


def test_clipping_is_per_example(params, batch):
    """Against a loop in plain torch; a clip of the mean would differ."""
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for x, y in zip(batch["x"][:4], batch["y"][:4], strict=True):
        one = torch.func.grad(lambda p, x=x, y=y: losses(p, x, y))(params)
        norm = math.sqrt(sum(float(g.square().sum()) for g in one.values()))
        total = {name: total[name] + one[name] * min(1.0, 0.5 / norm) for name in total}
    expected = {name: value / 4 for name, value in total.items()}
    assert_close(clipped(losses, 0.5)(params, still(params, batch)), expected)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e6, 1e30, math.nan, math.inf])
def test_one_example_moves_the_sum_by_at_most_the_clip(params, batch, value):
    with_it = still(params, batch | {"x": batch["x"].clone()})
    with_it["x"][2] = value
    without = with_it | {"live": batch["live"].clone()}
    without["live"][2] = 0.0
    gradient = clipped(losses, 0.5)
    a, b = gradient(params, with_it), gradient(params, without)
    moved = tree.norm(tree.map(lambda a, b: (a - b) / batch["scale"], a, b))
    assert moved <= 0.5 + 1e-5
    if not math.isfinite(value):
        assert moved == 0  # what is not finite counts as zero, and so says nothing


def test_noise_is_added_to_the_sum_before_the_public_scale(params, batch):
    gradient, noise = clipped(losses, 0.5), tree.map(torch.ones_like, params)
    quiet, noisy = gradient(params, still(params, batch)), gradient(params, batch | {"noise": noise})
    assert_close(tree.map(torch.sub, noisy, quiet), tree.map(lambda n: n / 4, noise))


def test_steps_are_those_of_torch_optim(params, batch):
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    sgd = torch.optim.SGD(leaves.values(), lr=0.1)
    for _ in range(3):
        sgd.zero_grad()
        mse_loss(batch["x"][:4] @ leaves["w"] + leaves["b"], batch["y"][:4]).backward()
        sgd.step()
    train = local_train(plain(losses), strategies.fedavg(), lr=0.1)
    batches = tree.stack([batch] * 3)
    summand, memory = train({"params": params}, {}, batches, torch.ones(3), torch.tensor(2.0))
    ended = tree.map(lambda p, d: p + d / 2, params, summand["delta"])
    assert_close(ended, {name: p.detach() for name, p in leaves.items()})
    assert memory == {} and summand["weight"] == 2


def test_a_padding_step_does_nothing(params, batch):
    train = local_train(plain(losses), strategies.fedavg(), lr=0.1)
    batches = tree.stack([batch] * 3)
    two, _ = train({"params": params}, {}, batches, torch.tensor([1.0, 1, 0]), torch.tensor(1.0))
    same, _ = train({"params": params}, {}, tree.at(batches, slice(0, 2)), torch.ones(2), torch.tensor(1.0))
    assert_close(two, same, rtol=0, atol=0)


def test_an_empty_batch_is_a_step_of_length_zero(params, batch):
    empty = batch | {"live": torch.zeros(B)}
    assert tree.norm(plain(losses)(params, empty)) == 0
    assert tree.norm(clipped(losses, 1.0)(params, still(params, empty))) == 0
