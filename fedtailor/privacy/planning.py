"""From a privacy target to a plan that says how much noise is added, and to the strategy that adds it."""

from typing import NamedTuple

from fedtailor.config import build
from fedtailor.errors import ConfigError
from fedtailor.optimizers import optimizer_of
from fedtailor.privacy.accounting import calibrate
from fedtailor.privacy.site_accounting import calibrated, mixture_of
from fedtailor.privacy.site_level import private
from fedtailor.recipe import Recipe, shapes
from fedtailor.strategy import Strategy
from fedtailor.study import Plan
from fedtailor.training import NO_LOSS

NO_DIVISOR = (
    "strategy: it weights each site by the loss of its training rows, so that what it divides by is no public number and "
    "site-level privacy (privacy.unit=site) has nothing fixed to divide by; choose another strategy, or privacy=none"
)

NOT_PLAIN = (
    "local.optimizer: {}, but this strategy takes a site's change for its learning rate times the sum of its gradients, "
    "which is so without momentum, weight decay and scaling only; local.optimizer=sgd, or another strategy"
)


class Sampling(NamedTuple):
    """Who is in a simulated round: a Poisson sample of many clients, which nobody but the coordinator sees."""

    cohort: int  # clients of a round; site-level privacy divides by it
    rate: float  # at which each client is drawn; 1: no amplification is claimed


def resolve(plan: Plan, sampling: Sampling | None = None) -> Plan:
    """Fill in ``privacy.noise_multiplier`` so that all rounds together meet epsilon and delta; never less noise.

    What else a site-level plan leaves open is filled in too. A plan that has all, or has no privacy, is returned as it
    is: every site judges it by itself.

    Args:
        sampling: of a simulation whose clients are more than the plan's sites.

    Raises:
        ConfigError: if the plan's privacy does not cover what its strategy needs.
    """
    if plan.site is not None:
        asked = sampling or Sampling(cohort(plan), 1.0)
        resolved = plan.model_copy(update={"privacy": calibrated(plan.site, plan.rounds, asked.cohort, asked.rate)})
        strategy_of(resolved, sampling=sampling)
        return resolved
    if plan.record is not None and build(plan.strategy, Strategy).needs_loss:
        raise ConfigError(NO_LOSS)
    strategy_of(plan)
    if plan.record is None or plan.record.noise_multiplier is not None:
        return plan
    steps = plan.rounds * plan.local.steps
    noise = calibrate(plan.record.epsilon, plan.record.delta, plan.local.rate, steps)
    return plan.model_copy(update={"privacy": plan.record.model_copy(update={"noise_multiplier": noise})})


def cohort(plan: Plan) -> int:
    """What site-level privacy divides by: the most sites of a round, whoever of them replies."""
    return len(plan.asked(0))


def strategy_of(plan: Plan, key: bytes | None = None, sampling: Sampling | None = None) -> Strategy:
    """The strategy that a plan names; made private where its unit is a site. Server, site and simulator build it here.

    Args:
        key: 32 secret bytes for the coordinator's noise. Without it the noise is seeded by the plan: for the sites,
            which only clip, and for simulations.
        sampling: of a simulation whose clients are more than the plan's sites.

    Raises:
        ConfigError: if the strategy cannot be made private, or the plan does not say how much noise to add.
    """
    strategy, privacy = build(plan.strategy, Strategy), plan.site
    if plan.buffer is not None:
        _takes_late_answers(strategy, plan)
    if strategy.plain_sgd and not optimizer_of(plan.local).plain:
        raise ConfigError(NOT_PLAIN.format(plan.local.optimizer.name))
    if privacy is None:
        return strategy
    if strategy.needs_loss:
        raise ConfigError(NO_DIVISOR)
    if privacy.noise_multiplier is None:
        raise ConfigError("privacy.noise_multiplier: null; the plan does not say how much noise to add")
    return private(
        strategy,
        clip=privacy.clip,
        noise_multiplier=privacy.noise_multiplier,
        cohort=sampling.cohort if sampling else cohort(plan),
        adaptive=privacy.adaptive,
        mixture=mixture_of(privacy.correlated),
        seed=plan.seed,
        key=key,
    )


def _takes_late_answers(strategy: Strategy, plan: Plan) -> None:
    if not strategy.reduce.is_sum:
        raise ConfigError("buffer: a late answer counts less, which only a strategy that sums its summands can do")
    if strategy.personal is None and strategy.remember(shapes(build(plan.recipe, Recipe))):
        raise ConfigError(
            "buffer: a late answer counts less, but this strategy's sites remember it as if it had counted whole; choose "
            "one without a memory, or buffer=null"
        )
