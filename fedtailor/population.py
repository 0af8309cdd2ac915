"""A population of virtual clients, as settings name it: all sites' training rows, dealt out to more clients than sites."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


class Population(BaseModel):
    """How rows are dealt out, and how many clients a round asks. Other fields are the partition's own: ``alpha: 0.3``."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    partition: Literal[
        "iid", "dirichlet_split", "dirichlet_mixture", "shards", "pathological", "quantity", "drawn", "natural"
    ]
    clients: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None  # None: as many as the data have, if natural
    cohort: PositiveInt  # clients of a round; on average, where privacy is of whole clients: those rounds are drawn
    answers: PositiveInt | None = None  # that close a round, where the plan has a buffer; None: as many as it says
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # the chance that a client that was asked does not answer
    step_s: PositiveFloat | None = None  # virtual seconds of the median client's local step; None: no clock
    step_spread: Annotated[float, Field(ge=0, le=5)] = 0.0  # of its logarithm, over the clients
    devices: str | None = None  # in the place of both, a JSON file of real devices' speeds and lines
    availability: str | None = None  # a JSON file that says when devices are there; None: always

    @model_validator(mode="after")
    def _within(self) -> Self:
        if self.clients is None and self.partition != "natural":
            raise ValueError("clients: null is for population=natural, whose data have a number of their own; give one")
        if self.clients is not None and self.cohort > self.clients:
            raise ValueError(f"cohort: {self.cohort} is more than all {self.clients} clients")
        return self

    @model_validator(mode="after")
    def _by_one_clock(self) -> Self:
        if self.devices is not None and (self.step_s is not None or self.step_spread):
            raise ValueError(
                "devices, step_s, step_spread: the file has every device's own speed; use it, or the others"
            )
        if self.availability is not None and not self.timed:
            raise ValueError("availability: there is no clock to go by; give step_s or devices too")
        return self

    @property
    def timed(self) -> bool:
        """Whether there is a virtual clock."""
        return self.step_s is not None or self.devices is not None

    @property
    def options(self) -> dict[str, Any]:
        """What the partition is told beside the number of clients."""
        return dict(self.model_extra or {})

    @property
    def many(self) -> int:
        """How many clients there are; known once the data are."""
        assert self.clients is not None
        return self.clients

    def made(self, said: Mapping[str, Any] | None) -> bool:
        """Whether a result that says ``said`` of its population is of these settings."""
        return said is not None and self.model_dump() == dict(said) | ({} if self.clients else {"clients": None})
