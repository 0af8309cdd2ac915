"""The bytes that a simulation states are those of the payloads that its sites would send and be sent."""

import pytest
import torch

from fedtailor import leaving, packing, store, tree
from fedtailor import recipe as recipes
from fedtailor.config import build
from fedtailor.policy import Policy
from fedtailor.recipe import Recipe
from fedtailor.result import model_bytes
from fedtailor.simulations.run import simulate
from fedtailor.simulations.traffic import counting
from fedtailor.strategy import Strategy

SIGN = {"_target_": "fedtailor.strategies.sign"}


def payload(made):
    strategy, recipe = build(made.strategy, Strategy), build(made.recipe, Recipe)
    flat = tree.flatten(leaving.summand(made, strategy, recipes.initial(recipe, made.seed)))
    return b"".join(store.safetensors(flat))


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_what_is_not_packed_is_as_long_in_every_round(plan, sources, name):
    made = plan(
        strategy={"_target_": f"fedtailor.strategies.{name}"} | ({"population": 3} if name == "scaffold" else {})
    )
    result, params = simulate(made, sources)
    nothing = len(b"".join(store.safetensors({})))
    for site in result.sites.values():
        assert site.bytes_sent == 3 * len(payload(made)) + nothing
        assert site.bytes_received >= 4 * len(model_bytes(params))  # scaffold casts its control beside it
    if name == "fedavg":
        model = b"".join(store.safetensors({f"params/{k}": v for k, v in params.items()}))
        assert {site.bytes_received for site in result.sites.values()} == {4 * len(model)}


def test_what_is_packed_is_counted_as_it_is(plan, sources, monkeypatch):
    """Every site's own answers, whatever the block."""
    made, seen = plan(strategy=SIGN), []
    real = packing.pack

    def pack(flat):
        raw = b"".join(real(flat))
        seen.append((float(flat["weight"]), len(raw)))
        yield raw

    monkeypatch.setattr(packing, "pack", pack)
    for block in (1, 64):
        seen.clear()
        result, _ = simulate(made, sources, block=block)
        rows = [weight for weight, _ in seen[:3]]  # a client's weight is its training rows
        for site, mine in zip(made.sites, rows, strict=True):
            sizes = [size for weight, size in seen if weight == mine]
            assert len(sizes) == 3
            assert result.sites[site].bytes_sent == sum(sizes) + len(packing.MAGIC) < 3 * len(payload(made))


def test_who_is_dropped_sends_nothing(plan, sources):
    policy = Policy(studies=("made-up",), epsilon=8.0, delta=1e-4, without_privacy=True)
    policies = dict.fromkeys(plan().sites, policy) | {"west": policy.model_copy(update={"max_rounds": 1})}
    result, _ = simulate(plan(quorum=2), sources, policies=policies)
    assert set(result.sites) == {"north", "south"}
    keep, sent = counting(plan(), build(plan().strategy, Strategy), {"w": torch.zeros(2)}, lambda *_: torch.tensor([1]))
    keep({"delta": {"w": torch.zeros(3, 2)}, "weight": torch.zeros(3)}, 0, 0)
    assert sent["south"] > sent["north"] == sent["west"]
