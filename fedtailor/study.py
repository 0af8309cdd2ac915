"""A study's plan: names and numbers, never code. It is what an operator submits, a site judges, and a simulator runs."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]  # safe as a file name and in a log
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256
Rate = Annotated[float, Field(ge=1e-9, le=1)]  # of less, the steps of a pass could not be counted
Decay = Annotated[float, Field(ge=0, lt=1)]
Deviation = Annotated[float, Field(ge=1e-9, le=1e6)]


class Frozen(BaseModel):
    """A plain, immutable value that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Spec(BaseModel):
    """A factory and its arguments, as YAML names them: ``{_target_: fedtailor.strategies.fedprox, mu: 0.1}``."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, populate_by_name=True)
    target: str = Field(alias="_target_")

    def names(self) -> list[str]:
        """The last name of the factory, then those of the ones inside it: a strategy may wrap another, ``of``.

        >>> Spec.model_validate({"_target_": "fedtailor.strategies.krum", "of": {"name": "fedprox", "mu": 1}}).names()
        ['krum', 'fedprox']
        """
        found, inside = [self.target.rpartition(".")[2]], (self.model_extra or {}).get("of")
        while inside is not None:
            found.append(str(inside.get("name") if isinstance(inside, dict) else inside))
            inside = inside.get("of") if isinstance(inside, dict) else None
        return found


class Sgd(Frozen):
    """By the names and meanings of ``torch.optim.SGD``."""

    name: Literal["sgd"] = "sgd"
    momentum: Decay = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _nesterov_looks_ahead(self) -> "Sgd":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: true, but momentum is 0; give it one, 0.9 say")
        return self


class Adam(Frozen):
    """By the names and meanings of ``torch.optim.Adam``: weight decay goes through the gradient."""

    name: Literal["adam"] = "adam"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0


class AdamW(Frozen):
    """By the names and meanings of ``torch.optim.AdamW``: weights decay by themselves."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01


def _named(optimizer: Any) -> str:
    return f"name={optimizer.get('name') if isinstance(optimizer, dict) else getattr(optimizer, 'name', None)}"


_OTHER = "name is none of sgd, adam and adamw"
OptimizerPlan = Annotated[
    Annotated[Sgd, Tag("name=sgd")] | Annotated[Adam, Tag("name=adam")] | Annotated[AdamW, Tag("name=adamw")],
    Discriminator(_named, custom_error_type="name", custom_error_message=_OTHER),
    BeforeValidator(lambda given: {"name": given} if isinstance(given, str) else given),
]


class LocalTraining(Frozen):
    """What a site does in one round: a public number of steps, each on a public share of its rows."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)]
    rate: Rate
    sampling: Literal["poisson", "shuffled"] = "poisson"  # each row by chance; or all in turn, in an order drawn anew
    lr: PositiveFloat
    within_s: PositiveFloat | None = None  # a site that is slower takes fewer steps, one at least; None: all of them
    optimizer: OptimizerPlan = Sgd()  # a name, or a mapping with its settings; it begins anew in every round

    @model_serializer(mode="wrap")
    def _usual_goes_without_saying(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What every plan once did is not in its text, so that such a plan has the digest that it had."""
        found: dict[str, Any] = dump(self)
        usual = {"optimizer": self.optimizer == Sgd(), "sampling": self.sampling == "poisson"}
        return {name: value for name, value in found.items() if not usual.get(name, False)}

    @property
    def epoch(self) -> int:
        """The steps that see every row once, where rows are shuffled."""
        return round(1 / self.rate)

    @property
    def poisson_rate(self) -> float | None:
        """The rate by which a step's sum is divided, with the number of rows; None: by the number that the step sees."""
        return self.rate if self.sampling == "poisson" else None


class Buffer(Frozen):
    """Rounds that do not wait for everybody: who is slow answers a later round, and counts less for it.

    Nguyen et al. 2022, Federated Learning with Buffered Asynchronous Aggregation, https://arxiv.org/abs/2106.06639. Unlike
    there, a quorum of a round's answers must be to that round's own model: it is what a site's minimum cohort rests on.
    """

    answers: PositiveInt  # that close a round, a quorum of them to its own question
    exponent: NonNegativeFloat = 0.5  # an answer t rounds late counts (1 + t) ** -exponent
    oldest: PositiveInt = 10  # rounds late, and it does not count at all

    def weight(self, late: int) -> float:
        """How much an answer counts.

        >>> Buffer(answers=3).weight(0), Buffer(answers=3).weight(3)
        (1.0, 0.5)
        """
        return float((1 + late) ** -self.exponent)


class RecordPrivacy(Frozen):
    """Record-level DP-SGD at each site. ``epsilon`` covers the whole study, every round of it, by PLD accounting."""

    unit: Literal["record"] = "record"
    epsilon: PositiveFloat
    delta: Annotated[float, Field(gt=0, lt=0.1)]
    clip: PositiveFloat
    noise_multiplier: PositiveFloat | None = None  # None: calibrated from epsilon, delta, rate, steps and rounds


class AdaptiveClip(Frozen):
    """A clip that follows a quantile of the sites' norms; both the clip and its path are public."""

    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5  # the share of sites that are not to be clipped
    lr: PositiveFloat = 0.2  # how far the logarithm of the clip moves where the share is off by one
    count_noise: Deviation | None = None  # of the noise on the number of unclipped sites; None: chosen


class CorrelatedNoise(Frozen):
    """Noise that later rounds take back in part, for sites that take part in turn."""

    separation: PositiveInt  # a site is asked in every separation-th round
    window: Annotated[int, Field(ge=1, le=64)] | None = None  # rounds whose noise is in one round's; None: the best

    @model_validator(mode="after")
    def _sites_take_turns(self) -> "CorrelatedNoise":
        if self.separation < 2:
            raise ValueError(
                "separation: 1, every site in every round; correlated noise is no better then than independent noise: "
                "leave correlated out, or let sites take turns"
            )
        return self


class SitePrivacy(Frozen):
    """Site-level privacy: the coordinator adds the noise. ``epsilon`` covers the whole study, by PLD accounting."""

    unit: Literal["site"]
    epsilon: PositiveFloat
    delta: Annotated[float, Field(gt=0, lt=0.1)]
    clip: Annotated[float, Field(gt=0, le=1e6)]  # of one site's summand, in L2 norm; where it is adaptive, the first
    noise_multiplier: Deviation | None = None  # None: calibrated from epsilon, delta and rounds
    adaptive: AdaptiveClip | None = None
    correlated: CorrelatedNoise | None = None

    @model_validator(mode="after")
    def _noise_can_be_taken_back(self) -> "SitePrivacy":
        if self.adaptive is not None and self.correlated is not None:
            raise ValueError(
                "adaptive, correlated: noise that is scaled anew each round cannot be taken back; choose one of the two"
            )
        return self


def _unit(privacy: Any) -> str:
    named = privacy.get("unit", "record") if isinstance(privacy, dict) else getattr(privacy, "unit", "record")
    return f"unit={named}"


# A tag is no name of a field, so that fedtailor.config.readable can leave it out of where an error is.
Privacy = Annotated[
    Annotated[RecordPrivacy, Tag("unit=record")] | Annotated[SitePrivacy, Tag("unit=site")],
    Discriminator(_unit, custom_error_type="unit", custom_error_message="unit is neither record nor site"),
]


class Evaluation(Frozen):
    """What a site measures on its own held-out part."""

    every: PositiveInt = 1  # rounds
    baseline: bool = True  # also train alone, on the site's own data only, to compare with


class Plan(Frozen):
    """One study, complete: two parties who hold equal plans run the same computation."""

    study: Name
    rounds: Annotated[int, Field(ge=1, le=100_000)]  # a plan comes from the coordinator, and its cost is worked out
    seed: NonNegativeInt = 0
    sites: Annotated[tuple[Name, ...], Field(min_length=1, max_length=10_000)]
    quorum: PositiveInt  # a round counts when at least this many sites replied
    deadline_s: PositiveFloat  # a round closes then, with whoever replied
    buffer: Buffer | None = None  # None: a round waits for all sites until its deadline
    local: LocalTraining
    strategy: Spec
    recipe: Spec
    privacy: Privacy | None
    evaluation: Evaluation = Evaluation()
    norm: PositiveFloat | None = None  # the greatest L2 norm of one answer; None: not bounded

    @model_validator(mode="after")
    def _sites_are_distinct_and_suffice(self) -> "Plan":
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites: {list(self.sites)} names a site twice")
        if self.quorum > len(self.sites):
            raise ValueError(f"quorum: {self.quorum} is more than the {len(self.sites)} sites listed")
        if self.turns() > len(self.sites):
            raise ValueError(f"privacy.correlated.separation: {self.turns()} is more than the {len(self.sites)} sites")
        if (fewest := len(self.sites) // self.turns()) < self.quorum:
            raise ValueError(
                f"quorum: {self.quorum} is more than the {fewest} sites whose turn it is in some round "
                f"(privacy.correlated.separation: {self.turns()})"
            )
        if self.record is not None and self.local.sampling != "poisson":
            raise ValueError("local.sampling: shuffled, but privacy.unit=record counts on Poisson samples; use poisson")
        if self.buffer is not None and not self.quorum <= self.buffer.answers <= len(self.sites):
            asked = f"buffer.answers: {self.buffer.answers} is not from the quorum, {self.quorum}, to all"
            raise ValueError(f"{asked} {len(self.sites)} sites")
        if self.buffer is not None and self.site is not None:
            raise ValueError(
                "buffer, privacy.unit: site-level privacy counts one answer of a site in a round, made with that round's clip; "
                "a round that takes late answers has no such bound: leave buffer out"
            )
        return self

    @property
    def record(self) -> RecordPrivacy | None:
        """The plan's privacy where it hides a record; its noise is added at the sites."""
        return self.privacy if isinstance(self.privacy, RecordPrivacy) else None

    @property
    def site(self) -> SitePrivacy | None:
        """The plan's privacy where it hides a site; its noise is added by the coordinator."""
        return self.privacy if isinstance(self.privacy, SitePrivacy) else None

    def turns(self) -> int:
        """The rounds from one turn of a site to its next: 1 where every site takes part in every round."""
        return self.site.correlated.separation if self.site is not None and self.site.correlated is not None else 1

    def asked(self, round: int) -> tuple[Name, ...]:
        """The sites whose turn it is to train in a round."""
        return tuple(site for place, site in enumerate(self.sites) if (place - round) % self.turns() == 0)

    def previous(self, site: Name, round: int) -> int | None:
        """The last round before ``round`` in which it is a site's turn to train; None where there is none."""
        before = round - 1 - (round - 1 - self.sites.index(site)) % self.turns()
        return before if before >= 0 else None

    def canonical(self) -> str:
        """The plan as text: equal plans give equal bytes."""
        return json.dumps(
            self.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"), allow_nan=False
        )

    def digest(self) -> str:
        """SHA-256 of :meth:`canonical`, hexadecimal."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read a canonical plan; pydantic's ValidationError names what is wrong."""
        raw: Any = json.loads(text)
        return cls.model_validate(raw)
