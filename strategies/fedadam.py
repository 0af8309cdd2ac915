"""FedAdam. Reddi et al. 2021, Algorithm 2, https://arxiv.org/abs/2003.00295."""

from pydantic import PositiveFloat, validate_call

from fedtailor import Strategy
from fedtailor.strategies.fedopt import Decay, fedopt


@validate_call
def fedadam(lr: PositiveFloat = 0.1, beta1: Decay = 0.9, beta2: Decay = 0.99, tau: PositiveFloat = 1e-3) -> Strategy:
    """Adam on the server, with the mean change as its gradient: for coordinates of very different scales.

    Args:
        lr: the server's step.
        beta1: decay of the mean change.
        beta2: decay of its square.
        tau: adaptivity; a larger one is closer to plain momentum.
    """
    return fedopt(lambda v, square: beta2 * v + (1 - beta2) * square, lr, beta1, tau)
