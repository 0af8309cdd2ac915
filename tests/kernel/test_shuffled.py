"""A shuffled order's parts: local epochs, as the literature has them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor.batches import draw, numbered, pack, sampled, scales
from fedtailor.config import load
from fedtailor.errors import ConfigError
from fedtailor.recipe import Part
from fedtailor.study import LocalTraining, Plan


def local(steps, rate, sampling="shuffled"):
    return LocalTraining(steps=steps, rate=rate, lr=0.1, sampling=sampling)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 9))
def test_every_epoch_sees_each_example_once_in_equal_parts(parts, sizes, epochs, round):
    mask = sampled(local(parts * epochs, 1 / parts), sizes, 3, round, [f"c{k}" for k in range(len(sizes))])
    for epoch in mask.split(parts):
        assert bool((epoch.sum(0) == 1).all())
        for size, own in zip(sizes, epoch.split(sizes, 1), strict=True):
            assert set(own.sum(1).tolist()) <= {size // parts, -(-size // parts)}


def test_an_example_is_in_any_part_alike_whatever_its_epoch():
    found = torch.stack([draw(local(5, 1 / 5), 50, seed, 0, "va") for seed in range(2000)])
    assert (found.mean(0) - 0.2).abs().max() < 5 * (0.2 * 0.8 / 2000) ** 0.5
    first, second = draw(local(10, 1 / 5), 50, 0, 0, "va").split(5)
    assert not torch.equal(first, second)


def test_an_order_is_a_clients_own_and_depends_on_nothing_else_that_was_drawn():
    sizes, names, asked = [50, 7, 0, 33], ["a", "b", "c", "d"], local(7, 0.2)
    together = sampled(asked, sizes, 4, 2, names)
    for own, size, name in zip(together.split(sizes, 1), sizes, names, strict=True):
        assert torch.equal(own.float(), draw(asked, size, 4, 2, name))
    assert torch.equal(
        draw(local(3, 0.2), 50, 4, 2, "a").bool(), together[:3, :50]
    )  # more steps draw the first ones alike
    for other in ((5, 2, "a"), (4, 3, "a"), (4, 2, "b")):
        assert not torch.equal(draw(asked, 50, *other), draw(asked, 50, 4, 2, "a"))


def test_a_step_is_that_of_a_loader_of_equal_batches():
    """Known answer: batches of ten of fifty rows, each with its mean loss, one epoch."""
    x, y = torch.randn(50, 3), torch.randn(50)
    batches = pack(Part(x, y), draw(local(5, 0.2), 50, 0, 0, "va"), local(5, 0.2).poisson_rate)
    assert batches["x"].shape == (5, 10, 3) and bool(batches["live"].all()) and bool((batches["scale"] == 0.1).all())
    assert torch.equal(batches["y"].flatten().sort().values, y.sort().values)


def test_a_mean_is_over_the_examples_there_are():
    rows, live = numbered(sampled(local(5, 0.2), [7, 50], 0, 0, ["a", "b"]), [7, 50])
    found = scales(None, live, [7, 50])
    assert torch.equal(found, 1 / live.sum(-1)) and sorted(found[0].tolist()) == [0.5, 0.5, 1.0, 1.0, 1.0]
    assert scales(None, torch.zeros(1, 2, 3), [1]).tolist() == [[1.0, 1.0]]  # of nothing: a mean of no part of the sum


def test_a_record_is_hidden_by_poisson_samples_only():
    with pytest.raises(ConfigError, match=r"^plan: local\.sampling: shuffled, but privacy\.unit=record .* poisson$"):
        load(["study=heart", "local.sampling=shuffled"])
    for privacy in ("none", "site"):
        assert load(["study=heart", "local.sampling=shuffled", f"privacy={privacy}"]).plan.local.sampling == "shuffled"


def test_a_plan_of_poisson_samples_has_the_text_that_it_had():
    assert "sampling" not in load(["study=heart"]).plan.canonical()
    asked = load(["study=heart", "privacy=none", "local.sampling=shuffled"]).plan
    assert '"sampling":"shuffled"' in asked.canonical() and Plan.parse(asked.canonical()) == asked


@pytest.mark.parametrize("rate", ["1e-320", "1e-10", "0"])
def test_a_pass_that_nobody_could_count_is_refused(rate):
    with pytest.raises(ConfigError, match=r"local\.rate: Input should be greater than or equal to 0\.000000001 "):
        load(["study=heart", "privacy=none", "local.sampling=shuffled", f"local.rate={rate}"])
