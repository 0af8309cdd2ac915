"""q-FedAvg and TERM: by hand, side by side with Flower's, and where the loss that they weight by comes from."""

import math

import pytest
import torch
from flwr.serverapp.strategy import QFedAvg

from fedtailor import tree
from fedtailor.simulations.engine import simulate_round, vmapped
from fedtailor.strategies import fedavg, qfedavg, term
from fedtailor.training import local_train, plain


def test_a_step_of_q_fedavg(step):
    """Delta_k = F^q L d and h_k = q F^(q-1) |L d|^2 + L F^q, L being 1 / lr."""
    strategy = qfedavg(q=2.0)
    replies = [({"w": torch.tensor(1.0)}, 1), ({"w": torch.tensor(-2.0)}, 1)]
    state = step(strategy, strategy.init({"w": torch.tensor(0.0)}), replies, losses=[3.0, 0.5], lr=0.5)
    delta = 9 * 2 * 1 + 0.25 * 2 * -2
    height = (2 * 3 * 4 + 2 * 9) + (2 * 0.5 * 16 + 2 * 0.25)
    assert state["params"]["w"].item() == pytest.approx(delta / height)


def test_no_fairness_is_the_plain_mean(step, start, around):
    replies = around(start, 4)
    mean = step(fedavg(weighting="equal"), fedavg().init(start), replies)["params"]
    for strategy in (qfedavg(q=0.0), term(tilt=0.0)):
        made = step(strategy, strategy.init(start), replies, losses=[3.0, 0.1, 1.0, 2.0])["params"]
        torch.testing.assert_close(made, mean)


@pytest.mark.parametrize("q", [0.1, 1.0, 2.0])
def test_flower_agrees_for_five_rounds(q, step, flower, start, around):
    ours, theirs = qfedavg(q=q), QFedAvg(client_learning_rate=0.1, q=q)
    state, params = ours.init(start), start
    for round in range(1, 6):
        replies, losses = around(params, 4, round), [0.5, 1.0, 4.0, 0.1]
        state, params = step(ours, state, replies, losses=losses), flower(theirs, params, replies, round, losses)
        torch.testing.assert_close(state["params"], params, rtol=0, atol=1e-6)


def test_a_step_of_term(step):
    strategy = term(tilt=2.0)
    replies = [({"w": torch.tensor(1.0)}, 1), ({"w": torch.tensor(-2.0)}, 5)]
    state = step(strategy, strategy.init({"w": torch.tensor(0.0)}), replies, losses=[1.0, 0.5])
    a, b = math.exp(2), math.exp(1)
    assert state["params"]["w"].item() == pytest.approx((a - 2 * b) / (a + b))


def test_a_great_loss_does_not_overflow(step):
    strategy = term(tilt=10.0)
    state = step(strategy, strategy.init({"w": torch.tensor(0.0)}), [({"w": torch.tensor(1.0)}, 1)], losses=[1e6])
    assert state["params"]["w"].item() == pytest.approx(1)


def test_the_loss_is_the_cast_models_on_the_rounds_examples():
    """Two steps, of one and of two live examples, and a third that is padding; each over its expected size."""
    strategy = fedavg()._replace(needs_loss=True, report=lambda local: ({"loss": local.loss}, {}))

    def losses(params, x, y):
        return params["w"] * x + 0 * y

    x = torch.tensor([[1.0, 50.0], [2.0, 4.0], [9.0, 9.0]])
    live = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    batches = {"x": x, "y": torch.zeros(3, 2), "live": live, "scale": torch.full((3,), 0.5)}
    cast = {"params": {"w": torch.tensor(10.0)}}
    train = local_train(plain(losses), strategy, 0.1, losses)
    summand, _ = train(cast, {}, batches, torch.tensor([1.0, 1.0, 0.0]), torch.tensor(4.0))
    assert summand["loss"].item() == pytest.approx((10 * 1 * 0.5 + 10 * (2 + 4) * 0.5) / 2)


@pytest.mark.parametrize("strategy", [qfedavg(q=5.0), term(tilt=1.0)])
def test_the_worst_served_client_gains(strategy):
    """Optima 0, 0, 0 and 3: the mean serves the fourth worst, at a loss of (3 - 0.75)^2 / 2; a fair one serves it better."""

    def losses(params, x, y):
        return (params["w"] - y).square() / 2

    def run(strategy):
        y = torch.tensor([0.0, 0.0, 0.0, 3.0]).reshape(4, 1, 1)
        batches = {"x": torch.zeros(4, 1, 1), "y": y, "live": torch.ones(4, 1, 1), "scale": torch.ones(4, 1)}
        train = local_train(plain(losses), strategy, 0.1, losses)
        state = strategy.init({"w": torch.tensor(0.0)})
        for round in range(300):
            state, _ = simulate_round(
                strategy, vmapped(train), state, {}, batches, torch.ones(4, 1), torch.ones(4), round
            )
        return state["params"]["w"].item()

    assert run(fedavg()) == pytest.approx(0.75, abs=0.01)
    assert 1.0 < run(strategy) < 3


def test_trees_of_several_tensors_have_one_norm(step):
    strategy = qfedavg(q=1.0)
    ends = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    state = step(strategy, strategy.init(tree.map(torch.zeros_like, ends)), [(ends, 1)], losses=[2.0], lr=1.0)
    assert state["params"]["a"].item() == pytest.approx(2 * 3 / (25 + 2))
