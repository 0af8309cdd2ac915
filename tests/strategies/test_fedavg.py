"""FedAvg by hand."""

import pytest
import torch
from pydantic import ValidationError

from fedtailor import tree
from fedtailor.strategies import fedavg
from fedtailor.strategy import Local


def end(strategy, *clients):
    """Clients ``(rows, delta)`` that start at w = 10; where the server ends."""
    state, acc = strategy.init({"w": torch.tensor([10.0])}), None
    for rows, delta in clients:
        params = {"w": torch.tensor([10.0 + delta])}
        local = Local(strategy.broadcast(state), {}, params, torch.tensor(float(rows)), torch.tensor(1.0), 0.1)
        acc = strategy.reduce.add(acc, tree.at(strategy.report(local)[0], None))
    return strategy.apply(state, strategy.reduce.done(acc), 0)["params"]["w"].item()


def test_the_mean_is_weighted_by_rows():
    assert end(fedavg(), (1, 1.0), (3, 5.0)) == pytest.approx(10 + (1 * 1 + 3 * 5) / 4)


def test_or_counts_each_client_once():
    assert end(fedavg(weighting="equal"), (1, 1.0), (3, 5.0)) == pytest.approx(10 + (1 + 5) / 2)


def test_the_server_takes_a_share_of_the_mean():
    assert end(fedavg(server_lr=0.25), (1, 1.0), (3, 5.0)) == pytest.approx(10 + 0.25 * 4)


@pytest.mark.parametrize("arguments", [{"server_lr": 0}, {"server_lr": float("nan")}, {"weighting": "rows"}])
def test_arguments_are_checked(arguments):
    with pytest.raises(ValidationError, match=next(iter(arguments))):
        fedavg(**arguments)
