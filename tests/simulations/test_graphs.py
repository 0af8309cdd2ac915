"""Recordings of a block's work: they give what the work itself gives, whatever is in their buffers, or are not made."""

import itertools

import pytest
import torch
from folk import CLIP, K, assert_close, made, started, world
from recorded import capture

from fedtailor import strategies, tree
from fedtailor.recipe import Part
from fedtailor.simulations import convolutions, gradients, graphs
from fedtailor.simulations.blocks import block_train
from fedtailor.simulations.feed import Feed
from fedtailor.simulations.graphs import plainly, replayed, replaying
from fedtailor.simulations.noise import seeded
from fedtailor.simulations.run import simulate


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(convolutions, "looped", lambda x: False)
    monkeypatch.setattr(gradients, "waits", lambda x: False)


class Counted:
    """The stand-in, and how often it recorded and was replayed."""

    def __init__(self):
        self.made, self.replays = 0, 0

    def __call__(self, run):
        again, results = capture(run)
        self.made += 1

        def counted():
            self.replays += 1
            again()

        return counted, results


def recording(counted, failed=lambda why: pytest.fail(why)):
    return lambda make: replayed(make, counted, failed)


def rounds(name, clip, strategy, many=4):
    """Inputs of equal shapes and other contents: of other clients, from other parameters."""
    recipe, inputs = made(name)
    found = []
    for seed in range(many):
        params, batches, live, counts = world(recipe, inputs, clip, strategy, seed)
        batches["seed"] = batches["seed"] + 100 * seed
        cast, memory = started(strategy, params)
        found.append(
            (cast, tree.map(lambda x, k=seed: x * (k + 1), memory), batches, live.roll(seed, 0), counts + seed)
        )
    return recipe, found


FED = strategies.fedavg()
CASES = [("mlp", FED, None), ("conv2d", FED, CLIP), ("dropout", FED, None)]
OTHERS = [(name, FED, clip) for name in ("linear", "mlp", "text", "twice") for clip in (None, CLIP)]
OTHERS += [("conv2d", FED, None), ("mlp", strategies.scaffold(population=K), CLIP), ("mlp", strategies.qfedavg(), None),
           ("mlp", strategies.ditto(strategies.fedprox(mu=0.5)), None)]  # fmt: skip


@pytest.mark.parametrize("name,strategy,clip", CASES + [pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS])
def test_a_replay_depends_on_its_buffers_alone(name, strategy, clip):
    """Bit for bit what is computed plainly, in every round, and the results of a round stay when the next is replayed."""
    recipe, given = rounds(name, clip, strategy)
    counted = Counted()
    plain, replays = (block_train(recipe, strategy, 0.3, clip, replay=how) for how in (plainly, recording(counted)))
    expected, found = ([many(*one) for one in given] for many in (plain, replays))
    assert (counted.made, counted.replays) == (1, 3), "the first is done plainly, the others are replayed"
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 0.0)
    assert not torch.equal(*(next(iter(tree.leaves(one[0]))) for one in found[2:]))


@pytest.mark.parametrize("name", ["wide", pytest.param("wide twice", marks=pytest.mark.slow)])
def test_weights_that_are_never_made_are_not_in_a_recording_either(name):
    recipe, given = rounds(name, None, FED)
    counted = Counted()
    plain, replays = (block_train(recipe, FED, 0.3, together=True, replay=how) for how in (plainly, recording(counted)))
    for one in given:
        assert_close(replays(*one), plain(*one), 0.0)
    assert counted.replays == 3


def test_rows_by_number_are_read_anew():
    recipe, given = rounds("mlp", None, FED)
    table = Part(given[0][2]["x"].flatten(0, 2), given[0][2]["y"].flatten())
    counted = Counted()
    many = [block_train(recipe, FED, 0.3, feed=Feed(table), replay=how) for how in (plainly, recording(counted))]
    for seed, (cast, memory, batches, *rest) in enumerate(given):
        shape, rng = batches["y"].shape, torch.Generator().manual_seed(seed)
        rows = torch.randint(len(table.y), shape, generator=rng)
        fed = {n: x for n, x in batches.items() if n not in ("x", "y")} | {"rows": rows}
        plain, found = (each(cast, memory, fed, *rest) for each in many)
        assert_close(found, plain, 0.0)
    assert counted.replays == 3


def test_noise_differs_from_step_to_step_and_from_replay_to_replay():
    """It is in the buffers; the gradients here are next to nothing."""
    recipe, given = rounds("linear", CLIP, FED)
    counted = Counted()
    many = block_train(recipe, FED, 1.0, 1e-9, replay=recording(counted))
    cast, memory, batches, live, counts = given[0]
    batches |= {"live": torch.ones_like(batches["live"]), "scale": torch.ones_like(batches["scale"])}
    moved = []
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        noise = tree.map(lambda x, rng=rng: torch.randn(x.shape, generator=rng, dtype=x.dtype), batches["noise"])
        delta = many(cast, memory, batches | {"noise": noise}, torch.ones_like(live), torch.ones_like(counts))[0]
        moved.append(delta["delta"]["weight"])
        torch.testing.assert_close(moved[-1], -noise["weight"].sum(1), rtol=0, atol=1e-6)
    assert counted.replays == 2 and not torch.equal(moved[1], moved[2])


def test_noise_that_the_host_draws_is_not_recorded():
    recipe, given = rounds("mlp", CLIP, FED)
    counted = Counted()
    like = given[0][0]["params"]
    feed = Feed(noise=seeded(like, CLIP), like=like)
    plain, replays = (
        block_train(recipe, FED, 0.3, CLIP, feed=feed, replay=how) for how in (plainly, recording(counted))
    )
    for n, (cast, memory, batches, *rest) in enumerate(given):
        fed = {name: x for name, x in batches.items() if name != "noise"} | {"noise_seed": torch.arange(K) + n}
        assert_close(replays(cast, memory, fed, *rest), plain(cast, memory, fed, *rest), 0.0)
    assert counted.made == 0


def test_what_python_remembers_would_be_seen():
    """The stand-in bakes a step's number in, as a graph does."""
    count = itertools.count()
    step = replayed(lambda looks: lambda cast, *rest: {"x": cast["x"] + next(count)}, Counted(), pytest.fail)
    given = {"x": torch.zeros(1)}, {}, {}, torch.ones(1), torch.ones(1)
    assert [float(step(*given)["x"]) for _ in range(4)] == [0.0, 3.0, 3.0, 3.0]


def test_an_odd_length_in_a_replay_is_looked_at_again():
    recipe, given = rounds("mlp", CLIP, FED)
    counted = Counted()
    plain, replays = (block_train(recipe, FED, 0.3, CLIP, replay=how) for how in (plainly, recording(counted)))
    for one in given:
        one[2]["live"][:] = 1.0
    given[2][2]["x"][1, 0, 2] = float("nan")
    for one in given:
        found = replays(*one)
        assert_close(found, plain(*one), 0.0)
        assert all(bool(x.isfinite().all()) for x in tree.leaves(found[0]))
    assert (counted.made, counted.replays) == (1, 3)


def sized(n, value=1.0):
    return {"x": torch.full((n,), value)}, {}, {}, torch.ones(1), torch.ones(1)


def test_each_shape_has_its_recording_and_those_not_used_for_longest_go(monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    counted = Counted()
    step = replayed(lambda looks: lambda cast, *rest: {"x": cast["x"] * 2}, counted, pytest.fail)
    made_up = []
    for n in (1, 1, 2, 2, 1, 3, 3, 1, 2):  # 2 goes when 3 comes, and is recorded again
        assert torch.equal(step(*sized(n, n))["x"], torch.full((n,), 2.0 * n))
        made_up.append(counted.made)
    assert made_up == [0, 1, 1, 2, 2, 2, 3, 3, 4]


def test_where_recording_fails_it_is_said_once_and_all_is_done_plainly():
    said, tried = [], []

    def broken(run):
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    step = replayed(lambda looks: lambda cast, *rest: {"x": cast["x"] * 2}, broken, said.append)
    for n in (1, 1, 1, 2, 2):
        assert torch.equal(step(*sized(n))["x"], torch.full((n,), 2.0))
    assert (
        said == ["no CUDA graph could be recorded: operation not permitted when stream is capturing"]
        and len(tried) == 1
    )


def test_want_of_memory_is_an_error_as_ever():
    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    step = replayed(lambda looks: lambda cast, *rest: {}, full, pytest.fail)
    step(*sized(1))
    with pytest.raises(torch.OutOfMemoryError):
        step(*sized(1))


def test_recordings_share_no_memory():
    """A room that a later shape gives up would still be written to by an earlier one's replays."""
    made_up = []

    def make(looks):
        rooms = {}
        made_up.append(rooms)
        return lambda cast, *rest: {"x": cast["x"] + len(made_up)}

    step = replayed(make, Counted(), pytest.fail)
    for n in (1, 1, 2, 2):
        step(*sized(n))
    assert len(made_up) == 3
    recipe, given = rounds("wide", None, FED, many=2)
    made_up = []
    block_train(recipe, FED, 0.3, replay=lambda make: made_up.extend(make(False) for _ in range(2)) or made_up[0])
    assert made_up[0].args[0] is not made_up[1].args[0], "a block's rooms"
    many = block_train(recipe, FED, 0.3, together=True, replay=recording(Counted()))
    small = [
        tuple([cast, memory, tree.map(lambda x: x[:, :, :2] if x.dim() > 2 else x, fed), *rest])
        for cast, memory, fed, *rest in given
    ]
    plain = block_train(recipe, FED, 0.3, together=True)
    for one in (*given, *small, *given):
        assert_close(many(*one), plain(*one), 0.0)


def test_a_cpu_has_none(plan, sources):
    assert replaying(torch.device("cpu"), pytest.fail) is plainly
    assert replaying(torch.device("cuda"), pytest.fail) is not plainly
    ends = [simulate(plan(), sources, steps=steps)[1] for steps in ("plain", "graphs")]
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("privacy", [None, {"epsilon": 3.0, "delta": 1e-4, "clip": 1.0}])
def test_a_gpus_graphs_give_what_it_gives_without(plan, sources, privacy):
    said = []
    runs = [
        simulate(plan(rounds=6, privacy=privacy), sources, device="cuda", steps=steps, on_event=said.append)[1]
        for steps in ("plain", "graphs")
    ]
    for name, p in runs[0].items():
        torch.testing.assert_close(p, runs[1][name], rtol=1e-5, atol=1e-6)
    assert not [event for event in said if event["kind"] == "steps"]
