"""Somebody else's Flower strategies in our rounds: what is carried, and what is the same again."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as theirs
from flwr.supercore.task_identity import TaskIdentity
from own_flower import Own
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from fedtailor import tree
from fedtailor.errors import ConfigError
from fedtailor.strategies import fedavgm
from fedtailor.strategies.flower_adapter import from_flower
from fedtailor.strategy import model_in
from fedtailor.tree import Tree


class Halves(theirs.Strategy):
    """All by itself, from Flower's abstract class alone: half of the way to the mean, then a third, a quarter..."""

    def __init__(self) -> None:
        self.parts = 2

    def configure_train(self, server_round, arrays, config, grid):
        self.sent = arrays
        content = RecordDict({"model": arrays, "settings": config})
        return [Message(content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]

    def aggregate_train(self, server_round, replies):
        ends = [reply.content["arrays"] for reply in replies]
        mean = {name: np.mean([end[name].numpy() for end in ends], axis=0) for name in ends[0]}
        moved = {n: self.sent[n].numpy() + (x - self.sent[n].numpy()) / self.parts for n, x in mean.items()}
        self.parts += 1
        return ArrayRecord({name: Array(np.asarray(x)) for name, x in moved.items()}), MetricRecord()

    def configure_evaluate(self, server_round, arrays, config, grid):
        raise AssertionError("evaluation is the plan's")

    def aggregate_evaluate(self, server_round, replies):
        raise AssertionError("evaluation is the plan's")

    def summary(self):
        pass


class Momentum(Own):
    """Server momentum, kept in every kind of place at once."""

    def __init__(self) -> None:
        super().__init__()
        self.velocity: dict[str, Any] = {}
        self.inside: Any = theirs.FedAvg()
        self.found: Any = None

    def change(self, mean):
        self.velocity = {n: 0.9 * self.velocity.get(n, 0) + (x - self.now[n]) for n, x in mean.items()}
        last = self.found[2][0] if self.found else 0
        norm = np.float64(sum(float(np.square(v).sum()) for v in self.velocity.values()))
        self.found = (
            norm,
            None,
            [last + 1],
            {"t": torch.ones(2) * last, "a": Array(np.arange(3.0)), "yes": True},
            0.5,
            [],
        )
        self.inside.fraction_train /= 2
        return {n: self.now[n] + v for n, v in self.velocity.items()}


def run(strategy: Any, start: Tree, around: Any, step: Any, rounds: range, state: Any = None) -> Tree:
    state = strategy.init(start) if state is None else state
    for round in rounds:
        state = step(strategy, state, around(start, 3, round, rows=[1.0, 2.0, 5.0]), round)
    return state


def test_a_strategy_of_its_own_kind_runs(step):
    strategy, state = from_flower(Halves()), {"params": {"w": torch.zeros(1)}}
    for round, expected in enumerate([3 / 2, 3 / 2 + 1 / 3 * 3 / 2, 2 + 1 / 4]):
        state = step(strategy, state, [({"w": torch.tensor([2.0])}, 1), ({"w": torch.tensor([4.0])}, 9)], round)
        assert state["params"]["w"].item() == pytest.approx(expected)
    assert state["flower"]["0:int:parts"] == 5


def test_a_momentum_of_its_own_is_ours_and_resumes_bit_for_bit(start, around, step):
    whole = run(from_flower(Momentum()), start, around, step, range(4))
    mate = run(fedavgm(momentum=0.9), start, around, step, range(4))
    torch.testing.assert_close(whole["params"], mate["params"], rtol=0, atol=1e-5)
    middle = run(from_flower(Momentum()), start, around, step, range(2))
    flat = dict(sorted(from_bytes(to_bytes(tree.flatten(middle))).items()))
    again = run(from_flower(Momentum()), start, around, step, range(2, 4), tree.unflatten(flat))
    one, other = tree.flatten(whole), tree.flatten(again)
    assert one.keys() == other.keys() and all(torch.equal(x, other[path]) for path, x in one.items())
    assert one["flower/0:object:inside/0:float:fraction_train"] == 1 / 16


class Rolls(Own):
    """Adds what chance says, by each of the process's generators."""

    def change(self, mean):
        return {n: x + random.random() + np.random.rand() + torch.rand(()).item() for n, x in mean.items()}


def test_chance_is_the_same_again_and_leaves_no_trace(start, around, step):
    def drawn():
        return random.random(), np.random.rand(), torch.rand(()).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    expected = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    first = run(from_flower(Rolls()), start, around, step, range(2))["params"]
    assert drawn() == expected
    with pytest.raises(RuntimeError, match="not set"):
        assert TaskIdentity.run_id
    second = run(from_flower(Rolls()), start, around, step, range(2))["params"]
    assert torch.equal(first["w"], second["w"])
    plain = run(from_flower(Own()), start, around, step, range(2))["params"]
    assert (first["w"] - plain["w"]).std() < 1e-5 < (first["w"] - plain["w"]).mean()


class Ahead(Own):
    """Sends clients a point one step ahead of its model, in the direction of its last move."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, Any] = {}

    def configure_train(self, server_round, arrays, config, grid):
        there = {n: x.numpy() + self.last.get(n, np.zeros(x.shape, np.float32)) for n, x in arrays.items()}
        self.model = {n: x.numpy() for n, x in arrays.items()}
        return super().configure_train(server_round, ArrayRecord({n: Array(x) for n, x in there.items()}), config, grid)

    def change(self, mean):
        self.last = {n: x - self.model[n] for n, x in mean.items()}
        return mean


def test_another_point_than_the_model_is_cast_beside_it(step):
    strategy = from_flower(Ahead(), ahead=True)
    state = strategy.init({"w": torch.tensor([1.0])})
    assert model_in(strategy.broadcast(state))["w"].item() == strategy.broadcast(state)["params"]["w"].item() == 1
    state = step(strategy, state, [({"w": torch.tensor([3.0])}, 1)], 0)
    cast = strategy.broadcast(state)
    assert (model_in(cast)["w"].item(), cast["params"]["w"].item()) == (3, 5)
    state = step(strategy, state, [({"w": torch.tensor([5.5])}, 1)], 1)  # half a step from where it was cast
    assert (model_in(strategy.broadcast(state))["w"].item(), state["ahead"]["w"].item()) == (5.5, 8)


def test_another_point_than_the_model_is_refused_where_it_was_not_said(step):
    strategy = from_flower(Ahead())
    state = step(strategy, {"params": {"w": torch.tensor([1.0])}}, [({"w": torch.tensor([3.0])}, 1)], 0)
    with pytest.raises(ConfigError, match=r"Ahead, round 2: it sends clients other arrays .*ahead=True"):
        step(strategy, state, [({"w": torch.tensor([3.0])}, 1)], 1)


def test_a_model_of_half_precision_keeps_its_dtype(step):
    state = {"params": {"w": torch.zeros(2, dtype=torch.bfloat16)}}
    made = step(
        from_flower(theirs.FedAdam(min_train_nodes=1, min_available_nodes=1)), state, [({"w": torch.ones(2)}, 1)]
    )
    assert made["params"]["w"].dtype == torch.bfloat16 and made["params"]["w"].abs().min() > 0
