"""What a simulated site is fed: the deployment's draws, rows of its own, noise of its own stream; and sites with nothing."""

import pytest
import torch
from scipy import stats

from fedtailor import tree
from fedtailor.batches import draw, pack
from fedtailor.config import build
from fedtailor.errors import RefusedError
from fedtailor.privacy.planning import resolve
from fedtailor.recipe import Part, Recipe
from fedtailor.simulations import cohort, setting
from fedtailor.simulations import noise as noise_of
from fedtailor.simulations.feed import parting
from fedtailor.simulations.noise import seeded
from fedtailor.simulations.run import simulate

PRIVACY = {"epsilon": 3.0, "delta": 1e-4, "clip": 1.0}
LIKE = {"a": torch.zeros(3, 5), "own": {"b": torch.zeros(7), "c": torch.zeros(())}}


def data_of(plan, sources):
    recipe = build(plan.recipe, Recipe)
    return {site: recipe.prepare(sources[site].table()) for site in plan.sites}


@pytest.mark.parametrize("sampling", ["poisson", "shuffled"])
def test_every_site_sees_the_rows_that_it_would_draw_in_a_deployment(plan, sources, sampling):
    made = plan(local={"steps": 5, "rate": 0.1, "lr": 0.3, "sampling": sampling})
    data = data_of(made, sources)
    batches = cohort.batches_of(made, data, 4)
    found = cohort.feed_from(made, cohort.rows_of(data), LIKE).all(batches)
    for k, site in enumerate(made.sites):
        part = data[site].train
        expected = pack(
            part, draw(made.local, len(part.y), made.seed, 4, site), made.local.poisson_rate, found["live"].shape[-1]
        )
        for name, x in expected.items():
            assert torch.equal(found[name][k], x), (site, name)
    some = cohort.batches_of(made.model_copy(update={"sites": made.sites[1:]}), data, 4)  # whose turn it is
    assert torch.equal(some["rows"][..., :1], batches["rows"][1:, :, :1])


def test_noise_is_its_clients_own_whatever_the_block():
    noise, numbers = seeded(LIKE, 2.0), torch.arange(300)
    size = sum(x.numel() for x in tree.leaves(LIKE))
    for together in (10**9, 0):  # drawn for all steps at once, and step by step
        noise_of.AT_ONCE = together
        flat = torch.stack([step.clone() for step in noise(numbers, 4)])
        assert flat.shape == (4, 300, size)
        for k in (0, 77):
            alone = torch.stack([step.clone() for step in noise(numbers[k : k + 1], 4)])
            assert torch.equal(alone[:, 0], flat[:, k])
        assert flat.std().item() == pytest.approx(2.0, rel=0.02) and abs(flat.mean().item()) < 0.05
        parts = torch.cat([flat[..., :11], flat[..., 11:22]], 1).flatten(
            0, 1
        )  # no client, step or parameter has another's
        assert len(parts.unique(dim=0)) == len(parts) == 4 * 2 * len(numbers)


def test_noise_comes_apart_into_the_parameters():
    flat = torch.arange(2 * sum(x.numel() for x in tree.leaves(LIKE))).view(2, -1)
    found = tree.flatten(parting(LIKE)(flat))
    assert found.keys() == tree.flatten(LIKE).keys()
    assert all(x.shape == (2, *tree.flatten(LIKE)[name].shape) for name, x in found.items())
    assert torch.equal(torch.cat([x.reshape(2, -1) for x in found.values()], 1), flat)


def test_noise_is_normal_and_the_same_on_every_machine():
    like = {"w": torch.zeros(50_000)}
    (step,) = seeded(like, 1.0)(torch.tensor([3]), 1)
    drawn = step[0]
    assert stats.kstest(drawn.double().numpy(), "norm").pvalue > 1e-4
    assert drawn.double().var().item() == pytest.approx(1.0, abs=0.03) and 3.5 < drawn.abs().max() < 4.33
    moments = [float(((drawn.double() ** k).mean() - m) / s) for k, m, s in ((3, 0, 15**0.5), (4, 3, 96**0.5))]
    assert all(abs(z) < 4 / 50_000**0.5 for z in moments)
    assert abs(float((drawn[1:] * drawn[:-1]).mean())) < 4 / 50_000**0.5
    torch.testing.assert_close(
        drawn[:3], torch.tensor([0.7577192769200376, -0.17443310484312458, -0.526219197827092]), rtol=1e-6, atol=0
    )
    double = {"w": torch.zeros(3, dtype=torch.double)}
    assert next(seeded(double, 1.0)(torch.tensor([3]), 1)).dtype == torch.double


@pytest.fixture(autouse=True)
def at_once():
    before = noise_of.AT_ONCE
    yield
    noise_of.AT_ONCE = before


def emptied(monkeypatch, *sites):
    """Some sites' training parts, without a row."""
    prepared = setting.prepared

    def without(plan, recipe, sources):
        data = prepared(plan, recipe, sources)
        return {k: d._replace(train=Part(d.train.x[:0], d.train.y[:0])) if k in sites else d for k, d in data.items()}

    monkeypatch.setattr(setting, "prepared", without)


@pytest.mark.parametrize("privacy", [None, PRIVACY], ids=["plain", "private"])
def test_a_site_without_rows_takes_no_part_and_is_named(plan, sources, monkeypatch, privacy):
    without = simulate(plan(privacy=privacy, sites=["north", "west"], quorum=2), sources)[1]
    emptied(monkeypatch, "south")
    result, params = simulate(plan(privacy=privacy, quorum=2), sources)
    assert result.dropped == [{"round": 0, "site": "south", "code": "empty"}] and set(result.sites) == {"north", "west"}
    for name, p in params.items():
        torch.testing.assert_close(p, without[name])


def test_too_few_sites_with_rows_end_the_study(plan, sources, monkeypatch):
    emptied(monkeypatch, "south", "west")
    with pytest.raises(RefusedError, match="1 of 3 sites have rows, the quorum is 2") as error:
        simulate(plan(quorum=2), sources)
    assert error.value.code == "quorum"


def test_a_site_with_fewer_rows_than_a_batch_and_steps_that_draw_none(plan, sources):
    """A rate so small that most steps of the smallest site see nobody; it does not show how many are trained at once."""
    made = resolve(plan(local={"steps": 4, "rate": 0.02, "lr": 0.3}, privacy=PRIVACY))
    live = cohort.batches_of(made, data_of(made, sources), 0)["live"]
    assert (live.sum(2) == 0).any() and live.shape[2] < 8
    ends = [simulate(made, sources, block=block)[1] for block in (1, 64)]
    for name, p in ends[0].items():
        torch.testing.assert_close(p, ends[1][name], rtol=1e-5, atol=1e-6)
        assert bool(p.isfinite().all())
