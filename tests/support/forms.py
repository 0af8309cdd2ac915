"""The private forms of strategies, for the suite that all strategies inherit."""

from collections.abc import Mapping

from fedtailor.privacy import private
from fedtailor.privacy.correlated import mixture
from fedtailor.strategy import Strategy
from fedtailor.study import AdaptiveClip


def private_forms(shipped: Mapping[str, Strategy]) -> dict[str, Strategy]:
    """Of each strategy that sums: with a fixed clip of 1, with one that begins there, and some with correlated noise."""
    sums = {name: strategy for name, strategy in shipped.items() if strategy.reduce.is_sum}
    of = {"clip": 1.0, "noise_multiplier": 0.5, "cohort": 7}
    found = {f"private {name}": private(one, **of) for name, one in sums.items()}
    found |= {f"adaptive {name}": private(one, **of, adaptive=AdaptiveClip(lr=2.0)) for name, one in sums.items()}
    return found | {
        f"correlated {name}": private(sums[name], **of, mixture=mixture(3)) for name in ("fedavg", "scaffold")
    }
