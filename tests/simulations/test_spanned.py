"""A wide layer that is given the examples: trained without weights, each example multiplied once however often it is seen."""

import math

import pytest
import torch
from folk import B, K, S, made, reference, world
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedtailor import strategies, tree
from fedtailor.errors import ConfigError
from fedtailor.recipe import Part, initial
from fedtailor.simulations import spanned
from fedtailor.simulations.blocks import block_train
from fedtailor.simulations.engine import looped, simulate_round
from fedtailor.simulations.feed import Feed, distinct
from fedtailor.simulations.paths import Round, Task, sensible
from fedtailor.simulations.spanned import Spanned, first_of, pays, size

FED = strategies.fedavg()


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_each_clients_rows_are_listed_once_and_found_again(clients, steps, batch, rows, seed, even):
    seen = torch.randint(rows, (clients, steps, batch), generator=torch.Generator().manual_seed(seed)) * 3
    places = distinct(seen, 20 if even else None)
    own = [sorted(set(one.flatten().tolist())) for one in seen]
    most, every = max(map(len, own)), steps * batch
    assert places.many == min(n for n in (every * part // 20 for part in range(21)) if n >= most) if even else most
    for mine, listed in zip(own, places.rows.tolist(), strict=True):
        assert listed[: len(mine)] == mine and set(listed) == set(mine)
    assert torch.equal(places.rows.flatten()[places.at], seen.transpose(0, 1).reshape(steps, -1))


def seen_again(epochs, rows, seed=0):
    """Clients of ``rows`` rows, who see them ``epochs`` times in batches of B, and one of whom has fewer: its rest is padding."""
    rng = torch.Generator().manual_seed(seed)
    recipe, inputs = made("wide")
    params, _, _, counts = world(recipe, inputs, None)
    table = Part(inputs(rng, K * rows), torch.randint(3, (K * rows,), generator=rng))
    orders = [torch.cat([torch.randperm(rows, generator=rng) for _ in range(epochs)]) + k * rows for k in range(K)]
    steps = epochs * rows // B
    batches = {
        "rows": torch.stack(orders).view(K, steps, B),
        "live": torch.ones(K, steps, B, dtype=torch.double),
        "scale": torch.rand(K, steps, generator=rng, dtype=torch.double),
        "seed": torch.arange(K)[:, None].expand(K, steps),
    }
    few = batches["rows"][1] % rows < rows // 2
    batches["live"][1] *= few
    batches["rows"][1] *= few  # padding is the first row of all, which is another client's
    live = torch.ones(K, steps, dtype=torch.double)
    live[2, steps // 2 :] = 0
    return recipe, params, Feed(table), batches, live, counts


@pytest.fixture
def rows_of(monkeypatch):
    """Of every block that was trained so, how many rows each of its clients has."""
    found, total = [], Spanned.total
    monkeypatch.setattr(Spanned, "total", lambda self, *of: found.append(self.inputs.shape[1]) or total(self, *of))
    return found


@pytest.mark.parametrize("epochs,rows", [(1, 8), (3, 8), (5, 12)])
@pytest.mark.parametrize("strategy", ["fedavg", "fednova"])
def test_epochs_of_a_block_are_those_of_one_client_after_another(rows_of, epochs, rows, strategy):
    strategy = getattr(strategies, strategy)()
    recipe, params, feed, batches, *rest = seen_again(epochs, rows)
    alone = looped(reference(recipe, strategy, None))({"params": params}, {}, feed.all(batches), *rest)[0]
    found = block_train(recipe, strategy, 0.3, feed=feed, together=True)({"params": params}, {}, batches, *rest)[0]
    for name, expected in tree.flatten(alone).items():
        torch.testing.assert_close(tree.flatten(found)[name][0], expected.sum(0), rtol=1e-10, atol=1e-12)
    assert rows_of == [rows]


@pytest.mark.parametrize("block", [1, 3, 64])
def test_the_size_of_a_block_does_not_show(rows_of, block, monkeypatch):
    """Two rounds of the same five clients: one block that knows its examples again, or several that do not."""
    monkeypatch.setattr(spanned, "SMALL", 1)
    recipe, params, feed, batches, *rest = seen_again(3, 8)
    spanning = block_train(recipe, FED, 0.3, feed=feed, together=True)
    alone = looped(reference(recipe, FED, None))
    state, other = FED.init(params), FED.init(params)
    for round in range(2):
        state, _ = simulate_round(FED, spanning, state, {}, batches, *rest, round, block)
        other, _ = simulate_round(FED, alone, other, {}, feed.all(batches), *rest, round)
    assert len(rows_of) == 2 * math.ceil(K / block)
    for name, p in other["params"].items():
        torch.testing.assert_close(state["params"][name], p, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_whatever_the_model_and_the_rows_rounds_are_those_of_one_client_after_another(data):
    """Rows that come again or do not, padding anywhere, frozen parameters, blocks of any size, the same clients or others."""
    draw, rng = (
        (lambda *of: data.draw(st.integers(*of))),
        torch.Generator().manual_seed(data.draw(st.integers(0, 9999))),
    )
    clients, steps, batch, rows, inputs, hidden = (draw(1, most) for most in (4, 5, 4, 9, 6, 5))
    bias, own = data.draw(st.booleans()), clients * rows
    layers = lambda: (nn.Flatten(), nn.Linear(2 * inputs, hidden, bias=bias), nn.Tanh(), nn.Linear(hidden, 3))  # noqa: E731
    recipe, _ = made((lambda: nn.Sequential(*layers()), None))
    params = initial(recipe, 0)
    frozen = data.draw(st.sampled_from([None, None, "1.weight", "1.bias", "3.weight"]))
    strategy = data.draw(st.sampled_from([FED, strategies.fednova()]))._replace(trains=lambda name: name != frozen)
    feed = Feed(Part(torch.randn(own, 2, inputs, generator=rng).double(), torch.randint(3, (own,), generator=rng)))
    with pytest.MonkeyPatch.context() as everywhere:
        everywhere.setattr(spanned, "SMALL", 1)
        everywhere.setattr(spanned, "pays", lambda *of: True)
        written = (lambda make: make(False)) if data.draw(st.booleans()) else (lambda make: make(True))
        many = block_train(recipe, strategy, 0.3, feed=feed, together=True, replay=written)
        alone = looped(reference(recipe, strategy, None))
        state, other = strategy.init(params), strategy.init(params)
        for round in range(3):
            if round == 0 or data.draw(st.booleans()):
                live = (torch.rand(clients, steps, batch, generator=rng) < 0.8).double()
                seen = torch.randint(rows, live.shape, generator=rng) + torch.arange(clients)[:, None, None] * rows
                scale = torch.rand(clients, steps, generator=rng).double()
                batches = {"rows": (seen * live).long(), "live": live, "scale": scale}
                taken = live.any(2).double()
                taken[:, 0] = 1  # a client that takes no step has no part in a round
                rest = taken, torch.arange(1.0, clients + 1).double()
            block = draw(1, clients)
            state, _ = simulate_round(strategy, many, state, {}, batches, *rest, round, block)
            other, _ = simulate_round(strategy, alone, other, {}, feed.all(batches), *rest, round, block)
            for name, p in other["params"].items():
                torch.testing.assert_close(state["params"][name], p, rtol=1e-9, atol=1e-10)


def test_examples_that_are_given_as_such_are_never_looked_for(rows_of):
    recipe, params, feed, batches, *rest = seen_again(3, 8)
    many = block_train(recipe, FED, 0.3, feed=feed, together=True)
    by_number = many({"params": params}, {}, batches, *rest)[0]["delta"]
    as_such = many({"params": params}, {}, feed.all(batches), *rest)[0]["delta"]
    assert rows_of == [8, 24]
    for name, delta in by_number.items():
        torch.testing.assert_close(as_such[name], delta, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows,many", [(20, 21), (8, 8)])
def test_a_block_that_is_written_down_is_given_what_is_known(rows_of, rows, many):
    """What a compiler or a CUDA graph repeats does not depend on which rows are the same, but for how many, about."""
    recipe, params, feed, batches, *rest = seen_again(3, rows)
    told = []

    def written(make):
        step = make(False)
        return lambda *given: told.append(tree.flatten(given[2])) or step(*given)

    found = block_train(recipe, FED, 0.3, feed=feed, together=True, replay=written)(
        {"params": params}, {}, batches, *rest
    )
    plain = block_train(recipe, FED, 0.3, feed=feed, together=True)({"params": params}, {}, batches, *rest)
    assert rows_of == [many, rows]
    assert told[0]["examined/inputs"].shape == (K, many, 300) and told[0]["examined/products"].shape == (K, many, many)
    for name, delta in plain[0]["delta"].items():
        torch.testing.assert_close(found[0]["delta"][name], delta, rtol=1e-10, atol=1e-12)


def test_what_is_known_of_the_same_examples_is_not_made_again(monkeypatch):
    """In whatever order they come; and of others it is, also where the last time failed halfway."""
    made_of, each = [], spanned.with_each_other
    monkeypatch.setattr(spanned, "with_each_other", lambda x, out: made_of.append(len(x)) or each(x, out))
    recipe, params, feed, batches, *rest = seen_again(3, 8)
    anew = batches | {"rows": batches["rows"].flip(1), "live": batches["live"].flip(1)}
    others = batches | {"rows": batches["rows"].roll(1, 0)}
    many = block_train(recipe, FED, 0.3, feed=feed, together=True)

    def check(some, times):
        made_of.clear()
        found = many({"params": params}, {}, some, *rest)[0]["delta"]
        assert len(made_of) == times
        fresh = block_train(recipe, FED, 0.3, feed=feed, together=True)({"params": params}, {}, some, *rest)[0]["delta"]
        assert all(torch.equal(found[name], fresh[name]) for name in fresh)

    for some, times in ((batches, 1), (batches, 0), (anew, 0), (others, 1), (batches, 1)):
        check(some, times)
    with monkeypatch.context() as broken:
        broken.setattr(spanned, "with_each_other", lambda x, out: each(x, out.zero_()) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            many({"params": params}, {}, others, *rest)
    check(others, 1)


def test_it_is_near_in_half_precision():
    recipe, params, feed, batches, *rest = seen_again(3, 8)
    expected = block_train(recipe, FED, 0.3, feed=feed, together=True)({"params": params}, {}, batches, *rest)[0][
        "delta"
    ]
    params, batches, *rest = (tree.map(single, {"": each})[""] for each in (params, batches, *rest))
    data = feed.data._replace(x=feed.data.x.float())
    halved = recipe._replace(model=lambda: recipe.model().float())
    many = block_train(halved, FED, 0.3, feed=feed._replace(data=data), together=True, half=True)
    found = many({"params": params}, {}, batches, *rest)[0]["delta"]
    for name, delta in expected.items():
        assert 1e-4 < (found[name] - delta).norm() / delta.norm() < 2e-2


def single(x):
    return x.float() if x.is_floating_point() else x


class Fork(nn.Module):
    """What it is given goes two ways."""

    def __init__(self, way):
        super().__init__()
        self.wide, self.way = nn.Linear(300, 200), way

    def forward(self, x):
        return self.way(self, x)


def hooked():
    module = nn.Sequential(nn.Linear(300, 200))
    module.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    return module


FIRST = {
    "in a sequence": (nn.Sequential(nn.Linear(300, 200), nn.ReLU()), "0"),
    "flattened": (nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(300, 200))), "1.0"),
    "flattened by hand": (Fork(lambda own, x: own.wide(torch.flatten(x.reshape(-1, 300), 1))), "wide"),
    "given more": (Fork(lambda own, x: own.wide(x) + x[:, :200]), None),
    "given its length": (Fork(lambda own, x: own.wide(x.view(x.shape[0], 300))), None),
    "used twice": (Fork(lambda own, x: own.wide(own.wide(x)[:, :1].expand(-1, 300))), None),
    "given something else": (Fork(lambda own, x: own.wide(x + 1)), None),
    "given another's": (Fork(lambda own, x: own.wide(torch.cat([x], 0))), None),
    "by a condition": (Fork(lambda own, x: own.wide(x if x.sum() > 0 else -x)), None),
    "hooked": (hooked(), None),
    "not linear": (nn.Sequential(nn.LayerNorm(300), nn.Linear(300, 200)), None),
    "itself": (nn.Linear(300, 200), None),
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_layer_is_known_by_the_models_code(name):
    module, first = FIRST[name]
    assert first_of(module) == first


class Fickle(nn.Module):
    """Its first layer is given the examples themselves once, and others from then on."""

    def __init__(self):
        super().__init__()
        self.wide, self.head, self.runs = nn.Linear(300, 200), nn.Linear(200, 3), 0

    def forward(self, x):
        self.runs += 1
        return self.head(torch.tanh(self.wide(x if self.runs == 1 else 2 * x)))


def test_a_layer_that_is_given_the_examples_is_given_them_in_every_step():
    recipe, inputs = made("wide")
    recipe = recipe._replace(model=lambda: Fickle().double())
    params, batches, live, counts = world(recipe, inputs, None)
    many = block_train(recipe, FED, 0.3, together=True)
    with pytest.raises(ConfigError, match=r"wide\.weight is given the examples .*something else in a step.*path=vmap"):
        many({"params": params}, {}, batches, live, counts)


def test_what_stands_for_the_examples_is_no_number(monkeypatch):
    """A use of them that nobody knew of would show."""
    seen = []
    monkeypatch.setattr(nn.Flatten, "forward", lambda self, x: seen.append(x.clone()) or x.flatten(1))
    recipe, _ = made("wide")
    flat = recipe._replace(model=lambda: nn.Sequential(nn.Flatten(), *recipe.model()))
    params, batches, live, counts = world(flat, lambda rng, *n: torch.randn(*n, 3, 100, generator=rng).double(), None)
    found = block_train(flat, FED, 0.3, together=True)({"params": params}, {}, batches, live, counts)[0]
    assert len(seen) == S and all(x.isnan().all() for x in seen)
    assert all(delta.isfinite().all() for delta in found["delta"].values())


def test_whether_it_pays():
    start = torch.zeros(10, 3072)
    assert not pays(start, 50, 5, 10) and pays(start, 50, 25, 10)  # one epoch, and five
    assert pays(torch.zeros(128, 3072), 50, 5, 10) and not pays(torch.zeros(128, 3072), 700, 70, 10)
    assert not pays(torch.zeros(4096, 41), 203, 25, 40)  # far more examples than numbers in each
    assert not pays(torch.zeros(200, 300), 600, 300, 10) and pays(torch.zeros(200, 300), 300, 150, 10)
    assert pays(start.to("meta"), 19, 5, 10) and not pays(start.to("meta"), 50, 25, 10)


def test_blocks_are_as_large_as_what_is_kept_in_place_of_weights_allows(monkeypatch):
    recipe, params, feed, batches, *rest = seen_again(40, 8)
    task = Task(recipe, FED, 0.3, None, feed, 64, True)
    first = Round({"params": params}, {}, batches, *rest)
    assert sensible(task, first) == 64
    monkeypatch.setattr("fedtailor.simulations.paths.CACHE", 300 * 200 * 8)
    assert sensible(task, first) == 64  # of all steps' 320 rows they would be weights, of which the cache holds one
    assert sensible(task._replace(together=False), first) == 1
    monkeypatch.setattr("fedtailor.simulations.paths.ROOM", 2 * size(params["0.weight"], 8))
    assert sensible(task, first) == 2
