"""FedBN: normalisation of one's own. Li et al. 2021, https://arxiv.org/abs/2102.07623."""

from pydantic import validate_call

from fedtailor import Strategy
from fedtailor.strategies.fedper import fedper
from fedtailor.strategies.inner import FEDAVG, Shared


@validate_call
def fedbn(of: Shared = FEDAVG) -> Strategy:
    """Leave the layers that normalise to each site, for inputs of different scales; all other parameters are shared.

    The paper's are BatchNorm; under differential privacy they are LayerNorm or GroupNorm, whose scale and shift these
    are: the parameters with ``norm`` in their name.

    Args:
        of: the strategy for the shared parameters.
    """
    return fedper(of, own=("*norm*",))
