"""FedAdagrad. Reddi et al. 2021, Algorithm 2, https://arxiv.org/abs/2003.00295."""

from pydantic import PositiveFloat, validate_call

from fedtailor import Strategy
from fedtailor.strategies.fedopt import Decay, fedopt


@validate_call
def fedadagrad(lr: PositiveFloat = 0.1, beta1: Decay = 0.0, tau: PositiveFloat = 1e-3) -> Strategy:
    """Adagrad on the server: steps that shrink where much has been moved, for coordinates that seldom occur.

    Args:
        lr: the server's step.
        beta1: decay of the mean change.
        tau: adaptivity; a larger one is closer to plain momentum.
    """
    return fedopt(lambda v, square: v + square, lr, beta1, tau)
