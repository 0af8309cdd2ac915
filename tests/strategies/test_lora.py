"""Aggregating adapters, by hand: what the mean of the clients' products is, and which strategy reaches it."""

import pytest
import torch
from pydantic import ValidationError

from fedtailor import tree
from fedtailor.errors import ConfigError
from fedtailor.strategies import fedavg, fedex_lora, fedexp, ffa_lora, flora, robust, scaffold, topk
from fedtailor.strategy import Local, standing

A, B, SHIFT = "x.lora_a.weight", "x.lora_b.weight", "x.lora_shift.weight"
ROWS = (1.0, 3.0, 6.0)


@pytest.fixture
def params():
    """One adapter of rank 2 from 4 to 3, at a B that is not zero, and a bias beside it."""
    rng = torch.Generator().manual_seed(0)
    shapes = {A: (2, 4), B: (3, 2), SHIFT: (3, 4), "bias": (3,)}
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


@pytest.fixture
def replies(params, around):
    """Where three clients of different sizes end; the shift is not theirs to move."""
    return [({**end, SHIFT: params[SHIFT]}, rows) for end, rows in around(params, 3, rows=ROWS)]


def effective(params):
    """What is added to the frozen weight."""
    return params.get(SHIFT, 0) + params[B] @ params[A]


def mean(values, rows=ROWS):
    return sum(r * x for x, r in zip(values, rows, strict=True)) / sum(rows)


def assert_equal(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=atol)


def test_the_mean_of_products_is_not_the_product_of_means(step, params, replies):
    """Plain averaging, which FedAvg does to adapters, is off by a lot."""
    strategy = fedavg()
    end = step(strategy, strategy.init(params), replies)["params"]
    exact = params[SHIFT] + mean([one[B] @ one[A] for one, _ in replies])
    assert (effective(end) - exact).abs().max() > 0.1
    assert_equal(end[A], mean([one[A] for one, _ in replies]))


@pytest.mark.parametrize("weighting", ["examples", "equal"])
@pytest.mark.parametrize("make", [fedex_lora, flora])
def test_exact_strategies_reach_the_mean_of_products(step, params, replies, make, weighting):
    strategy, rows = make(weighting=weighting), ROWS if weighting == "examples" else (1.0, 1.0, 1.0)
    end = step(strategy, strategy.init(params), replies)["params"]
    assert_equal(effective(end), params[SHIFT] + mean([one[B] @ one[A] for one, _ in replies], rows))
    assert_equal(end["bias"], mean([one["bias"] for one, _ in replies], rows))


def test_fedex_averages_the_halves_and_shifts_by_the_rest(step, params, replies):
    strategy = fedex_lora()
    state = strategy.init(params)
    for round in range(2):  # the second round starts where the first ended, with a shift
        before, state = state["params"], step(strategy, state, replies, round)
        end, means = state["params"], {k: mean([one[k] for one, _ in replies]) for k in (A, B)}
        assert_equal(end[A], means[A])
        assert_equal(end[B], means[B])
        rest = mean([one[B] @ one[A] for one, _ in replies]) - means[B] @ means[A]
        assert_equal(end[SHIFT], before[SHIFT] + rest)


def test_flora_starts_new_adapters_that_add_nothing(step, params, replies):
    ends = [
        step(flora(seed=s), flora().init(params), replies, r)["params"] for s, r in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert not ends[0][B].any() and torch.equal(ends[0][A], ends[1][A])
    assert not torch.equal(ends[0][A], ends[2][A]) and not torch.equal(ends[0][A], ends[3][A])
    assert 0.25 < ends[0][A].abs().max() <= 0.5  # uniform within 1 / sqrt(4)
    assert_equal(ends[0][SHIFT], effective(ends[2]))


def test_two_floras_rounds_add_up(step, params, replies):
    strategy = flora()
    first = step(strategy, strategy.init(params), replies)
    trained = [({**first["params"], B: one[B], A: one[A]}, rows) for one, rows in replies]
    second = step(strategy, first, trained, 1)["params"]
    assert_equal(effective(second), first["params"][SHIFT] + mean([one[B] @ one[A] for one, _ in replies]))


def test_what_exact_strategies_send_is_no_larger_than_the_adapter(params):
    for strategy in (fedex_lora(), flora()):
        sent = tree.flatten(standing(strategy, params))
        assert sent.keys() == {f"delta/{A}", f"delta/{B}", "delta/bias", "weight"}
        assert not strategy.reduce.is_sum


def test_the_coordinators_memory_does_not_grow_with_the_replies(params, replies):
    strategy, acc = fedex_lora(), None
    seen = []
    for end, rows in [*replies, *replies]:
        local = Local(strategy.broadcast({"params": params}), {}, end, torch.tensor(rows), torch.tensor(1.0), 0.1)
        acc = strategy.reduce.add(acc, tree.at(strategy.report(local)[0], None))
        seen.append({path: (x.data_ptr(), x.shape) for path, x in tree.flatten(acc).items()})
    assert all(each == seen[0] for each in seen) and acc["products"]["x."].dtype == torch.double


def test_a_small_weight_does_not_make_a_large_product(params):
    """Else a liar would go far with an answer of any length: what a site sends is bounded in norm, and 1 / weight is not."""
    strategy = fedex_lora()
    lie = {"delta": tree.map(torch.ones_like, {k: params[k] for k in (A, B, "bias")}), "weight": torch.tensor(1e-20)}
    acc = strategy.reduce.add(None, tree.at(lie, None))
    assert_equal(acc["products"]["x."].float(), torch.full((3, 4), 2.0))


def test_an_adapter_without_a_shift_cannot_be_exact(params):
    del params[SHIFT]
    for strategy in (fedex_lora(), flora()):
        with pytest.raises(ConfigError, match="x.lora_a.weight.*recipe.exact=true"):
            strategy.init(params)
    ffa_lora().init(params)


@pytest.mark.parametrize("of", [fedavg(), scaffold(population=3), fedexp()])
def test_ffa_freezes_the_first_half_and_is_then_exact(step, params, replies, of):
    strategy = ffa_lora(of)
    still = [({**end, A: params[A]}, rows) for end, rows in replies]
    state, other = strategy.init(params), of.init({k: v for k, v in params.items() if k != A})
    for round in range(2):
        state = step(strategy, state, still, round)
        other = step(of, other, [({k: v for k, v in end.items() if k != A}, rows) for end, rows in replies], round)
        cast = strategy.broadcast(state)
        for model in cast.values():
            if A in model:
                assert torch.equal(model[A], params[A])
        for name in (B, "bias"):
            assert_equal(cast["params"][name], other["params"][name])
    assert A in cast["params"] and (A in cast["model"] if "model" in cast else True)
    summand = standing(strategy, params)
    assert not any(A in path for path in tree.flatten(summand) | tree.flatten(strategy.remember(params)))
    assert any(B in path for path in tree.flatten(summand))
    assert not strategy.trains(A) and strategy.trains(B) and not strategy.trains(SHIFT)


def test_ffas_mean_update_is_the_mean_of_products(step, params, replies):
    strategy = ffa_lora()
    still = [({**end, A: params[A]}, rows) for end, rows in replies]
    end = strategy.broadcast(step(strategy, strategy.init(params), still))["params"]
    assert_equal(effective(end), params[SHIFT] + mean([one[B] @ one[A] for one, _ in still]))


def test_ffa_in_ffa_is_refused():
    with pytest.raises(ValueError, match="already"):
        ffa_lora(topk(ffa_lora()))


def test_a_robust_rule_goes_round_an_exact_strategy(step, params, replies):
    """Products are made of what the rule passes on; of one reply there is no rest."""
    strategy = robust(fedex_lora(), attackers=1)
    lie = ({k: v + 1e4 if k != SHIFT else v for k, v in params.items()}, 1.0)
    end = step(strategy, strategy.init(params), [*replies, *replies, lie])["params"]
    assert torch.equal(end[SHIFT], params[SHIFT]) and (end[A] - params[A]).norm() < 10


RANKS = [[0, 1], [100, 2]]


def reported(rows):
    strategy = flora(ranks=RANKS)
    NONE = {"w": torch.zeros(2)}
    local = Local({"params": NONE}, strategy.remember(NONE), NONE, torch.tensor(rows), torch.tensor(1.0), 0.1)
    return strategy.report(local)[1]


def test_a_client_trains_the_rank_of_its_size_from_its_second_round_on(params):
    strategy = flora(ranks=RANKS)
    grads = tree.map(torch.ones_like, {k: v for k, v in params.items() if k != SHIFT})
    for memory, rank in ((strategy.remember(params), 1), (reported(99.0), 1), (reported(100.0), 2)):
        got = strategy.correct(grads, params, {"params": params}, memory)
        assert got[A].sum(1).tolist() == [4.0, 4.0 * (rank == 2)] and got["bias"].tolist() == [1, 1, 1]
        assert got[B].sum(0).tolist() == [3.0, 3.0 * (rank == 2)]


@pytest.mark.parametrize("ranks", [[], [[1, 2]], [[0, 2], [0, 4]], [[0, 2], [9, 4], [5, 1]], [[0, 0]]])
def test_ranks_must_cover_every_client(ranks):
    with pytest.raises(ValidationError, match="ranks"):
        flora(ranks=ranks)
