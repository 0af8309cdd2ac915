"""Rounds by hand: what our strategies make of given replies, and what Flower's own make of the same."""

import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.fedopt import FedOpt

from fedtailor import Strategy, tree
from fedtailor.strategy import Local
from fedtailor.tree import Tree

Replies = Sequence[tuple[Tree, float]]  # where a client's training ended, and its rows


def next_state(
    strategy: Strategy,
    state: Tree,
    replies: Replies,
    round: int = 0,
    losses: Sequence[float] | None = None,
    lr: float = 0.1,
) -> Tree:
    """The state after a round of clients without a memory that took 5 steps each."""
    acc = None
    for k, (params, rows) in enumerate(replies):
        loss = torch.tensor(losses[k]) if losses else None
        local = Local(
            strategy.broadcast(state), strategy.remember(params), params, torch.tensor(float(rows)), torch.tensor(5.0), lr,
            seed=torch.tensor(k), loss=loss,
        )  # fmt: skip
        acc = strategy.reduce.add(acc, tree.at(strategy.report(local)[0], None))
    assert acc is not None
    return strategy.apply(state, strategy.reduce.done(acc), round)


def _aggregate(
    theirs: FedAvg, params: Tree, replies: Replies, round: int = 1, losses: Sequence[float] | None = None
) -> Tree:
    messages = []
    for k, (end, rows) in enumerate(replies):
        arrays = ArrayRecord({name: Array(x.numpy().copy()) for name, x in end.items()})
        metrics = MetricRecord({"num-examples": rows, "train_loss": losses[k] if losses else 0.0})
        meta = Metadata(1, str(k), k + 1, 1, "asked", "", time.time(), 60.0, "train")
        messages.append(make_message(meta, RecordDict({"arrays": arrays, "metrics": metrics})))
    if hasattr(theirs, "current_arrays"):
        now = {name: x.numpy().copy() for name, x in params.items()}
        if isinstance(theirs, FedOpt):
            theirs.current_arrays = now
        elif theirs.current_arrays is None or losses:
            theirs.current_arrays = ArrayRecord({name: Array(x) for name, x in now.items()})
    with patch("gc.collect"):  # Flower calls it for every array that it reads
        made, _ = theirs.aggregate_train(round, messages)
    assert made is not None
    # Flower's FedAdam and QFedAvg make float64 of a float32 model; the next round's clients would not.
    return {name: torch.from_numpy(np.array(x.numpy())).to(params[name].dtype) for name, x in made.items()}


@pytest.fixture
def step() -> Callable[..., Tree]:
    """``step(strategy, state, replies, round, losses)``: our next state."""
    return next_state


@pytest.fixture
def flower() -> Callable[..., Tree]:
    """``flower(their_strategy, params, replies, round, losses)``: Flower's next parameters."""
    return _aggregate


@pytest.fixture
def end() -> Callable[..., Any]:
    """``end(strategy, deltas)``: where one round from zero ends; a delta is a list of numbers."""

    def run(strategy: Strategy, deltas: Sequence[Sequence[float]]) -> list[float]:
        state = strategy.init({"w": torch.zeros(len(deltas[0]))})
        replies = [({"w": torch.tensor(delta)}, 1.0) for delta in deltas]
        ended: list[float] = next_state(strategy, state, replies)["params"]["w"].tolist()
        return ended

    return run


@pytest.fixture
def start() -> Tree:
    """A model of two tensors."""
    rng = torch.Generator().manual_seed(3)
    return {"w": torch.randn(4, 3, generator=rng), "b": torch.randn(3, generator=rng)}


@pytest.fixture
def around() -> Callable[..., Replies]:
    """``around(params, clients, seed, rows)``: clients whose training ended near ``params``."""

    def make(params: Tree, clients: int, seed: int = 0, rows: Sequence[float] | None = None) -> Replies:
        rng = torch.Generator().manual_seed(seed)
        ends = [tree.map(lambda p: p + 0.3 + torch.randn(p.shape, generator=rng), params) for _ in range(clients)]
        return list(zip(ends, rows or [1.0] * clients, strict=True))

    return make
