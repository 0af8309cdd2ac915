"""From a privacy target to a plan that says how much noise every site adds."""

from fedtailor.config import build
from fedtailor.errors import ConfigError
from fedtailor.privacy.accounting import calibrate
from fedtailor.strategy import Strategy
from fedtailor.study import Plan
from fedtailor.training import NO_LOSS


def resolve(plan: Plan) -> Plan:
    """Fill in ``privacy.noise_multiplier`` so that all rounds together meet epsilon and delta; never less noise.

    A plan that has one already, or has no privacy, is returned as it is: every site judges it by itself.

    Raises:
        ConfigError: if the plan's privacy does not cover what its strategy needs.
    """
    if plan.privacy is not None and build(plan.strategy, Strategy).needs_loss:
        raise ConfigError(NO_LOSS)
    if plan.buffer is not None and not build(plan.strategy, Strategy).reduce.is_sum:
        raise ConfigError("buffer: a late answer counts less, which only a strategy that sums its summands can do")
    if plan.privacy is None or plan.privacy.noise_multiplier is not None:
        return plan
    steps = plan.rounds * plan.local.steps
    noise = calibrate(plan.privacy.epsilon, plan.privacy.delta, plan.local.rate, steps)
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"noise_multiplier": noise})})
