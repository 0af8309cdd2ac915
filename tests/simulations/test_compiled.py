"""Blocks by torch's compiler: what the steps themselves give but for rounding, or the steps themselves, and it is said why."""

import os

import pytest
import torch
from folk import CLIP, K, assert_close, made, started, world

from fedtailor import strategies, tree
from fedtailor.config import load
from fedtailor.errors import ConfigError
from fedtailor.result import model_bytes
from fedtailor.simulations import compiled
from fedtailor.simulations.blocks import block_train
from fedtailor.simulations.compiled import replay_of
from fedtailor.simulations.feed import Feed
from fedtailor.simulations.graphs import KEPT, plainly
from fedtailor.simulations.noise import seeded
from fedtailor.simulations.run import simulate

CPU, FED = torch.device("cpu"), strategies.fedavg()


def by_compiler(feed=Feed(), failed=lambda why: pytest.fail(why)):  # noqa: B008
    return lambda make: compiled.compiled(make, feed, failed)


def counting(monkeypatch):
    """Every compilation's shapes, without a compiler."""
    made_up = []

    def plain(step, given):
        made_up.append(compiled.shapes(given))
        return step, step(*given)

    monkeypatch.setattr(compiled, "_compiled", plain)
    return made_up


@pytest.mark.slow
@pytest.mark.parametrize("name,strategy,clip", [
    ("mlp", FED, CLIP), ("mlp", FED, None), ("conv2d", FED, CLIP), ("text", FED, CLIP),
    ("twice", FED, CLIP), ("wide", FED, None), ("mlp", strategies.scaffold(population=K), CLIP),
    ("mlp", strategies.qfedavg(), None), ("mlp", strategies.ditto(strategies.fedprox(mu=0.5)), None),
])  # fmt: skip
def test_what_is_compiled_gives_what_the_steps_give(name, strategy, clip):
    recipe, inputs = made(name)
    plain, found = (
        block_train(recipe, strategy, 0.3, clip, together=name == "wide", replay=how)
        for how in (plainly, by_compiler())
    )
    for seed in range(3):
        params, batches, live, counts = world(recipe, inputs, clip, strategy, seed)
        given = *started(strategy, params), batches, live.roll(seed, 0), counts + seed
        assert_close(found(*given), plain(*given), 1e-5)


@pytest.mark.slow
def test_what_the_compiler_cannot_do_is_done_plainly():
    """Dropout's choices are arithmetic that wraps, which torch 2.13's compiler bounds and refuses."""
    recipe, inputs = made("dropout")
    said = []
    plain, found = (block_train(recipe, FED, 0.3, replay=how) for how in (plainly, by_compiler(failed=said.append)))
    params, batches, live, counts = world(recipe, inputs, None, FED, 0)
    given = *started(FED, params), batches, live, counts
    assert_close(found(*given), plain(*given), 0.0)
    assert len(said) == 1 and said[0].startswith("its steps could not be compiled: ")


@pytest.mark.slow
def test_a_run_repeats_and_is_the_plain_one_but_for_rounding(plan, sources, tmp_path):
    privacy = {"epsilon": 3.0, "delta": 1e-4, "clip": 1.0}
    plain = simulate(plan(rounds=4, privacy=privacy), sources)[1]
    once, again = (simulate(plan(rounds=4, privacy=privacy), sources, steps="compiled")[1] for _ in range(2))
    assert model_bytes(once) == model_bytes(again) != model_bytes(plain)
    for name, p in plain.items():
        torch.testing.assert_close(once[name], p, rtol=1e-4, atol=1e-5)
    assert os.environ[compiled.FOLDER] and not list(tmp_path.rglob("*.pkl"))


def test_noise_that_the_host_draws_is_drawn_beforehand(monkeypatch):
    made_up = counting(monkeypatch)
    recipe, inputs = made("mlp")
    params, batches, live, counts = world(recipe, inputs, CLIP, FED, 0)
    cast, memory = started(FED, params)
    feed = Feed(noise=seeded(cast["params"], CLIP), like=cast["params"])
    plain, found = (block_train(recipe, FED, 0.3, CLIP, feed=feed, replay=how) for how in (plainly, by_compiler(feed)))
    for n in range(3):
        fed = {name: x for name, x in batches.items() if name != "noise"} | {"noise_seed": torch.arange(K) + n}
        assert_close(found(cast, memory, fed, live, counts), plain(cast, memory, fed, live, counts), 0.0)
    assert len(made_up) == 1
    monkeypatch.setattr(compiled, "MOST", 1)  # more would be held than there is room for
    assert_close(found(cast, memory, fed, live, counts), plain(cast, memory, fed, live, counts), 0.0)
    assert len(made_up) == 1


def sized(n):
    return {"x": torch.full((n,), 1.0 * n)}, {}, {}, torch.ones(1), torch.ones(1)


def test_each_shape_is_compiled_when_it_comes_and_those_not_used_for_longest_go(monkeypatch):
    """At once, and not the second time: a run that is resumed would else round its first block differently."""
    made_up = counting(monkeypatch)
    step = compiled.compiled(lambda looks: lambda cast, *rest: {"x": cast["x"] * 2}, Feed(), pytest.fail)
    for n in (1, 1, 2, 1):
        assert torch.equal(step(*sized(n))["x"], torch.full((n,), 2.0 * n))
    assert len(made_up) == 2
    for n in (*range(1, KEPT + 2), 2, 1):  # 2 has not been used for longest when the last comes
        step(*sized(n))
    assert len(made_up) == KEPT + 2


def test_where_compiling_fails_it_is_said_once_and_all_is_done_plainly(monkeypatch):
    said, tried = [], []

    def broken(step, given):
        tried.append(1)
        raise RuntimeError("no rule for this\nmore")

    monkeypatch.setattr(compiled, "_compiled", broken)
    step = compiled.compiled(lambda looks: lambda cast, *rest: {"x": cast["x"] * 2}, Feed(), said.append)
    for n in (1, 1, 2):
        assert torch.equal(step(*sized(n))["x"], torch.full((n,), 2.0 * n))
    assert said == ["its steps could not be compiled: RuntimeError: no rule for this"] and len(tried) == 1
    monkeypatch.setattr(compiled, "_compiled", lambda *_: (_ for _ in ()).throw(MemoryError()))
    step = compiled.compiled(lambda looks: lambda cast, *rest: {}, Feed(), said.append)
    with pytest.raises(MemoryError):
        step(*sized(1))


def test_a_step_that_looks_at_its_numbers_is_not_compiled_for_those_alone():
    """Written down, the branch that these numbers take would be everybody's."""
    said = []

    def looking(cast, *rest):
        return {"summand": {"x": cast["x"] * (2 if float(cast["x"].sum()) > 3 else 5)}, "memory": {}}

    step = compiled.compiled(lambda looks: looking, Feed(), said.append)
    assert [step(*sized(n))["summand"]["x"].tolist() for n in (2, 1)] == [[4.0, 4.0], [5.0]]
    assert len(said) == 1 and "could not be compiled" in said[0]


def test_what_cannot_be_compiled_here_is_refused(monkeypatch, plan, sources):
    feed = Feed()
    assert replay_of("plain", CPU, feed, pytest.fail) is plainly
    with pytest.raises(ConfigError, match=r"simulation.steps: compiled, which is for the CPU; on cuda use graphs"):
        replay_of("compiled", torch.device("cuda"), feed, pytest.fail)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler 'no-such-compiler'; install it, or use plain"):
        simulate(plan(), sources, steps="compiled")
    with pytest.raises(ConfigError, match="steps: Input should be 'plain', 'compiled' or 'graphs'"):
        load(["study=heart", "simulation.steps=fast"])


def test_what_the_compiler_makes_lies_in_a_folder_of_this_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compiled.FOLDER, raising=False)
    replay_of("compiled", CPU, Feed(), pytest.fail)
    folder = tmp_path / "fedtailor" / "inductor"
    assert os.environ[compiled.FOLDER] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv(compiled.FOLDER, str(tmp_path / "mine"))
    replay_of("compiled", CPU, Feed(), pytest.fail)
    assert os.environ[compiled.FOLDER] == str(tmp_path / "mine")


def test_drawn_noise_stands_for_its_seeds():
    like = {"w": torch.zeros(3), "b": torch.zeros(2)}
    feed = Feed(noise=seeded(like, 1.0), like=like)
    batches = {"noise_seed": torch.arange(4), "live": torch.ones(4, 2, 1), "scale": torch.ones(4, 2)}
    drawn = feed.drawn(batches)
    assert drawn["drawn"].shape == (4, 2, 5) and "noise_seed" not in drawn and feed.drawn(drawn) is drawn
    whole = feed.all(batches)["noise"]
    assert torch.equal(drawn["drawn"], torch.cat([tree.flatten(whole)[name] for name in ("w", "b")], 2))
