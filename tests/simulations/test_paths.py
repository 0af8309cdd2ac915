"""Which way clients are trained: the batched one where it is right, another where it is not, and it says so."""

import pytest
import torch
from folk import CLIP, assert_close, made, one_by_one, reference, started, world
from torch import nn
from torch.nn.functional import linear, relu
from unbatched import Lucky, Scaled, first_round, task

from fedtailor import strategies
from fedtailor.errors import ConfigError
from fedtailor.simulations import paths, setting
from fedtailor.simulations.feed import NOTHING
from fedtailor.simulations.paths import Round, Task, choose
from fedtailor.simulations.run import simulate


class Centred(nn.Module):
    """Mixes the examples of a batch, without a layer that would give it away."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x):
        return self.inner(x - x.mean(0))


class InPlace(nn.Module):
    """Changes what a layer made."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(relu(self.outer(self.inner(x)), inplace=True))


class Tied(nn.Module):
    """Uses a layer's weight beside the layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.outer(linear(self.inner(x), self.inner.weight))


class Twins(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.outer = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.outer(self.two(torch.tanh(self.one(x))))


class Attending(nn.Module):
    """Attends to nothing beside what there is."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, add_zero_attn=True, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        x = x[:, None]
        return self.head(self.attention(x, x, x)[0][:, 0])


class Words(nn.Module):
    """Numbers as words."""

    def forward(self, x):
        return x.abs().long() % 7


UNFIT = {
    "scale: a parameter of Scaled": Scaled,
    "0: BatchNorm1d mixes": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)),
    "does the model mix examples": Centred,
    "outer: its output is changed in place": InPlace,
    "AttributeError: 'Stand' object has no attribute 'weight'": Tied,
    "two.weight: the same parameter as one of one": Twins,
    "draws random numbers": Lucky,
    "attention.in_proj_weight: a parameter of MultiheadAttention": Attending,
    "max_norm": lambda: nn.Sequential(Words(), nn.Embedding(7, 6, max_norm=1.0), nn.Flatten(), nn.Linear(36, 3)),
    "padding_mode='circular'": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(9, 3)
    ),
}


LOOPED = ("0: BatchNorm1d mixes", "does the model mix examples", "draws random numbers", "max_norm")


@pytest.mark.parametrize("why", UNFIT)
def test_a_model_without_a_batched_form_falls_back_and_says_why(why):
    made_up = task(UNFIT[why])
    way = choose("auto", made_up, first_round(made_up.recipe))
    assert way.path == ("loop" if why in LOOPED else "vmap") and why in way.why
    with pytest.raises(ConfigError, match="simulation.path: block, but .*auto falls back on vmap or a loop"):
        choose("block", made_up, first_round(made_up.recipe))


class Last(nn.Module):
    """Torch cannot tell its examples' gradients apart: it begins with nothing, in place."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x[:, None])[0][:, 0])


def test_a_model_that_nothing_vouches_for_is_refused():
    made_up = task(Last, CLIP)
    with pytest.raises(ConfigError, match="recipe: not even one client .* examples' gradients apart .*privacy=none"):
        choose("auto", made_up, first_round(made_up.recipe, CLIP))
    assert choose("auto", task(Last), first_round(made_up.recipe)).path == "block"


@pytest.mark.parametrize("model", [Scaled, Twins, InPlace, Tied])
def test_what_falls_back_is_still_right(model):
    made_up = task(model)
    given = first_round(made_up.recipe)
    found = choose("auto", made_up, given).many(*given)
    assert_close(found, one_by_one(reference(made_up.recipe, made_up.strategy, None), *given))


@pytest.mark.parametrize("clip", [None, CLIP])
def test_all_ways_lead_to_one_result(clip):
    recipe, inputs = made("mlp")
    params, batches, live, counts = world(recipe, inputs, clip)
    strategy = strategies.fedavg()
    cast, memory = started(strategy, params)
    given = Round(cast, memory, batches, live, counts)
    way = Task(recipe, strategy, 0.3, clip, NOTHING, 2, False)
    found = {path: choose(path, way, given) for path in ("auto", "block", "loop", "vmap", "measure")}
    assert [found[path].path for path in ("auto", "block", "loop", "vmap")] == ["block", "block", "loop", "vmap"]
    assert set(found["measure"].seconds) == {"vmap 2", "loop 2", "block 1", "block 2"}
    best = min(found["measure"].seconds, key=found["measure"].seconds.__getitem__)
    assert best == f"{found['measure'].path} {found['measure'].block}"
    for path in found:
        assert_close(found[path].many(*given), found["loop"].many(*given))


def test_on_a_cpu_only_as_many_clients_at_once_as_its_cache_holds(monkeypatch):
    recipe, inputs = made("wide")
    params, batches, live, counts = world(recipe, inputs, None)
    given = Round({"params": params}, {}, batches, live, counts)
    size = sum(8 * p.numel() for p in params.values())
    monkeypatch.setattr(paths, "CACHE", 3 * size)
    each, summed = (Task(recipe, strategies.fedavg(), 0.3, None, NOTHING, 64, together) for together in (False, True))
    assert (paths.sensible(each, given), paths.sensible(summed, given)) == (3, 64)  # summed: its weights are not made
    assert paths.sensible(summed._replace(strategy=strategies.fedprox(mu=1.0)), given) == 3
    assert paths.sensible(each._replace(block=2), given) == 2
    monkeypatch.setattr(paths, "CACHE", 1)
    assert paths.sensible(each, given) == 1


def test_a_simulation_says_which_way_it_takes(plan, sources):
    said = []
    simulate(plan(rounds=1), sources, on_event=said.append)
    simulate(plan(rounds=1), sources, path="vmap", on_event=said.append)
    assert [(e["path"], e["block"], e["why"]) for e in said if e["kind"] == "path"] == [
        ("block", 64, ""),
        ("vmap", 64, "asked for"),
    ]


@pytest.mark.parametrize("privacy", [None, {"epsilon": 3.0, "delta": 1e-4, "clip": 1.0}])
@pytest.mark.parametrize("strategy", ["fedavg", pytest.param("ditto", marks=pytest.mark.slow)])
def test_the_way_does_not_show(plan, sources, strategy, privacy):
    made_up = plan(strategy={"_target_": f"fedtailor.strategies.{strategy}"}, privacy=privacy)
    ends = {path: simulate(made_up, sources, path=path)[1] for path in ("block", "vmap", "loop")}
    for path in ("vmap", "loop"):
        for name, p in ends["block"].items():
            torch.testing.assert_close(p, ends[path][name], rtol=1e-5, atol=1e-6)


def test_a_sum_made_in_one_go_is_the_same_and_counts_every_sites_bytes(plan, sources, monkeypatch):
    apart, p = simulate(plan(), sources)
    monkeypatch.setattr(setting, "SMALL", 1)
    taken = []
    monkeypatch.setattr(setting, "Task", lambda *given: taken.append(Task(*given).together) or Task(*given))
    whole, q = simulate(plan(), sources)
    assert taken == [True]
    for name in p:
        torch.testing.assert_close(p[name], q[name], rtol=1e-5, atol=1e-6)
    assert all(whole.sites[site].bytes_sent == one.bytes_sent > 0 for site, one in apart.sites.items())
