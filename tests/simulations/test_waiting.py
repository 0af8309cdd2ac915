"""A block's steps never wait for the device: what would, is counted, and the few a block that do are named."""

import math

import pytest
import torch
from folk import CLIP, B, K, S, assert_close, made, reference, started, world
from strays import Waits

from fedtailor import strategies, tree
from fedtailor.optimizers import SGD, adam
from fedtailor.recipe import Part
from fedtailor.simulations import convolutions, gradients
from fedtailor.simulations.blocks import block_train
from fedtailor.simulations.engine import simulate_round, vmapped
from fedtailor.simulations.feed import Feed
from fedtailor.simulations.noise import seeded

SEEDS = {"numpy": 1}  # a block's seeds of noise, which the host has anyway
LENGTHS = {"_local_scalar_dense": 1}  # whether any length of a block's was not finite


def waits(fn):
    with Waits() as seen:
        fn()
    return dict(seen.found)


@pytest.mark.parametrize("clip", [None, CLIP], ids=["plain", "clipped"])
@pytest.mark.parametrize(
    "name", ["linear", "mlp", "conv1d", "conv2d", "text", "long sequence", "dropout", "wide", "lora", "encoder"]
)
def test_a_block_waits_for_nothing_but_what_is_named(name, clip, monkeypatch):
    """As a GPU has it: grouped convolutions, and lengths looked at when the block is done."""
    monkeypatch.setattr(convolutions, "looped", lambda x: False)
    monkeypatch.setattr(gradients, "waits", lambda x: False)
    recipe, inputs = made(name)
    params, batches, live, counts = world(recipe, inputs, None)
    rows = torch.arange(K * S * B).view(K, S, B)
    table = Part(batches.pop("x").flatten(0, 2), batches.pop("y").flatten())
    batches |= {"rows": rows} | ({} if clip is None else {"noise_seed": torch.arange(K)})
    feed = Feed(table, None if clip is None else seeded(params, CLIP), params)
    for strategy, optimizer in (
        (strategies.fedavg(), SGD),
        (strategies.scaffold(population=K), SGD),
        (strategies.fedavg(), adam()),
    ):
        many = block_train(recipe, strategy, 0.3, clip, feed=feed, together=name == "wide", optimizer=optimizer)
        cast, memory = started(strategy, params)
        found = waits(lambda many=many, given=(cast, memory, batches, live, counts): many(*given))
        assert found == ({} if clip is None else SEEDS | LENGTHS)


@pytest.mark.parametrize("clip", [None, CLIP], ids=["plain", "clipped"])
def test_a_round_of_blocks_waits_for_nothing_more_and_vmap_for_nothing(clip, monkeypatch):
    monkeypatch.setattr(gradients, "waits", lambda x: False)
    recipe, inputs = made("mlp")
    params, batches, live, counts = world(recipe, inputs, clip)
    strategy = strategies.fedavg()
    given = {"params": params}, {}, batches, live, counts, 0, 2  # three blocks
    many = block_train(recipe, strategy, 0.3, clip)
    allowed = {} if clip is None else {"_local_scalar_dense": 3}
    applied = waits(lambda: strategy.apply(*totalled(strategy, params)))
    found = waits(lambda: simulate_round(strategy, many, *given))
    assert found == {k: n for k in allowed | applied if (n := allowed.get(k, 0) + applied.get(k, 0))}
    one = vmapped(reference(recipe, strategy, clip))
    assert waits(lambda: one({"params": params}, {}, batches, live, counts)) == {}


def totalled(strategy, params):
    total = {"delta": tree.map(torch.zeros_like, params), "weight": torch.ones(())}
    return {"params": params}, total, 0


@pytest.mark.parametrize("fn", [lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: bool((x > 0).all()), torch.nonzero,
                                lambda x: x.tolist(), lambda x: x.numpy(), lambda x: x.cpu(), lambda x: torch.equal(x, x),
                                lambda x: x.unique(), lambda x: x.long().bincount(),
                                lambda x: torch.repeat_interleave(x, x.long()), lambda x: x.masked_select(x > 0)])  # fmt: skip
def test_that_would_be_counted(fn):
    assert waits(lambda: fn(torch.ones(3)))


@pytest.mark.parametrize("value", [1e25, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mlp", "sequence"])
def test_lengths_that_are_looked_at_late_come_to_the_same(name, value, monkeypatch):
    """A block in which one was not finite is trained again, with care; and one in which all are is not, afterwards."""
    recipe, inputs = made(name, dtype=torch.float32)
    params, batches, live, counts = tree.map(
        lambda x: x.float() if x.is_floating_point() else x, dict(zip("pbln", world(recipe, inputs, CLIP), strict=True))
    ).values()
    strategy = strategies.fedavg()
    given = {"params": params}, {}, batches, live, counts
    many = block_train(recipe, strategy, 0.3, CLIP)
    usual = many(*given)
    with monkeypatch.context() as late:
        late.setattr(gradients, "waits", lambda x: False)
        assert_close(many(*given), usual, 0.0)
    clean = tree.map(torch.clone, batches)
    batches["live"][:] = 1.0
    batches["x"][1, 0, 2] = value
    expected = many(*given)
    with monkeypatch.context() as late:
        late.setattr(gradients, "waits", lambda x: False)
        found = many(*given)
        assert_close(many(*given[:2], clean, live, counts), usual, 0.0)
    assert all(math.isfinite(float(x.sum())) for x in tree.leaves(found[0]))
    assert_close(found, expected, 1e-5)
