import pytest
import torch
from fedtailor.simulations.run import simulate

QUIET = {"evaluation": {"baseline": False}}


@pytest.mark.parametrize("workers", [1, 2])
def test_parity(plan, sources, workers):
    made = plan(**QUIET)
    a = simulate(made, sources)[1]
    b = simulate(made, sources, workers=workers, ray="local")[1]
    for n in a:
        torch.testing.assert_close(a[n], b[n], rtol=1e-5, atol=1e-6)
