"""A study's plan: names and numbers, never code. It is what an operator submits, a site judges, and a simulator runs."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]  # safe as a file name and in a log
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256
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
