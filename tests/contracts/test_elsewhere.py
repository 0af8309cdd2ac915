"""What every strategy that sums keeps where its state lies on a GPU."""

import pytest
from seven import World, losses
from strays import OTHER, elsewhere_by_default

from fedtailor import Strategy, tree
from fedtailor.config import build, choices, load
from fedtailor.simulations.engine import simulate_round, vmapped
from fedtailor.training import local_train, plain

SHIPPED = {name: build(load([f"strategy={name}"]).plan.strategy, Strategy) for name in choices("strategy")}


@pytest.mark.parametrize("name", [name for name, strategy in SHIPPED.items() if strategy.reduce.is_sum])
def test_a_round_of_one_that_sums_makes_nothing_on_another_device(name):
    """Its state lies on a GPU, where there is one: see fedtailor.simulations.hardware."""
    strategy, world = SHIPPED[name], World()
    many = vmapped(local_train(plain(losses), strategy, 0.05, losses))
    state, memories = world.start(strategy)
    given = strategy, many, state, tree.stack(memories), world.batches, world.live, world.counts, 1
    found = elsewhere_by_default(lambda: simulate_round(*given))
    assert not any(x.device == OTHER for each in found for x in tree.leaves(each))
