"""Models of the sites' own, by hand: what is shared is averaged, what is a site's stays there and serves it."""

import pytest
import torch
from pydantic import ValidationError

from fedtailor import strategies, tree
from fedtailor.errors import ConfigError
from fedtailor.strategies import ditto, fedavg, fedbn, fedper, fedprox, robust, scaffold, topk
from fedtailor.strategy import standing
from fedtailor.training import clipped, local_train, plain, together

START = {"body": torch.tensor(1.0), "head": torch.tensor(0.0)}
TARGETS = (3.0, -1.0)  # what body + head should be at each of two sites


def losses(params, x, y):
    return 0.5 * (params["body"] * x + params["head"] - y).square()


def batches(target, steps=1):
    """One example: x = 1, y = target."""
    one = torch.ones(steps, 1)
    return {"x": one, "y": target * one, "live": one, "scale": torch.ones(steps), "seed": torch.zeros(steps).long()}


def play(strategy, rounds, lr=0.1, steps=1):
    """Each round's state and memories, after two sites of one example each have replied."""
    train = local_train(plain(losses), strategy, lr, losses)
    state, memories = strategy.init(START), [strategy.remember(START)] * 2
    for round in range(rounds):
        cast, acc = strategy.broadcast(state), None
        for k, target in enumerate(TARGETS):
            out = train(cast, memories[k], batches(target, steps), torch.ones(steps), torch.tensor(1.0))
            acc = strategy.reduce.add(acc, tree.at(out[0], None))
            memories = [out[1] if i == k else m for i, m in enumerate(memories)]
        state = strategy.apply(state, strategy.reduce.done(acc), round)
    return strategy.broadcast(state), memories


def test_fedper_averages_the_body_and_leaves_the_heads_apart():
    cast, memories = play(fedper(own=["head"]), rounds=2)
    # errors at (1, 0): -2 and 2; bodies move by +0.2 and -0.2, so the mean stays 1; heads become 0.2 and -0.2
    # then errors 1.2 - 3 = -1.8 and 0.8 + 1 = 1.8: bodies cancel out again, heads 0.38 and -0.38
    assert cast["params"]["body"] == pytest.approx(1.0)
    assert [m["own"]["head"].item() for m in memories] == pytest.approx([0.38, -0.38])
    models = [fedper(own=["head"]).personal(cast, m) for m in memories]
    assert [(m["body"].item(), m["head"].item()) for m in models] == [
        pytest.approx((1.0, 0.38)),
        pytest.approx((1.0, -0.38)),
    ]


def test_the_sites_own_part_never_enters_a_summand_nor_the_servers_state():
    strategy = fedper(own=["he*"])
    assert standing(strategy, START)["delta"].keys() == {"body"}
    cast, memories = play(strategy, rounds=5)
    assert cast["params"]["head"] == START["head"] and memories[0]["own"]["head"] > 0.5


def test_a_head_of_ones_own_fits_where_one_model_for_all_cannot():
    def errors(strategy):
        cast, memories = play(strategy, rounds=200)
        own = strategy.personal or (lambda cast, memory: cast["params"])
        models = [own(cast, memory) for memory in memories]
        return [abs((m["body"] + m["head"]).item() - target) for m, target in zip(models, TARGETS, strict=True)]

    assert max(errors(fedper(own=["head"]))) < 1e-4 and max(errors(ditto(pull=0.0))) < 1e-4
    assert min(errors(fedavg())) > 1.9  # the middle, far from both


def test_what_is_shared_trains_as_the_strategy_inside_does():
    """With nothing to gain from a head, its body is FedAvg's; and SCAFFOLD's controls are of the body only."""
    inside = fedper(scaffold(population=2), own=["head"])
    cast, memories = play(inside, rounds=3)
    assert cast["control"].keys() == memories[0]["of"]["control"].keys() == {"body"}
    assert cast["control"]["body"].item() == pytest.approx(
        sum(m["of"]["control"]["body"].item() for m in memories) / 2, abs=1e-6
    )


def test_fedbn_is_fedper_of_what_normalises():
    params = {"body.weight": torch.ones(2), "norm.weight": torch.ones(2), "norm.bias": torch.zeros(2)}
    assert standing(fedbn(), params)["delta"].keys() == {"body.weight"}
    assert fedbn().remember(params)["own"].keys() == {"norm.weight", "norm.bias"}


def test_patterns_that_match_nothing_or_everything_are_refused():
    for patterns, how in ((["tail"], "none"), (["*"], "all")):
        with pytest.raises(ConfigError, match=f"own: .* matches {how} of body, head"):
            fedper(own=patterns).init(START)


def test_ditto_by_hand():
    cast, memories = play(ditto(pull=0.5), rounds=1, steps=2)
    # first site, its own model: (1, 0), error -2, no pull yet: (1.2, 0.2). Then error 1.4 - 3 = -1.6 and the pull
    # 0.5 * 0.2 = 0.1 in each: (1.2 + 0.1 * 1.5, 0.2 + 0.1 * 1.5)
    assert [memories[0]["own"][name].item() for name in ("body", "head")] == pytest.approx([1.35, 0.35])
    shared, _ = play(fedavg(), rounds=1, steps=2)
    torch.testing.assert_close(cast["params"], shared["params"], rtol=0, atol=0)  # as if there were no second model


def test_a_strong_pull_is_the_shared_model():
    cast, memories = play(ditto(pull=50.0), rounds=100, lr=0.01)
    assert ditto().personal(cast, memories[0])["head"].item() == pytest.approx(cast["params"]["head"].item(), abs=0.1)


def test_models_that_train_at_once_get_each_their_own_gradient():
    both = {"shared": START, "own": tree.map(lambda p: p + 1, START)}
    batch = tree.at(batches(3.0), 0)
    found = plain(losses)(both, batch)
    for name, params in both.items():
        torch.testing.assert_close(found[name], plain(losses)(params, batch))
    torch.testing.assert_close(together(losses)(START, batch["x"], batch["y"]), losses(START, batch["x"], batch["y"]))


def test_an_example_is_clipped_over_all_models_together():
    both = {"shared": START, "own": tree.map(lambda p: p - 2, START)}
    batch = tree.at(batches(3.0), 0) | {"noise": tree.map(torch.zeros_like, both)}
    assert tree.norm(plain(losses)(both, batch)).item() > 1
    assert tree.norm(clipped(losses, 1.0)(both, batch)).item() == pytest.approx(1.0)


def test_compression_and_robustness_go_round_a_personal_strategy():
    for strategy in (topk(fedper(own=["head"]), fraction=1.0), robust(fedper(own=["head"]), attackers=0)):
        cast, memories = play(strategy, rounds=2)
        assert cast["params"]["body"].item() == pytest.approx(1.0)
        assert [strategy.personal(cast, m)["head"].item() for m in memories] == pytest.approx([0.38, -0.38])


@pytest.mark.parametrize("outer", [fedprox, fedper, ditto])
def test_what_must_know_whose_model_it_is_refuses_to_go_round_one(outer):
    more = {"mu": 0.1} if outer is fedprox else {}
    with pytest.raises(ValidationError, match="must go round this one"):
        outer(of=strategies.ditto(), **more)
