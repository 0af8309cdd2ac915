"""Devices: which there are, what lies where, and that a round makes nothing on another device than that of its inputs."""

import subprocess
import sys

import pytest
import torch
from folk import CLIP, K, assert_close, made, reference, world
from strays import OTHER, elsewhere_by_default

from fedtailor import strategies, tree
from fedtailor.errors import ConfigError
from fedtailor.optimizers import SGD, adam
from fedtailor.recipe import Part, Recipe
from fedtailor.simulations import convolutions, hardware
from fedtailor.simulations.blocks import block_train
from fedtailor.simulations.engine import looped, simulate_round, vmapped
from fedtailor.simulations.feed import Feed
from fedtailor.simulations.hardware import HOST, across, device_of
from fedtailor.simulations.noise import seeded
from fedtailor.simulations.run import simulate

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def case(name, clip):
    """A recipe, its world with rows by number and, where it is clipped, seeds of noise, and the feed for these."""
    made_up, inputs = made(name)
    params, batches, live, counts = world(made_up, inputs, None)
    rows = torch.arange(batches["y"].numel()).view(batches["y"].shape)
    table = Part(batches.pop("x").flatten(0, 2), batches.pop("y").flatten())
    batches |= {"rows": rows} | ({} if clip is None else {"noise_seed": torch.arange(K)})
    return made_up, params, (batches, live, counts), Feed(table, None if clip is None else seeded(params, CLIP), params)


WAYS = [("block", name) for name in ("linear", "mlp", "conv1d", "conv2d", "text", "dropout", "wide", "lora", "encoder")]
WAYS += [("grouped", "conv2d"), ("vmap", "mlp")]
WAYS += [pytest.param(path, name, marks=pytest.mark.slow) for path, name in (("vmap", "lora"), ("loop", "text"))]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("clip", [None, CLIP], ids=["plain", "clipped"])
@pytest.mark.parametrize("path,name", WAYS)
def test_a_round_makes_nothing_elsewhere(path, name, clip, monkeypatch):
    if path == "grouped":
        monkeypatch.setattr(convolutions, "looped", lambda x: False)
    made_up, params, (batches, live, counts), feed = case(name, clip)
    strategy = strategies.scaffold(population=K) if name == "mlp" else strategies.fedavg()
    if path in ("block", "grouped"):
        optimizer = adam(weight_decay=0.1, decoupled=True) if name == "lora" else SGD
        many = block_train(made_up, strategy, 0.3, clip, feed=feed, together=name == "wide", optimizer=optimizer)
    else:
        one = {"vmap": vmapped, "loop": looped}[path](reference(made_up, strategy, clip))
        many = lambda cast, memory, batches, *rest: one(cast, memory, feed.all(batches), *rest)  # noqa: E731
    state, memory = strategy.init(params), tree.stack([strategy.remember(params)] * K)
    given = strategy, many, state, memory, batches, live, counts, 0, 3
    expected = simulate_round(*given)
    found = elsewhere_by_default(lambda: simulate_round(*given))
    assert_close(found, expected, 0.0)


def test_that_would_be_seen():
    """Also one that no result shows, and one that is made under vmap."""
    x = torch.ones(3)
    for fn in (lambda: x * len(torch.arange(2)), lambda: torch.func.vmap(lambda x: x + torch.zeros(()))(x)):
        with pytest.raises(AssertionError, match="on another device"):
            elsewhere_by_default(fn)


def test_across_brings_everything_there_and_back_but_the_seeds_of_noise():
    seen = {}

    def many(cast, memory, batches, live, counts):
        seen.update({"cast": cast["w"], "memory": memory["m"], "live": live, "counts": counts} | batches)
        return {"delta": cast["w"]}, {"m": torch.zeros(1)}

    ones = torch.ones(1)
    batches = {"rows": ones, "seed": ones, "noise_seed": ones, "noise": ones}
    summand, _ = across(many, OTHER, OTHER)({"w": ones}, {"m": ones}, batches, ones, ones)
    assert {name for name, x in seen.items() if x.device != OTHER} == {"noise_seed"} and len(seen) == 8
    assert summand["delta"].device == OTHER


def test_rows_are_packed_once_and_sites_see_views_of_them(plan, sources):
    from fedtailor.config import build
    from fedtailor.simulations.cohort import prepared, rows_of

    made_up = plan()
    data = prepared(made_up, build(made_up.recipe, Recipe), sources)
    rows, views = hardware.packed(data, HOST)
    assert torch.equal(rows.x, rows_of(data).x) and torch.equal(rows.y, rows_of(data).y)
    for site, one in views.items():
        assert torch.equal(one.train.x, data[site].train.x) and torch.equal(one.train.y, data[site].train.y)
        assert one.train.x.untyped_storage().data_ptr() == rows.x.untyped_storage().data_ptr()
        assert one.test is not None and one.fingerprint == data[site].fingerprint
    assert all(x.device == OTHER for one in hardware.packed(data, OTHER)[1].values() for x in (*one.train, *one.test))


def test_a_recipe_begins_alike_on_every_device():
    made_up, _ = made("mlp")
    there = hardware.recipe_on(made_up, OTHER)
    assert all(p.device == OTHER for p in there.model().parameters())
    assert hardware.recipe_on(made_up, HOST) is made_up


def test_states_stay_on_the_host_where_noise_is_drawn_or_answers_are_compared(plan):
    site = {"unit": "site", "epsilon": 8.0, "delta": 1e-4, "clip": 1.0, "noise_multiplier": 1.0}
    homes = [
        hardware.home_of(one, strategy, OTHER)
        for one in (plan(), plan(privacy=site))
        for strategy in (strategies.fedavg(), strategies.median())
    ]
    assert homes == [OTHER, HOST, HOST, HOST]


@pytest.mark.parametrize("cards", [0, 2])
def test_devices_by_name(cards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    assert device_of("cpu") == HOST
    assert device_of("auto") == torch.device("cuda:0" if cards else "cpu")
    there = "auto, cpu, cuda:0, cuda:1, cuda" if cards else "auto, cpu"
    for wrong in ("gpu", "cuda:2", "mps", "CPU", *(() if cards else ("cuda", "cuda:0"))):
        with pytest.raises(ConfigError, match=f"simulation.device: {wrong!r} is not here; there is {there}$"):
            device_of(wrong)
    if cards:
        assert (device_of("cuda"), device_of("cuda:1")) == (torch.device("cuda:0"), torch.device("cuda:1"))


def test_a_device_that_is_not_here_ends_a_simulation_before_it_begins(plan, sources):
    with pytest.raises(ConfigError, match="simulation.device: 'cuda:99'"):
        simulate(plan(), sources, device="cuda:99")


@GPU
@pytest.mark.parametrize("more", [{}, {"privacy": {"epsilon": 3.0, "delta": 1e-4, "clip": 1.0}}, {"buffer": {"answers": 2}, "quorum": 1},
                                  {"strategy": {"_target_": "fedtailor.strategies.median"}}])  # fmt: skip
@pytest.mark.parametrize("workers", [1, 2])
def test_a_gpu_gives_what_a_cpu_gives(plan, sources, more, workers):
    (a, p), (b, q) = (simulate(plan(**more), sources, device=device, workers=workers) for device in ("cpu", "cuda"))
    for name in p:
        torch.testing.assert_close(p[name], q[name], rtol=1e-4, atol=1e-5)
    assert {site: one.bytes_sent for site, one in a.sites.items()} == {
        site: one.bytes_sent for site, one in b.sites.items()
    }
    assert a.metrics["federated"]["accuracy"] == pytest.approx(b.metrics["federated"]["accuracy"], abs=0.02)


STEPS = """
import resource, sys
import torch
from fedtailor.simulations.hardware import keep_pages

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "kept":
    keep_pages()
x = torch.zeros(9 * 2**20)
for step in range(10):
    if step == 5:
        before = faults()
    y = x + 1
    (y.relu() * y).sum()
    del y
print(faults() - before)
"""


def test_what_a_step_makes_lies_where_the_one_before_had_it():
    """Outputs of 38 MB, which glibc maps and unmaps each time of its own accord."""
    runs = [
        subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, timeout=120)
        for how in ("kept", "as ever")
    ]
    kept, as_ever = (int(run.stdout) for run in runs)
    assert kept < as_ever / 10
