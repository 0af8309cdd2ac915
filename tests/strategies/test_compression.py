"""Compression: what is sent, what is kept for later, and chance that is right in the mean and the same everywhere."""

import math
from functools import partial

import pytest
import torch

from fedtailor import recipe as recipes
from fedtailor import seeds, tree
from fedtailor.batches import choices
from fedtailor.client.work import perform
from fedtailor.config import build, load
from fedtailor.leaving import agreed
from fedtailor.privacy import private
from fedtailor.recipe import Recipe
from fedtailor.simulations.run import simulate
from fedtailor.strategies import fedavg, feddyn, fedprox, krum, norm_bound, quantise, robust, scaffold, sign, topk
from fedtailor.strategy import Local, Strategy
from fedtailor.wire import Visit

NONE = {"w": torch.zeros(3), "b": torch.zeros(())}


def told(strategy, memory, w, b, seed=0):
    """What a client that moved by ``w`` and ``b`` sends, and what it keeps."""
    params = {"w": torch.tensor(w), "b": torch.tensor(b)}
    one = torch.tensor(1.0)
    summand, memory = strategy.report(Local({"params": NONE}, memory, params, one, one, 0.1, torch.tensor(seed)))
    return [*summand["delta"]["w"].tolist(), summand["delta"]["b"].item()], memory


def test_topk_sends_the_largest_of_all_tensors_together():
    strategy = topk(fraction=0.5)
    sent, memory = told(strategy, strategy.remember(NONE), [1.0, -5.0, 0.5], 2.0)
    assert sent == [0, -5, 0, 2]
    assert memory["error"]["delta"]["w"].tolist() == [1, 0, 0.5]


def test_what_was_not_sent_is_sent_later():
    strategy = topk(fraction=0.25)
    memory, total = strategy.remember(NONE), torch.zeros(4)
    for _ in range(8):
        sent, memory = told(strategy, memory, [1.0, 3.0, 0.5], 2.0)
        assert sum(x != 0 for x in sent) == 1
        total += torch.tensor(sent)
    left = torch.tensor([*memory["error"]["delta"]["w"], memory["error"]["delta"]["b"]])
    torch.testing.assert_close(total + left, 8 * torch.tensor([1.0, 3.0, 0.5, 2.0]))
    assert (total > 0).all()


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.26, 2), (1.0, 4), (0.5, 2)])
def test_a_fraction_is_rounded_up(fraction, count):
    strategy = topk(fraction=fraction)
    sent, _ = told(strategy, strategy.remember(NONE), [1.0, 3.0, 0.5], 2.0)
    assert sum(x != 0 for x in sent) == count


def test_signs_have_each_tensors_mean_size():
    sent, memory = told(sign(), sign().remember(NONE), [1.0, -3.0, 0.5], -2.0)
    assert sent == pytest.approx([1.5, -1.5, 1.5, -2])
    assert memory["error"]["delta"]["w"].tolist() == pytest.approx([-0.5, -1.5, -1])


def test_quantised_values_lie_on_the_two_nearest_levels():
    strategy = quantise(bits=3)  # three levels above zero
    for seed in range(20):
        sent, _ = told(strategy, strategy.remember(NONE), [6.0, -3.0, 0.1], 0.0, seed)
        assert sent[0] == pytest.approx(6)  # the greatest is exact
        assert sent[1] == pytest.approx(-2) or sent[1] == pytest.approx(-4)
        assert sent[2] == 0 or sent[2] == pytest.approx(2)
        assert sent[3] == 0


def test_quantised_values_are_right_in_the_mean():
    strategy, count = quantise(bits=3), 4000
    sents = torch.tensor(
        [told(strategy, strategy.remember(NONE), [6.0, -3.0, 0.5], 1.0, 97 * k)[0] for k in range(count)]
    )
    error = sents.mean(0) - torch.tensor([6.0, -3.0, 0.5, 1.0])
    assert (error.abs() < 5 * 1.0 / count**0.5).all()  # a level is 2 apart: the deviation of one draw is at most 1


def test_each_coordinate_and_each_client_has_its_own_chance():
    draws = torch.stack([seeds.uniform(torch.tensor(k), 1000) for k in (0, 1, 2**62)])
    centred = draws - 0.5
    assert (centred @ centred.T / 1000 * 12 - torch.eye(3)).abs().max() < 0.15
    assert (centred[:, 1:] * centred[:, :-1]).mean().abs() * 12 < 0.1


def test_each_tensor_has_its_own_chance():
    strategy, one = quantise(bits=3), torch.tensor(1.0)
    zero = {name: torch.zeros(200) for name in "ab"}
    same = {name: torch.linspace(-1, 1, 200) for name in "ab"}
    local = Local({"params": zero}, strategy.remember(zero), same, one, one, 0.1, torch.tensor(5))
    delta = strategy.report(local)[0]["delta"]
    assert not torch.equal(delta["a"], delta["b"])


def test_each_site_and_round_has_its_own_number():
    plan = load(["study=heart"]).plan
    numbers = {int(choices(plan, round, site)[0]) for round in range(3) for site in ("va", "cleveland")}
    assert len(numbers) == 6
    assert choices(plan, 0, "va").shape == (plan.local.steps,)


def test_chance_is_splitmix64():
    """The published first outputs for the seed 0, their upper 24 bits."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert (seeds.uniform(torch.tensor(0), 3) * 2**24).long().tolist() == [x >> 40 for x in expected]


def test_chance_without_a_seed_is_refused():
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="no seed"):
        quantise().report(Local({"params": NONE}, quantise().remember(NONE), NONE, one, one, 0.1))


@pytest.mark.parametrize("of", [fedavg(), scaffold(population=3), feddyn()])
def test_the_memory_of_the_strategy_inside_is_kept_apart(of):
    strategy = topk(of, fraction=0.25)
    memory = strategy.remember(NONE)
    cast = of.broadcast(of.init(NONE))
    ends, rows = {"w": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor(4.0)}, torch.tensor(2.0)
    _, kept = strategy.report(Local(cast, memory, ends, rows, rows, 0.1))
    _, alone = of.report(Local(cast, of.remember(NONE), ends, rows, rows, 0.1))
    torch.testing.assert_close(kept["of"], alone)
    corrected = strategy.correct(NONE, ends, cast, kept)
    torch.testing.assert_close(corrected, of.correct(NONE, ends, cast, alone))


def test_what_shrinks_is_packed_also_inside_others_and_nothing_else_is():
    assert all(make().packed for make in (topk, quantise, sign))
    for outside in (partial(fedprox, 0.1), robust, krum, norm_bound, topk):
        assert outside(of=sign(scaffold(population=3))).packed
    assert private(sign(), clip=1.0, noise_multiplier=1.0, cohort=3).packed
    assert not any(one.packed for one in (fedavg(), scaffold(population=3), feddyn(), fedprox(0.1), robust(), krum()))


def test_a_proposal_says_that_answers_are_packed_and_their_bound_stays():
    leaves = {name: agreed(load(["study=heart", f"strategy={name}"]).plan.canonical()) for name in ("fedavg", "topk")}
    assert leaves["topk"].packed and not leaves["fedavg"].packed
    assert leaves["topk"] == leaves["fedavg"].model_copy(update={"packed": True})


def test_a_coordinate_rounded_to_nothing_has_no_sign():
    """Minus zero would be one value more, and a bit more of each coordinate."""
    strategy = quantise(bits=2)
    for seed in range(20):
        sent, _ = told(strategy, strategy.remember(NONE), [6.0, -0.1, -0.1], -0.0, seed)
        assert all(math.copysign(1, x) == 1 for x in sent if x == 0)


def test_a_memory_from_a_file_has_no_empty_branch():
    strategy = sign()
    memory = {"error": strategy.remember(NONE)["error"]}
    assert told(strategy, memory, [1.0, 1.0, 1.0], 1.0)[0] == [1, 1, 1, 1]


def test_a_weight_passes_as_it_is():
    strategy, rows = sign(), torch.tensor(7.0)
    summand, _ = strategy.report(Local({"params": NONE}, strategy.remember(NONE), NONE, rows, rows, 0.1))
    assert summand["weight"] == 7


def test_a_site_and_the_simulator_round_alike():
    """Chance is keyed by seed, round and site: what a site would send is what the simulator sums."""
    overrides = ["study=heart", "privacy=none", "strategy=quantise", "strategy.bits=2", "rounds=1", "sites=[va]"]
    plan, simulation = load([*overrides, "quorum=1", "evaluation.baseline=false"])
    sources = build(simulation.data, dict)
    _, simulated = simulate(plan, sources)
    recipe, strategy = build(plan.recipe, Recipe), build(plan.strategy, Strategy)
    state = strategy.init(recipes.initial(recipe, plan.seed))
    visit = Visit(
        run="r", round=0, train=True, evaluate=False, baseline=False, plan=plan.canonical(), cast_sha256="0" * 64
    )
    site = recipe.prepare(sources["va"].table())
    work = perform(visit, strategy.broadcast(state), site, {}, site="va", key=None)
    delta = torch.cat([x.reshape(-1) for x in tree.leaves(work.summand["delta"])])
    assert len(delta.unique()) <= 1 + 2 * len(work.summand["delta"])  # two bits: minus, nothing, plus, by tensor
    deployed = strategy.apply(state, strategy.reduce.add(None, tree.at(work.summand, None)), 0)["params"]
    torch.testing.assert_close(deployed, simulated)
