"""Site-level differential privacy as a wrapper around any strategy whose summands are summed."""

from fedtailor import seeds, tree
from fedtailor.errors import ConfigError
from fedtailor.privacy.csprng import Csprng
from fedtailor.strategy import Local, Strategy
from fedtailor.tree import Tree


def private(
    strategy: Strategy, *, clip: float, noise_multiplier: float, cohort: int, seed: int = 0, key: bytes | None = None
) -> Strategy:
    """Clip each summand, add Gaussian noise to their sum, divide by a public cohort size.

    Formal guarantee: one client changes the sum by at most ``clip`` in L2 norm, because every client counts once and
    the divisor does not depend on the data; so the noise's deviation is ``clip * noise_multiplier``. A summand that
    is not finite counts as zero. The guarantee needs ``key``; the seeded noise without it is for simulations.
    McMahan et al. 2018, Learning Differentially Private Recurrent Language Models, https://arxiv.org/abs/1710.06963.

    Args:
        strategy: any whose reduction is a sum.
        clip: the L2 bound of one client's summand, all of its leaves but ``weight`` together.
        noise_multiplier: the noise's deviation in units of ``clip``.
        cohort: the public number of clients to divide by, whoever replied.
        seed: of a simulation's noise, used where ``key`` is None.
        key: 32 secret bytes; each round's noise is derived from them, so one key must serve one run only.

    Raises:
        ConfigError: if the strategy's reduction is not a sum, and so has no such bound, or a number is out of range.
    """
    if not strategy.reduce.is_sum:
        raise ConfigError(
            "strategy: only a strategy that sums its summands can be made private; this one reduces otherwise"
        )
    for name, value in (("clip", clip), ("cohort", cohort)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name}: {value} must be positive and finite")
    if not 0 <= noise_multiplier < float("inf"):
        raise ConfigError(f"noise_multiplier: {noise_multiplier} must be at least 0 and finite")

    def report(local: Local) -> tuple[Tree, Tree]:
        summand, memory = strategy.report(local._replace(num_examples=local.num_examples * 0 + 1))
        values = {k: v for k, v in summand.items() if k != "weight"}
        return tree.clip(values, clip) | {"weight": local.num_steps * 0 + 1}, memory

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        std, values = clip * noise_multiplier, {k: v for k, v in total.items() if k != "weight"}
        # without a key the Csprng is seeded, and so is reproducible but not secret
        secret = key or seeds.generator(seed, "site noise").initial_seed().to_bytes(32, "little")
        rng = Csprng(secret).derive(f"site/{round}")  # and a stream of its own for each leaf: a file keeps no order
        noisy = {path: rng.derive(path).add_normal(x, std) for path, x in tree.flatten(values).items()}
        return strategy.apply(state, tree.unflatten(noisy) | {"weight": total["weight"] * 0 + cohort}, round)

    return strategy._replace(report=report, apply=apply, sensitivity=clip)
