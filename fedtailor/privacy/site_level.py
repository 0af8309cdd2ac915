"""Site-level differential privacy as a wrapper around any strategy whose summands are summed."""

from collections.abc import Sequence

import torch

from fedtailor import seeds, tree
from fedtailor.errors import ConfigError
from fedtailor.privacy import adaptive as following
from fedtailor.privacy.csprng import Csprng, add_normals
from fedtailor.strategy import Local, Strategy
from fedtailor.study import AdaptiveClip
from fedtailor.tree import Tree
from fedtailor.treefile import Flat, slices_of, spec_of

EXTRAS = ("weight", "within")  # what a summand holds beside its values
SHORT = 1 - 2.0**-20  # a clip is missed by a rounding of float32; then it is missed downwards


def private(
    strategy: Strategy,
    *,
    clip: float,
    noise_multiplier: float,
    cohort: int,
    adaptive: AdaptiveClip | None = None,
    mixture: Sequence[float] = (1.0,),
    seed: int = 0,
    key: bytes | None = None,
) -> Strategy:
    """Clip each summand, add Gaussian noise to their sum, divide by a public cohort size.

    Formal guarantee: one client changes the sum by at most ``clip`` in L2 norm, because every client counts once and
    the divisor does not depend on the data; so the noise's deviation is ``clip * noise_multiplier``. A summand that
    is not finite counts as zero. The guarantee needs ``key``; the seeded noise without it is for simulations.
    McMahan et al. 2018, Learning Differentially Private Recurrent Language Models, https://arxiv.org/abs/1710.06963.

    Args:
        strategy: any whose reduction is a sum.
        clip: the L2 bound of one client's summand, all of its leaves but ``weight`` together; the first, if adaptive.
        noise_multiplier: the noise's deviation in units of ``clip``, for the values and the count of ``adaptive`` together.
        cohort: the public number of clients to divide by, whoever replied.
        adaptive: how the clip follows the clients' norms, see :mod:`fedtailor.privacy.adaptive`; the state and the cast
            hold it, and a summand says in one bit, ``within``, whether it was clipped.
        mixture: how much of the draws of the last rounds is in one round's noise, see
            :mod:`fedtailor.privacy.correlated`; each draw has the deviation ``clip * noise_multiplier``.
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
    if adaptive is not None:
        if len(mixture) > 1:
            raise ConfigError("adaptive: noise that is scaled anew each round cannot be taken back by a later one")
        return _adaptive(strategy, clip, noise_multiplier, cohort, adaptive, _secret(seed, key))
    secret = _secret(seed, key)

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        noisy = _noised(_values(total), secret, round, clip * noise_multiplier, mixture)
        return strategy.apply(state, noisy | {"weight": total["weight"] * 0 + cohort}, round)

    def report(local: Local) -> tuple[Tree, Tree]:
        summand, memory = _once(strategy, local)
        return tree.clip(_values(summand), clip * SHORT) | {"weight": local.num_steps * 0 + 1}, memory

    return strategy._replace(report=report, apply=apply, sensitivity=clip)


def _adaptive(
    strategy: Strategy, first: float, noise_multiplier: float, cohort: int, adaptive: AdaptiveClip, secret: bytes
) -> Strategy:
    count_noise = adaptive.count_noise or following.count_noise(noise_multiplier, cohort)
    values_noise = following.values_noise(noise_multiplier, count_noise)

    def report(local: Local) -> tuple[Tree, Tree]:
        summand, memory = _once(strategy, local)
        values, clip = _values(summand), local.cast["clip"]
        within = following.bit(tree.norm(values), clip)
        clipped = tree.clip(values, clip.double() * SHORT)
        return clipped | {"weight": local.num_steps * 0 + 1, "within": within}, memory

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        clip, inside = state["clip"], {k: v for k, v in state.items() if k != "clip"}
        noisy = _noised(_values(total), secret, round, float(clip) * values_noise, (1.0,))
        bits = _noised({"within": total["within"]}, secret, round, count_noise, (1.0,))["within"]
        after = strategy.apply(inside, noisy | {"weight": total["weight"] * 0 + cohort}, round)
        return after | {"clip": following.moved(clip, bits, cohort, adaptive.quantile, adaptive.lr, first)}

    def broadcast(state: Tree) -> Tree:
        cast = strategy.broadcast({k: v for k, v in state.items() if k != "clip"})
        return cast | {"clip": state["clip"]}

    return strategy._replace(
        init=lambda params: strategy.init(params) | {"clip": torch.tensor(first)},
        broadcast=broadcast,
        report=report,
        apply=apply,
        sensitivity=first * following.REACH,  # the most that the clip may become
    )


def within_bound(summand: Flat, clip: float) -> bool:
    """Whether a client's summand, by path, is one that :func:`private` reports for this clip.

    The other clients' privacy does not rest on it, but the model and the next clip do. Pieces are looked at one by one.
    """
    paths = spec_of(summand)
    values = (piece for path in paths if path not in EXTRAS for piece in slices_of(summand, path))
    short = float(sum(torch.linalg.vector_norm(x.double()) ** 2 for x in values)) ** 0.5 <= clip * (1 + 1e-6)
    weight, within = (float(next(slices_of(summand, path))) if path in paths else 0.0 for path in ("weight", "within"))
    return short and weight == 1 and abs(within) <= 0.5


def _once(strategy: Strategy, local: Local) -> tuple[Tree, Tree]:
    """The report of a client that counts once, whatever it holds."""
    return strategy.report(local._replace(num_examples=local.num_examples * 0 + 1))


def _values(summand: Tree) -> Tree:
    return {k: v for k, v in summand.items() if k not in EXTRAS}


def _secret(seed: int, key: bytes | None) -> bytes:
    """Without a key the noise is seeded, and so is reproducible but not secret."""
    return key or seeds.generator(seed, "site noise").initial_seed().to_bytes(32, "little")


def _noised(total: Tree, secret: bytes, round: int, std: float, mixture: Sequence[float]) -> Tree:
    """``total`` with the noise of a round: the same again whenever, and wherever, it is asked for."""
    rng = Csprng(secret)
    draws = [(rng.derive(f"site/{round - back}"), std * share) for back, share in enumerate(mixture[: round + 1])]
    noisy = {  # each leaf has a stream of its own: a file keeps no order
        path: add_normals(x, [(draw.derive(path), factor) for draw, factor in draws])
        for path, x in tree.flatten(total).items()
    }
    return tree.unflatten(noisy)
