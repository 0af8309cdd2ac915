"""A site's own rules, and what they say of a plan. Pure: the daemon, a rehearsal and the simulator ask the same code.

There is no default policy: a site without one refuses everything. The coordinator can neither read nor loosen it.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, PositiveInt, model_validator

from fedtailor.errors import ConfigError, RefusedError
from fedtailor.plugins import Code
from fedtailor.privacy.accounting import MIN_NOISE, Charge, affordable, epsilon
from fedtailor.privacy.site_accounting import epsilon_after
from fedtailor.study import Digest, Frozen, Name, Plan, SitePrivacy

Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64,512}$")]  # as `fedtailor client officer` prints it
Clock = Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]


class Hours(Frozen):
    """A window of the day in the site's own time; one that ends before it begins runs past midnight."""

    begin: Clock
    end: Clock

    def open_at(self, moment: datetime) -> bool:
        """Whether ``moment`` lies in the window.

        >>> Hours(begin="22:00", end="06:00").open_at(datetime(2026, 1, 1, 23, 30))
        True
        """
        now = moment.strftime("%H:%M")
        if self.begin <= self.end:
            return self.begin <= now < self.end
        return now >= self.begin or now < self.end


class Policy(Frozen):
    """What a site allows."""

    studies: Annotated[tuple[Name, ...], Field(min_length=1)]  # the studies it takes part in, by name
    epsilon: Annotated[float, Field(gt=0)]  # the most that the data set may ever spend, all studies together
    delta: Annotated[float, Field(gt=0, lt=0.1)]
    epsilon_per_study: Annotated[float, Field(gt=0)] | None = None  # the most that one study may spend
    least_noise: Annotated[float, Field(ge=0)] = 0.0  # noise multiplier
    greatest_clip: Annotated[float, Field(gt=0)] | None = None
    without_privacy: bool = False  # whether a study without differential privacy may train here
    recipes: tuple[str, ...] | None = None  # by their last name, as in fedtailor.recipes.tabular; None: any installed
    strategies: tuple[str, ...] | None = None  # and each that one of them wraps
    plugins: dict[Name, Digest] = {}  # third-party code that may run here, as `fedtailor plugins` prints it
    max_rounds: PositiveInt = 1000
    max_steps: PositiveInt = 10_000  # in one round
    minimum_cohort: PositiveInt = 1  # a round must count only with at least this many sites
    partners: tuple[Name, ...] | None = None  # who may take part beside this site; None: anyone
    metrics: bool = True  # whether metrics of the held-out part may leave; they are exact, unless:
    metric_noise: Annotated[float, Field(ge=MIN_NOISE)] | None = None  # only accuracy leaves, noised and charged
    minimum_count: PositiveInt = 10  # fewer held-out rows than this, and no metric leaves
    greatest_norm: Annotated[float, Field(gt=0)] | None = None  # of one answer: L2, all tensors together
    max_download_mb: PositiveInt = 2048  # of one message
    max_upload_mb: PositiveInt = 2048  # of one answer
    task_seconds: PositiveInt = 3600  # of one task of the training process: its data described, or one visit
    task_memory_mb: PositiveInt = 8192  # of the training process; what passes either limit is ended and declined
    hours: Hours | None = None  # when work may begin; None: at any time
    approval: Literal["person", "policy"] = "person"  # who admits a study that the other rules allow
    officers: tuple[Key, ...] = ()  # their public keys; with any, a study is approved by their signatures only
    officers_needed: PositiveInt = 1  # how many of them
    hold: Literal["nothing", "each", "last"] = "nothing"  # answers that a person releases one by one

    @model_validator(mode="after")
    def _officers_suffice(self) -> "Policy":
        if self.officers and not self.officers_needed <= len(set(self.officers)):
            raise ValueError(
                f"officers_needed: {self.officers_needed} is more than the {len(set(self.officers))} officers"
            )
        return self


class Rule(NamedTuple):
    """One line of a verdict."""

    code: str  # the word that leaves the site if the rule refuses
    what: str  # in plain words
    asked: str
    allowed: str
    ok: bool


class Case(NamedTuple):
    """What a plan is judged against, beside the policy."""

    site: str
    spent: Sequence[Charge]  # what other runs have charged to the data set
    answer_bytes: int  # of one answer, at most
    models: int = 1  # that an evaluation measures
    plugins: Sequence[Code] = ()  # third-party code that the plan runs, as it is installed here


def charge_of(plan: Plan) -> Charge | None:
    """What one round of a plan costs the data set, or None where no record is hidden, though perhaps the site is."""
    if plan.record is None:
        return None
    if plan.record.noise_multiplier is None:
        raise RefusedError("the plan does not say how much noise to add (privacy.noise_multiplier)", code="plan")
    return Charge(plan.record.noise_multiplier, plan.local.rate, plan.local.steps)


def metric_charge(policy: Policy) -> Charge | None:
    """What one noised metric costs: the Gaussian mechanism on a mean of zeros and ones, without sampling.

    Neighbours: one record counts as zero, so that the mean of n records moves by at most 1/n; its noise is
    ``metric_noise / n``. None where the policy does not noise metrics.
    """
    return Charge(policy.metric_noise, 1.0, 1) if policy.metrics and policy.metric_noise is not None else None


def charges_of(policy: Policy, plan: Plan, models: int = 1) -> list[Charge]:
    """Everything that a study would charge to the data set: its training, and its metrics where they are noised.

    A study asks for metrics in rounds and at the end, of one model or two, and of the model trained alone.
    """
    training, metric = charge_of(plan), metric_charge(policy)
    evaluations = models * (len(range(0, plan.rounds, plan.evaluation.every)) + 1) + plan.evaluation.baseline
    charges = [training] * plan.rounds if training is not None else []
    return charges + ([metric] * evaluations if metric is not None else [])


def verdict(policy: Policy, plan: Plan, case: Case) -> list[Rule]:
    """Every rule that bears on ``plan``, whether it holds or not."""
    others = [site for site in plan.sites if site != case.site]
    rules = [
        _rule("roster", "this site is listed", case.site in plan.sites, ", ".join(plan.sites), case.site),
        *judge_plugins(policy.plugins, case.plugins),
        _rule("study", "the study", plan.study in policy.studies, plan.study, ", ".join(policy.studies)),
        _among("recipe", "the recipe", plan.recipe.names()[:1], policy.recipes),
        _among("strategy", "the strategy", plan.strategy.names(), policy.strategies),
        _among("partners", "who else takes part", others, policy.partners),
        _least("cohort", "sites behind a round, at least", plan.quorum, policy.minimum_cohort),
        _most("rounds", "rounds", plan.rounds, policy.max_rounds),
        _most("steps", "local steps a round", plan.local.steps, policy.max_steps),
        _most("upload", "megabytes of one answer", round(case.answer_bytes / 2**20, 3), policy.max_upload_mb),
    ]
    if policy.greatest_norm is not None:
        asked = f"{plan.norm:g}" if plan.norm is not None else "no bound"
        ok = plan.norm is not None and plan.norm <= policy.greatest_norm
        rules.append(_rule("norm", "L2 norm of one answer", ok, asked, f"at most {policy.greatest_norm:g}"))
    return rules + (_without(policy, plan, case) if plan.record is None else _privacy(policy, plan, case))


def judge_plugins(approved: Mapping[str, str], codes: Sequence[Code]) -> list[Rule]:
    """A rule for each plug-in that a plan runs: the site has approved it, as it is now."""
    rules = []
    for code in codes:
        known = approved.get(code.name)
        if not code.sha256:
            allowed = (
                "what is installed and approved here: ask the operator for the package, then see fedtailor plugins"
            )
        elif known is None:
            allowed = "what policy.plugins lists: read its code, then add the line that fedtailor plugins prints"
        elif known != code.sha256:
            allowed = f"sha256 {known}: it has changed since, so read it again and see fedtailor plugins"
        else:
            allowed = "as approved"
        rules.append(_rule("plugin", "third-party code", bool(known) and known == code.sha256, str(code), allowed))
    return rules


def _without(policy: Policy, plan: Plan, case: Case) -> list[Rule]:
    allowed = "allowed" if policy.without_privacy else "not allowed"
    asked = "none" if plan.site is None else "of the whole site, by noise that the coordinator adds; none of a record"
    rules = [_rule("privacy", "differential privacy", policy.without_privacy, asked, f"none is {allowed}")]
    if plan.site is not None:
        rules.append(_of_site(plan, plan.site))
    if metric_charge(policy) is not None:
        rules.append(_budget(policy, plan, case, policy.delta))
    return rules


def _of_site(plan: Plan, stated: SitePrivacy) -> Rule:
    """Whether a site-level promise is what its noise gives. No cap of this policy is on it: those are of records."""
    try:
        whole = epsilon_after(stated, plan.rounds)
    except (ConfigError, ArithmeticError) as error:  # no epsilon can be worked out
        raise RefusedError(str(error), code="plan") from error
    return _most(
        "epsilon", "the epsilon of one site by the coordinator's noise, against its promise", whole, stated.epsilon
    )


def _budget(policy: Policy, plan: Plan, case: Case, delta: float) -> Rule:
    """What the data set would have spent when the study is over."""
    charges, training = charges_of(policy, plan, case.models), charge_of(plan)
    total = epsilon([*case.spent, *charges], delta)
    rule = _most("budget", "epsilon of the data set over all studies", total, policy.epsilon)
    if not rule.ok and training is not None:
        rounds = affordable([*case.spent, *charges[plan.rounds :]], training, policy.epsilon, delta)
        rule = rule._replace(allowed=f"{rule.allowed}, which is enough for {rounds} such rounds")
    return rule


def _privacy(policy: Policy, plan: Plan, case: Case) -> list[Rule]:
    assert plan.record is not None
    stated, noise = plan.record, plan.record.noise_multiplier
    if noise is not None and noise < MIN_NOISE:  # no epsilon can be worked out for so little: nothing else matters
        return [_least("noise", "noise multiplier", noise, max(policy.least_noise, MIN_NOISE))]
    charge = charge_of(plan)
    assert charge is not None
    whole = epsilon([charge] * plan.rounds, stated.delta)
    rules = [
        _least("noise", "noise multiplier", charge.noise_multiplier, policy.least_noise),
        _most("delta", "delta", stated.delta, policy.delta),
        _most("epsilon", "the study's epsilon by its noise, against its promise", whole, stated.epsilon),
        _budget(policy, plan, case, stated.delta),
    ]
    if policy.greatest_clip is not None:
        rules.append(_most("clip", "clip", stated.clip, policy.greatest_clip))
    if policy.epsilon_per_study is not None:
        rules.append(_most("epsilon-per-study", "epsilon of one study", whole, policy.epsilon_per_study))
    return rules


def refuse(rules: Sequence[Rule]) -> None:
    """Raise for the first rule that does not hold.

    Raises:
        RefusedError: with the rule's code; its text, for the site's people, says what is asked and what is allowed.
    """
    for rule in rules:
        if not rule.ok:
            raise RefusedError(f"{rule.what}: the plan asks {rule.asked}; allowed is {rule.allowed}", code=rule.code)


def _rule(code: str, what: str, ok: bool, asked: str, allowed: str) -> Rule:
    return Rule(code, what, asked, allowed, ok)


def _among(code: str, what: str, asked: Sequence[str], allowed: Sequence[str] | None) -> Rule:
    ok = allowed is None or set(asked) <= set(allowed)
    return Rule(code, what, ", ".join(asked) or "nobody", "any" if allowed is None else ", ".join(allowed), ok)


def _most(code: str, what: str, asked: float, allowed: float) -> Rule:
    return Rule(code, what, f"{asked:.6g}", f"at most {allowed:g}", asked <= allowed * (1 + 1e-9))


def _least(code: str, what: str, asked: float, allowed: float) -> Rule:
    return Rule(code, what, f"{asked:.6g}", f"at least {allowed:g}", asked >= allowed)


def open_now(policy: Policy, moment: datetime) -> None:
    """Refuse outside the policy's hours.

    Raises:
        RefusedError: code ``hours``.
    """
    if policy.hours is not None and not policy.hours.open_at(moment):
        window = f"{policy.hours.begin} to {policy.hours.end}"
        raise RefusedError(f"it is {moment:%H:%M}; policy.hours allows work from {window}", code="hours")
