"""A joint optimum that plain averaging of many local steps does not reach: the clients drift."""

import torch

from fedtailor import tree
from fedtailor.simulations.engine import simulate_round, vmapped
from fedtailor.strategy import Strategy
from fedtailor.training import local_train


def error_after(strategy: Strategy, steps: int, rounds: int = 200) -> float:
    """How far from the optimum of w^2 + (3w - 6)^2, which is 18 / 10, two clients that hold a term each end up."""
    slope, target = torch.tensor([[1.0], [3.0]]).repeat(1, steps), torch.tensor([[0.0], [6.0]]).repeat(1, steps)

    def gradient(params, batch):
        return {"w": 2 * batch["slope"] * (batch["slope"] * params["w"] - batch["target"])}

    train = local_train(gradient, strategy, lr=0.02)
    state = strategy.init({"w": torch.tensor(0.0)})
    memory = tree.stack([strategy.remember({"w": torch.tensor(0.0)})] * 2)
    batches, live = {"slope": slope, "target": target}, torch.ones(2, steps)
    for round in range(rounds):
        state, memory = simulate_round(strategy, vmapped(train), state, memory, batches, live, torch.ones(2), round)
    return abs(state["params"]["w"].item() - 1.8)
