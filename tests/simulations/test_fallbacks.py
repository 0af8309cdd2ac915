"""Models that no batch bears: one client after another, the same whoever else is there."""

import pytest
import torch
from folk import CLIP, assert_close, one_by_one, reference
from torch import nn
from unbatched import Lucky, Scaled, first_round, task

from fedtailor import tree
from fedtailor.errors import ConfigError
from fedtailor.simulations.engine import in_blocks
from fedtailor.simulations.paths import choose


class Encoded(nn.Module):
    """Drops within layers, where no module says so."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 3)

    def forward(self, x):
        found = self.layer(x.view(-1, 2, 3).repeat(1, 1, 2))
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.GRU(6, 6, num_layers=2, dropout=0.5, batch_first=True),
        lambda: nn.TransformerEncoderLayer(6, 2, 5, dropout=0.5, batch_first=True),
    ],
)
def test_what_a_layer_drops_within_itself_is_no_reason_to_fall_back(layer):
    made_up = task(lambda: Encoded(layer()))
    way = choose("auto", made_up, first_round(made_up.recipe))
    assert (way.path, way.why) == ("block", "")


class Several(nn.Module):
    """A parameter of its own beside a layer that drops: neither a block nor vmap can train it."""

    def __init__(self):
        super().__init__()
        self.scaled, self.dropout = Scaled(), nn.Dropout(0.5)

    def forward(self, x):
        return self.scaled(self.dropout(x))


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("model", [Lucky, Several])
def test_what_a_model_draws_follows_from_the_clients_seed(model, clip):
    """Not from who else is there, how much padding a batch has, or what was drawn before."""
    made_up = task(model, clip)
    given = first_round(made_up.recipe, clip)
    way = choose("auto", made_up, given)
    assert way.path == "loop" and "by vmap: RuntimeError: vmap: called random operation" in way.why
    before = torch.get_rng_state()
    found = way.many(*given)[0]["delta"]
    assert torch.equal(before, torch.get_rng_state())
    padded = {
        name: torch.cat([leaf, torch.zeros_like(leaf)], 2) if name in ("x", "y", "live") else leaf
        for name, leaf in given.batches.items()
    }
    for block, batches in ((1, given.batches), (3, padded)):
        parts = in_blocks(way.many, given.cast, given.memory, batches, given.live, given.num_examples, block)
        again = tree.map(lambda *xs: torch.cat(xs), *(summands["delta"] for _, summands, _ in parts))
        assert all(torch.equal(found[name], again[name]) for name in found)
    other = way.many(*given._replace(batches=given.batches | {"seed": given.batches["seed"] + 1}))[0]["delta"]
    assert not any(torch.equal(other[name], found[name]) for name in found if name.endswith("weight"))


@pytest.mark.parametrize("clip", [None, CLIP])
def test_a_batch_norm_goes_by_its_batch_alone(clip):
    """Averages that it would keep are no parameters: they would not travel."""
    norm = task(lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), clip)
    given = first_round(norm.recipe, clip)
    if clip is not None:
        with pytest.raises(ConfigError, match="not even one client .*Expected more than 1 value per channel"):
            choose("auto", norm, given)
        return
    without = task(lambda: nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)))
    expected = one_by_one(reference(without.recipe, norm.strategy, None), *given)
    assert_close(choose("auto", norm, given).many(*given), expected)


@pytest.mark.parametrize("path", ["vmap", "loop", "measure", "auto"])
def test_a_way_that_the_model_does_not_bear_is_refused_before_it_is_gone(path):
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x):
            raise ValueError("there is no such input")

    made_up = task(Stubborn)
    with pytest.raises(ConfigError, match="there is no such input"):
        choose(path, made_up, first_round(made_up.recipe))
