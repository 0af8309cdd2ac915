"""Precision: float32 is what it was, bf16 differs a little and learns, and nothing that privacy rests on is rounded."""

import pytest
import torch
from folk import CLIP, assert_close, made, started, world

from fedtailor import strategies, tree
from fedtailor.config import load
from fedtailor.errors import ConfigError
from fedtailor.simulations import gradients, setting
from fedtailor.simulations.blocks import block_train
from fedtailor.simulations.composed import told
from fedtailor.simulations.feed import NOTHING
from fedtailor.simulations.folded import folded
from fedtailor.simulations.paths import Round, Task, check_half, forced
from fedtailor.simulations.precision import multiplied
from fedtailor.simulations.run import simulate

RECORD = {"epsilon": 3.0, "delta": 1e-4, "clip": 1.0}
FLAGS = (torch.backends.cuda.matmul, torch.backends.cudnn)


def single(name, clip, strategy=None):
    recipe, inputs = made(name, dtype=torch.float32)
    parts = dict(zip("pbln", world(recipe, inputs, clip), strict=True))
    params, *rest = tree.map(lambda x: x.float() if x.is_floating_point() else x, parts).values()
    strategy = strategy or strategies.fedavg()
    cast, memory = started(strategy, params)
    return recipe, Round(cast, memory, *rest)


def apart(found, expected):
    """How far summands are from each other, in lengths of the expected ones."""
    return float(tree.norm(tree.map(torch.sub, found["delta"], expected["delta"])) / tree.norm(expected["delta"]))


OTHERS = [("vmap", "conv1d"), ("vmap", "sequence"), ("loop", "sequence")]


@pytest.mark.parametrize("clip", [None, CLIP], ids=["plain", "clipped"])
@pytest.mark.parametrize(
    "path,name",
    [("block", name) for name in ("mlp", "conv1d", "conv2d", "text", "sequence")]
    + [pytest.param(path, name, marks=pytest.mark.slow) for path, name in OTHERS],
)
def test_bf16_is_near_and_float32_is_what_it_was(path, name, clip):
    recipe, given = single(name, clip)
    task = Task(recipe, strategies.fedavg(), 0.3, clip, NOTHING, 64, False)
    usual, _ = forced(path, task).many(*given)
    assert_close((forced(path, task._replace(half=False)).many(*given)[0], {}), (usual, {}), 0.0)
    found, _ = forced(path, task._replace(half=True)).many(*given)
    assert {x.dtype for x in tree.leaves(found)} == {torch.float32}
    assert 1e-6 < apart(found, usual) < 0.05


def test_a_wide_layers_weights_that_are_never_made():
    recipe, given = single("wide", None)
    usual, found = (
        block_train(recipe, strategies.fedavg(), 0.3, together=True, half=half)(*given)[0] for half in (False, True)
    )
    assert 1e-6 < apart(found, usual) < 0.05


@pytest.mark.parametrize("name", ["mlp", "conv2d", "text"])
def test_the_gradients_that_are_summed_are_those_whose_lengths_were_measured(name):
    """With bf16 too: one example's share is at most the clip, to float32's rounding and not to bfloat16's."""
    recipe, given = single(name, CLIP)
    model = folded(recipe)._replace(half=True)
    weights = torch.ones(len(given.live))
    batch = gradients.Batch(given.batches["x"][:, 0, 0], given.batches["y"][:, 0, 0], weights, weights, {})
    [parts] = gradients.clipped(recipe, model, [tree.at(given.cast["params"], None)], batch, 1e-3)
    lengths = torch.func.vmap(tree.norm)(gradients.whole(given.cast["params"] | {}, parts, len(weights)))
    torch.testing.assert_close(lengths, torch.full_like(lengths, 1e-3), rtol=2e-6, atol=0)


def test_a_model_that_fails_in_bf16_is_told_so_at_once(plan, sources, monkeypatch):
    """Torch's LayerNorm under vmap, on a CPU."""
    recipe, given = single("mlp", None)
    with pytest.raises(
        ConfigError, match="simulation.precision: bf16, but the model fails in it by way of vmap: .*use float32"
    ):
        check_half(forced("vmap", Task(recipe, strategies.fedavg(), 0.3, None, NOTHING, 64, False, True)), given)
    asked = []
    monkeypatch.setattr(setting, "check_half", lambda way, first: asked.append(way.path))
    for precision in ("float32", "bf16"):
        simulate(plan(rounds=1), sources, precision=precision)
    assert asked == ["block"]


def test_losses_and_weights_are_float32():
    recipe, given = single("sequence", None)
    seen = []
    watched = recipe._replace(losses=lambda outputs, y: (seen.append(outputs.dtype), recipe.losses(outputs, y))[1])
    for path in ("block", "vmap", "loop"):
        forced(path, Task(watched, strategies.fedavg(), 0.3, None, NOTHING, 64, False, True)).many(*given)
    assert set(seen) == {torch.float32}


def test_bf16_learns(plan, sources):
    ends = [simulate(plan(rounds=6), sources, precision=precision) for precision in ("float32", "bf16")]
    (a, p), (b, q) = ends
    assert any(not torch.equal(p[name], q[name]) for name in p)
    assert b.metrics["federated"]["auroc"] > 0.9
    assert b.metrics["federated"]["auroc"] == pytest.approx(a.metrics["federated"]["auroc"], abs=0.02)


@pytest.mark.slow
def test_processes_take_the_precision_that_one_takes(plan, sources):
    (_, p), (_, q) = (simulate(plan(), sources, precision="bf16", workers=n) for n in (1, 2))
    for name in p:
        torch.testing.assert_close(p[name], q[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "precision,record,rounded",
    [
        ("float32", False, False),
        ("tf32", False, True),
        ("bf16", False, True),
        ("bf16", True, False),
        ("float32", True, False),
    ],
)
def test_a_gpu_rounds_products_as_asked_and_afterwards_as_before(precision, record, rounded):
    before = [each.allow_tf32 for each in FLAGS], torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), multiplied(precision, record):
        assert [each.allow_tf32 for each in FLAGS] == [rounded, rounded]
        raise KeyError
    assert ([each.allow_tf32 for each in FLAGS], torch.get_float32_matmul_precision()) == before


def test_lengths_are_not_measured_in_tf32(plan, sources):
    with pytest.raises(ConfigError, match="simulation.precision: tf32 rounds the lengths that privacy=record clips"):
        simulate(plan(privacy=RECORD), sources, precision="tf32")


def test_tf32_changes_nothing_on_a_cpu(plan, sources):
    ends = [simulate(plan(), sources, precision=precision)[1] for precision in ("float32", "tf32")]
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())


def test_a_result_says_its_precision_where_it_is_another():
    words = ["study=heart", "privacy=none"]
    assert "precision" not in told(load(words))
    assert told(load([*words, "simulation.precision=bf16"]))["precision"] == "bf16"
    with pytest.raises(ConfigError, match="precision: .*'float32', 'tf32' or 'bf16'"):
        load([*words, "simulation.precision=fp16"])


def test_it_is_no_part_of_a_plan():
    """A deployment cannot be asked for it."""
    with pytest.raises(ConfigError, match="precision"):
        load(["study=heart", "precision=bf16"])
    plans = [load(["study=heart", f"simulation.precision={p}"]).plan for p in ("float32", "bf16")]
    assert plans[0] == plans[1]
