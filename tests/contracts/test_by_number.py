"""What strategies say of themselves so that servers and simulators can do less: that they treat each number by itself."""

from pathlib import Path

import pytest
import torch
from seven import World
from shipped import PRIVATE, SHIPPED, assert_close, fold

from fedtailor import store, tree, treefile
from fedtailor.server import slicewise
from fedtailor.strategy import Local, WeightedChange

BY_SLICES = [name for name, strategy in SHIPPED.items() if slicewise.can_be(strategy)]


def test_the_common_strategies_are_applied_by_slices_and_no_private_one_is() -> None:
    assert {"fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox", "scaffold", "feddyn"} <= {*BY_SLICES}
    assert not any(slicewise.can_be(strategy) for strategy in PRIVATE.values())  # their noise is of the whole


@pytest.mark.parametrize("name", BY_SLICES)
def test_what_is_applied_by_slices_is_what_is_applied_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds of a coordinator, on disk and in memory: every bit is the same, of the cast too."""
    monkeypatch.setattr(treefile, "SLICE", 2)
    strategy, world = SHIPPED[name], World()
    state, memories = world.start(strategy)
    store.save_tree(tmp_path / "0", {"state": state}, {})
    for round in range(3):
        before = treefile.opened(tmp_path / f"{round}")
        cast = slicewise.cast(strategy, before)
        assert cast is not None
        assert b"".join(cast) == b"".join(store.safetensors(tree.flatten(strategy.broadcast(state))))
        replies = [world.reply(strategy, strategy.broadcast(state), memory, k)[0] for k, memory in enumerate(memories)]
        acc = None
        for reply in replies:
            acc = slicewise.add(strategy.reduce, acc, tree.flatten(reply), 1.0, tmp_path)
        assert acc is not None
        with store.replacing(tmp_path / f"{round + 1}") as file:
            after = treefile.draft(file, treefile.spec_of(before), {})
            slicewise.advance(strategy, acc, before, after, round, like=replies[0])
            after.seal()
        state = strategy.apply(state, tree.lowered(fold(strategy, replies), replies[0]), round)
        assert_close(store.load_tree(tmp_path / f"{round + 1}")[0]["state"], state, rtol=0, atol=0)


MANY = [name for name, one in SHIPPED.items() if isinstance(one.report, WeightedChange) and one.report.many]


@pytest.mark.parametrize("name", MANY)
def test_what_weighs_many_clients_at_once_weighs_each_by_itself(name: str) -> None:
    strategy, world = SHIPPED[name], World()
    (state, memories), change = world.start(strategy), SHIPPED[name].report
    assert isinstance(change, WeightedChange)
    cast = strategy.broadcast(state)
    rows, steps, seeds, loss = torch.arange(1.0, 6), torch.arange(3.0, 8), torch.arange(5), torch.rand(5)
    many = change.weigh(Local(cast, memories[0], {}, rows, steps, 0.05, seeds, loss))
    for k in range(5):
        one = change.weigh(Local(cast, memories[0], {}, rows[k], steps[k], 0.05, seeds[k], loss[k]))
        assert_close({"is": one[0]} | one[1], {"is": many[0][k]} | tree.at(many[1], k), rtol=0, atol=0)
