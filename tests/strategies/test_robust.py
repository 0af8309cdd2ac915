"""The default against liars: what it is, and what one round of each attack does to it and to FedAvg."""

import pytest
import torch

from fedtailor.strategies import fedavg, nnm, norm_bound, robust, trimmed_mean

RNG = torch.Generator().manual_seed(0)
HONEST = 1 + 0.5 * torch.randn(16, 50, generator=RNG)  # sixteen honest updates about 1; four liars
MEAN, STD = HONEST.mean(0), HONEST.std(0)
ATTACKS = {
    "sign flip": -10 * MEAN,
    "inner product": -8 * MEAN,
    "model replacement": -1e4 * MEAN,
    "huge": torch.full((50,), 1e38),
}


def test_it_is_bounded_mixed_and_trimmed(end):
    composed = norm_bound(nnm(trimmed_mean(attackers=2), attackers=2, nearest="direction"))
    replies = [*HONEST[:7].tolist(), *(9 * HONEST[7:9]).tolist()]
    assert end(robust(attackers=2), replies) == end(composed, replies)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_that_turns_the_mean_does_not_turn_it(attack, end):
    replies = [*HONEST.tolist(), *[ATTACKS[attack].tolist()] * 4]
    off = (torch.tensor(end(robust(attackers=4), replies)) - MEAN).norm() / MEAN.norm()
    fooled = (torch.tensor(end(fedavg(), replies)) - MEAN).norm() / MEAN.norm()
    assert off < 0.15 < 1 < fooled


def test_a_little_is_no_longer_enough(end):
    """Liars just inside the spread of the honest: the error stays below the honest updates' own distance to the mean."""
    lie = (MEAN - 1.5 * STD).tolist()
    off = (torch.tensor(end(robust(attackers=4), [*HONEST.tolist(), *[lie] * 4])) - MEAN).norm()
    assert off < 0.6 * STD.norm()
