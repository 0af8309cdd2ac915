"""From a privacy target to a plan that says how much noise every site adds."""

from fedtailor.privacy.accounting import calibrate
from fedtailor.study import Plan


def resolve(plan: Plan) -> Plan:
    """Fill in ``privacy.noise_multiplier`` so that all rounds together meet epsilon and delta; never less noise.

    A plan that has one already, or has no privacy, is returned as it is: every site judges it by itself.
    """
    if plan.privacy is None or plan.privacy.noise_multiplier is not None:
        return plan
    steps = plan.rounds * plan.local.steps
    noise = calibrate(plan.privacy.epsilon, plan.privacy.delta, plan.local.rate, steps)
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"noise_multiplier": noise})})
