"""A block of clients at once is the same clients one at a time: for every kind of layer, plain and clipped."""

import pytest
import torch
from folk import CLIP, MODELS, B, K, S, assert_close, made, one_by_one, reference, started, world
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from fedtailor import recipe as recipes
from fedtailor import strategies, tree
from fedtailor.client.safe_optimizer import quiet_hooks
from fedtailor.recipe import Part, Recipe
from fedtailor.simulations import convolutions
from fedtailor.simulations.blocks import block_train
from fedtailor.simulations.feed import Feed
from fedtailor.simulations.folded import folded
from fedtailor.simulations.spanned import SMALL
from fedtailor.simulations.stands import NotBatchable
from fedtailor.strategy import Strategy, WeightedChange

BOTH = pytest.mark.parametrize("clip", [None, CLIP], ids=["plain", "clipped"])


@pytest.mark.parametrize("clip", [None, CLIP, 1e3], ids=["plain", "clipped", "clipped at most"])
@pytest.mark.parametrize("name", MODELS)
def test_a_block_is_its_clients_one_at_a_time(name, clip):
    recipe, inputs = made(name)
    strategy = strategies.fedavg()
    params, batches, live, counts = world(recipe, inputs, clip, strategy)
    cast, memory = started(strategy, params)
    expected = one_by_one(reference(recipe, strategy, clip), cast, memory, batches, live, counts)
    found = block_train(recipe, strategy, 0.3, clip)(cast, memory, batches, live, counts)
    assert_close(found, expected)
    moved = tree.norm(tree.at(found[0]["delta"], 0))
    assert moved > 1e-3, "this would hold of clients that do nothing"


@BOTH
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "patches"])
def test_grouped_convolutions_are_the_loop(name, clip, monkeypatch):
    """What a GPU does, done here."""
    monkeypatch.setattr(convolutions, "looped", lambda x: False)
    test_a_block_is_its_clients_one_at_a_time(name, clip)


STRATEGIES = {
    "fedprox": strategies.fedprox(mu=0.5),
    "scaffold": strategies.scaffold(population=K),
    "fednova": strategies.fednova(),
    "feddyn": strategies.feddyn(alpha=0.1),
    "topk": strategies.topk(),
    "fedper": strategies.fedper(strategies.scaffold(population=K), own=["3.*"]),
    "ditto": strategies.ditto(strategies.fedprox(mu=0.5)),
    "qfedavg": strategies.qfedavg(),
}


@BOTH
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_hears_the_same(name, clip):
    recipe, inputs = made("mlp")
    strategy = STRATEGIES[name]
    if strategy.needs_loss and clip is not None:
        pytest.skip("no loss under privacy")
    params, batches, live, counts = world(recipe, inputs, clip, strategy)
    cast, memory = started(strategy, params)
    expected = one_by_one(reference(recipe, strategy, clip), cast, memory, batches, live, counts)
    found = block_train(recipe, strategy, 0.3, clip)(cast, memory, batches, live, counts)
    assert_close(found, expected)


HALVED = strategies.fedavg()._replace(start=lambda cast, memory: tree.map(lambda p: p / 2, cast["params"]))


@BOTH
@pytest.mark.parametrize("name", ["mlp", "text", "conv2d", "twice", "wide", "wide twice"])
@pytest.mark.parametrize(
    "strategy", [strategies.fedavg(), strategies.fednova(), HALVED], ids=["fedavg", "fednova", "start"]
)
def test_the_sum_of_a_block_is_its_clients_sum(name, clip, strategy):
    """Also where no client's weights are ever made: the wide layers of a plain run, or of a clipped one without noise."""
    recipe, inputs = made(name)
    params, batches, live, counts = world(recipe, inputs, clip)
    batches.pop("noise", None)
    cast, memory = started(strategy, params)
    still = tree.map(lambda p: torch.zeros(K, S, *p.shape, dtype=p.dtype), params)
    each, _ = one_by_one(reference(recipe, strategy, clip), cast, memory, batches | {"noise": still}, live, counts)
    found, _ = block_train(recipe, strategy, 0.3, clip, together=True)(cast, memory, batches, live, counts)
    assert_close((found, {}), (tree.map(lambda x: x.sum(0)[None], each), {}))


def test_the_wide_layers_weights_are_not_made(monkeypatch):
    """What the test above says of them would hold if they were."""
    from fedtailor.simulations.descent import Descent

    recipe, inputs = made("wide twice")
    assert K * 300 * 200 >= SMALL
    params, batches, live, counts = world(recipe, inputs, None)
    thin = []
    monkeypatch.setattr(Descent, "total", lambda self, weights, start: thin.append(sorted(self.seen)) or {})
    block_train(recipe, strategies.fedavg(), 0.3, together=True)({"params": params}, {}, batches, live, counts)
    assert thin == [["outer.weight", "wide.weight"]]


def test_what_a_strategy_casts_is_not_changed_in_place():
    recipe, inputs = made("twice")
    params, batches, live, counts = world(recipe, inputs, None)
    before = tree.map(torch.clone, params)
    for part in (slice(0, K), slice(0, 1)):
        given = tree.at(batches, part), live[part], counts[part]
        block_train(recipe, strategies.fedavg(), 0.3)({"params": params}, {}, *given)
    assert all(torch.equal(params[name], before[name]) for name in params)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", ["keeps", "ditto", "fedavg"])
def test_the_next_block_does_not_change_what_the_last_one_said(name, together):
    recipe, inputs = made("wide")
    keeps = strategies.fedavg()._replace(report=lambda local: ({"weight": local.num_steps}, {"own": local.params}))
    strategy = keeps if name == "keeps" else STRATEGIES.get(name, strategies.fedavg())
    params, batches, live, counts = world(recipe, inputs, None)
    cast, memory = started(strategy, params)
    many = block_train(recipe, strategy, 0.3, together=together)
    found = many(cast, memory, batches, live, counts)
    before = tree.map(torch.clone, found[0]), tree.map(torch.clone, found[1])
    many(cast, memory, batches | {"x": batches["x"] + 1}, live, counts)
    assert_close(found, before, 0.0)


@BOTH
@pytest.mark.parametrize("together", [False, True])
def test_the_size_of_a_block_does_not_show(clip, together):
    """Twenty clients by 1, 7 and 64, in float32, with dropout: whose choices are each client's own, too."""
    recipe, inputs = made("dropout")
    parts = [world(recipe, inputs, clip, seed=seed) for seed in range(4)]
    params = parts[0][0]
    batches = tree.map(lambda *xs: torch.cat(xs), *(part[1] for part in parts))
    batches["seed"] = torch.arange(len(batches["seed"]))[:, None].expand(-1, S)
    live, counts = torch.cat([part[2] for part in parts]), torch.cat([part[3] for part in parts])
    many = block_train(recipe, strategies.fedavg(), 0.3, clip, together=together)
    totals = []
    for size in (1, 7, 64):
        cuts = [slice(i, i + size) for i in range(0, len(live), size)]
        found = [many({"params": params}, {}, tree.at(batches, c), live[c], counts[c])[0] for c in cuts]
        totals.append((tree.map(lambda *xs: torch.cat(xs).sum(0), *found), {}))
    assert_close(totals[0], totals[1])
    assert_close(totals[0], totals[2])


@pytest.mark.parametrize(
    "settings", [{}, {"bias": False, "batch_first": True}, {"num_layers": 2, "bidirectional": True}], ids=str
)
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM], ids=lambda kind: kind.__name__)
def test_a_recurrent_layer_begins_with_nothing(kind, settings):
    own = kind(3, 4, dtype=torch.double, **settings)
    model = folded(Recipe("recurrent", None, lambda: own, None, None))
    params = {
        name: torch.stack([p.detach(), p.detach() + 0.1])
        for name, p in kind(3, 4, dtype=torch.double, **settings).named_parameters()
    }
    x = torch.randn(2 * B, 5, 3, dtype=torch.double)
    first = x if own.batch_first else x.transpose(0, 1)
    found, ended = model.run(params, first, 2)
    for client in range(2):
        mine = x[client * B :][:B] if own.batch_first else x[client * B :][:B].transpose(0, 1)
        expected, end = torch.func.functional_call(own, tree.at(params, client), (mine,))
        part = found.unflatten(0 if own.batch_first else 1, (2, B)).select(0 if own.batch_first else 1, client)
        torch.testing.assert_close(part, expected)
        for one, other in zip(ended if kind is nn.LSTM else [ended], end if kind is nn.LSTM else [end], strict=True):
            torch.testing.assert_close(one.unflatten(1, (2, B))[:, client], other)


def test_what_a_recurrent_layer_cannot_be_batched_for():
    with pytest.raises(NotBatchable, match="layer.weight_ih_l0: a parameter of LSTM with proj_size"):
        folded(Recipe("projected", None, lambda: nn.ModuleDict({"layer": nn.LSTM(3, 4, proj_size=2)}), None, None))
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 3), torch.ones(2, 3)])
    model = folded(Recipe("packed", None, lambda: nn.GRU(3, 4), None, None))
    with pytest.raises(NotBatchable, match="GRU: not a batch of sequences of one length"):
        model.run({}, packed, 2)


@pytest.mark.parametrize("innermost", [True, False])
def test_images_lie_as_the_model_bears_it(innermost):
    """The run that a view ended has drawn nothing."""
    recipe, inputs = made("viewed" if not innermost else "patches")
    model = folded(recipe)
    params = tree.at(recipes.initial(recipe, 0), None)
    if not innermost:
        model.module.dropout.p = 0.5
    model.tape.seed = torch.arange(K)
    x = inputs(torch.Generator().manual_seed(0), K * B)
    first = model.run(params, x, K)
    assert model.tape.arranged == innermost
    assert model.tape.calls[0].given.is_contiguous() != innermost and len(model.tape.calls) == 2 + innermost
    model.tape.arranged, model.tape.draws = False, 0
    torch.testing.assert_close(model.run(params, x, K), first, rtol=1e-12, atol=1e-12)


def test_dropout_differs_by_client_layer_and_step_and_not_by_padding():
    recipe, _ = made("dropout")
    model = folded(recipe)
    model.tape.clients, model.tape.seed = K, torch.arange(K)
    one, two = model.module[1], model.module[2]
    drawn = torch.cat([layer(torch.ones(K * 50, 4)).view(K, -1) for layer in (one, two, one, two)])
    assert len(drawn.unique(dim=0)) == 4 * K
    assert drawn.unique().tolist() == pytest.approx([0, 1 / 0.6]) and drawn.mean() == pytest.approx(1.0, abs=0.05)
    model.tape.draws = 0
    padded = one(torch.ones(K * 60, 4)).view(K, 60, 4)[:, :50]
    assert torch.equal(padded.flatten(1), drawn[:K])


GRADIENT = Strategy(
    init=lambda params: {"params": params},
    apply=lambda state, total, round: state,
    report=WeightedChange(lambda local: (-torch.ones_like(local.num_examples), {})),
)


@pytest.mark.parametrize("name", ["mlp", "text unpadded", "conv2d", "patches", "sequence", "long sequence"])
def test_the_sum_of_clipped_gradients_is_opacus(name):
    """One step without noise, lr and scale 1: the change is the sum of the clipped gradients."""
    recipe, inputs = made(name)
    params, batches, live, counts = world(recipe, inputs, CLIP)
    batches = {n: x[:, :1] for n, x in batches.items() if n != "noise"}
    batches |= {"live": torch.ones(K, 1, B).double(), "scale": torch.ones(K, 1).double()}
    many = block_train(recipe, GRADIENT, 1.0, CLIP)
    found = many({"params": params}, {}, batches, live[:, :1], counts)[0]["delta"]
    for k in range(K):
        module = GradSampleModule(recipe.model(), loss_reduction="sum", strict=False)
        with torch.no_grad():
            for own, p in module._module.named_parameters():
                p.copy_(params[own])
        optimizer = DPOptimizer(torch.optim.SGD(module.parameters(), 1.0), noise_multiplier=0.0, max_grad_norm=CLIP,
                                expected_batch_size=None, loss_reduction="sum")  # fmt: skip
        with quiet_hooks():
            recipe.losses(module(batches["x"][k, 0]), batches["y"][k, 0]).sum().backward()
        optimizer.pre_step()
        for own, p in module._module.named_parameters():
            torch.testing.assert_close(found[own][k], p.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [1e25, 3e38, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "sequence"])
def test_an_example_that_is_not_finite_is_nothing_and_a_long_one_is_clipped(name, value):
    """In float32, where squares of 1e25 overflow: as with one client at a time, which adds them up in float64."""
    recipe, inputs = made(name, dtype=torch.float32)
    params, *rest = world(recipe, inputs, CLIP)
    single = tree.map(lambda x: x.float() if x.is_floating_point() else x, dict(zip("bln", rest, strict=True)))
    batches, live, counts = single.values()
    batches["live"][:] = 1.0
    batches["x"][1, 0, 2] = value
    strategy = strategies.fedavg()
    cast, memory = started(strategy, params)
    expected = one_by_one(reference(recipe, strategy, CLIP), cast, memory, batches, live, counts)
    found = block_train(recipe, strategy, 0.3, CLIP)(cast, memory, batches, live, counts)
    assert all(bool(x.isfinite().all()) for x in tree.leaves(found[0]))
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("step", range(S))
def test_an_example_that_is_not_finite_is_nothing_where_no_client_has_weights_either(step):
    recipe, inputs = made("wide")
    params, batches, live, counts = world(recipe, inputs, None)
    batches["live"][:], batches["x"][0, step, 2] = 1.0, float("nan")
    fedavg, rest = strategies.fedavg(), (live, counts)
    still = {"noise": tree.map(lambda p: torch.zeros(K, S, *p.shape, dtype=p.dtype), params)}
    each, _ = one_by_one(reference(recipe, fedavg, CLIP), {"params": params}, {}, batches | still, *rest)
    found, _ = block_train(recipe, fedavg, 0.3, CLIP, together=True)({"params": params}, {}, batches, *rest)
    assert_close((found, {}), (tree.map(lambda x: x.sum(0)[None], each), {}))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", ["mlp", "wide", "wide twice", "conv2d"])
def test_rows_by_number_are_the_rows(name, together):
    """Also where products of rows with rows are made of all of a client's at once, as "wide" ones' are."""
    recipe, inputs = made(name)
    params, batches, live, counts = world(recipe, inputs, None)
    table = Part(batches["x"].flatten(0, 2), batches["y"].flatten())
    order = torch.randperm(len(table.y), generator=torch.Generator().manual_seed(0))
    rows = order.argsort().view(K, S, B)
    named = {n: x for n, x in batches.items() if n not in ("x", "y")} | {"rows": rows}
    feed = Feed(Part(table.x[order], table.y[order]))
    fedavg, given = strategies.fedavg(), (live, counts)
    expected, _ = block_train(recipe, fedavg, 0.3)({"params": params}, {}, batches, *given)
    expected = tree.map(lambda x: x.sum(0)[None], expected) if together else expected
    many = block_train(recipe, fedavg, 0.3, feed=feed, together=together)
    other = named | {"rows": rows.flip(0), "live": batches["live"].flip(0)}
    for batch, wanted in ((named, expected), (other, None), (named, expected)):  # another block in between
        found, _ = many({"params": params}, {}, batch, *given)
        if wanted is not None:
            assert_close((found, {}), (wanted, {}))
    assert all(torch.equal(feed.all(named)[n], batches[n]) for n in batches)
