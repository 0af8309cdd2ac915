"""A study's plan: names and numbers, never code. It is what an operator submits, a site judges, and a simulator runs."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]  # safe as a file name and in a log
Rate = Annotated[float, Field(gt=0, le=1)]


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


class LocalTraining(Frozen):
    """What a site does in one round: a public number of steps, each on a Poisson sample of a public rate."""

    steps: PositiveInt
    rate: Rate
    lr: PositiveFloat
    within_s: PositiveFloat | None = None  # a site that is slower takes fewer steps, one at least; None: all of them


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


class Evaluation(Frozen):
    """What a site measures on its own held-out part."""

    every: PositiveInt = 1  # rounds
    baseline: bool = True  # also train alone, on the site's own data only, to compare with


class Plan(Frozen):
    """One study, complete: two parties who hold equal plans run the same computation."""

    study: Name
    rounds: PositiveInt
    seed: NonNegativeInt = 0
    sites: Annotated[tuple[Name, ...], Field(min_length=1)]
    quorum: PositiveInt  # a round counts when at least this many sites replied
    deadline_s: PositiveFloat  # a round closes then, with whoever replied
    buffer: Buffer | None = None  # None: a round waits for all sites until its deadline
    local: LocalTraining
    strategy: Spec
    recipe: Spec
    privacy: RecordPrivacy | None
    evaluation: Evaluation = Evaluation()
    norm: PositiveFloat | None = None  # the greatest L2 norm of one answer; None: not bounded

    @model_validator(mode="after")
    def _sites_are_distinct_and_suffice(self) -> "Plan":
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites: {list(self.sites)} names a site twice")
        if self.quorum > len(self.sites):
            raise ValueError(f"quorum: {self.quorum} is more than the {len(self.sites)} sites listed")
        if self.buffer is not None and not self.quorum <= self.buffer.answers <= len(self.sites):
            asked = f"buffer.answers: {self.buffer.answers} is not from the quorum, {self.quorum}, to all"
            raise ValueError(f"{asked} {len(self.sites)} sites")
        return self

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
