"""A Flower strategy of somebody's own, to be made into others."""

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import strategy as theirs


class Own(theirs.FedAvg):
    """FedAvg that does something of its own with the mean: ``change`` takes a dict of arrays and gives one."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(min_train_nodes=1, min_available_nodes=1, **arguments)

    def configure_train(self, server_round, arrays, config, grid):
        self.now = {name: x.numpy() for name, x in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        mean, metrics = super().aggregate_train(server_round, replies)
        made = self.change({name: x.numpy() for name, x in mean.items()})
        return ArrayRecord({name: Array(np.asarray(x)) for name, x in made.items()}), metrics

    def change(self, mean):
        return mean
