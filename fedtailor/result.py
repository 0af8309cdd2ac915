"""A run's result: one versioned document, the same for a deployment and a simulation."""

import hashlib
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt

from fedtailor import store
from fedtailor.recipe import Metrics
from fedtailor.study import Frozen, Privacy, RecordPrivacy
from fedtailor.tree import Params
from fedtailor.treefile import Excerpt, Model, pieces_of

SCHEMA: Literal["fedtailor.result/1"] = "fedtailor.result/1"
Ending = Literal["completed", "stopped", "failed"]
Kind = Literal["local_only", "federated", "personal", "pooled"]  # personal: where each site has a model of its own
COVERS = (
    "everything that depends on one record of a site's training part and left the site as parameters, over all rounds "
    "of this run: the released model among it"
)
NOT_COVERED = (
    "metrics (of the held-out part, and of the model trained alone for comparison), numbers of rows, timing; "
    "they are exact and not private"
)
COVERS_SITE = (
    "all that one site sent as parameters, over all rounds of this run, against whoever sees the models that were cast or "
    "released, the other sites among them"
)
NOT_COVERED_SITE = (
    "anything against the coordinator, which sees each site's parameters as they are and is trusted to add the noise; "
    "metrics (of the held-out part, and of the model trained alone for comparison), numbers of rows, timing, taking part; "
    "they are exact and not private"
)


class Evaluated(Frozen):
    """One evaluated round, in ``history``."""

    round: NonNegativeInt  # rounds trained before it
    sites: dict[str, Metrics]
    metrics: Metrics  # mean over the sites, weighted by training rows


class Dropped(Frozen):
    """One reply that did not count, in ``dropped``."""

    round: NonNegativeInt
    site: str
    code: str  # the word for why


def _checked(kind: type[Frozen]) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Dicts stay dicts, as their makers keep them in checkpoints, but each must be a ``kind``."""
    return lambda items: [kind.model_validate(item).model_dump() for item in items]


class SiteResult(Frozen):
    """One site."""

    rows: NonNegativeInt  # training and held-out part together
    metrics: dict[Kind, Metrics]  # None: not estimable, which is not zero
    epsilon: NonNegativeFloat | None  # what this run cost this site, by its unit; None: no privacy
    bytes_sent: NonNegativeInt  # of a simulation: of the payloads that a deployment would have, without their heads
    bytes_received: NonNegativeInt


class PrivacyResult(Frozen):
    """What is promised, exactly."""

    unit: Literal["record", "site"]
    delta: float
    epsilon_max: NonNegativeFloat  # the greatest over the sites
    epsilon_budget: NonNegativeFloat | None = None  # what the plan allows the whole study at each site
    accountant: str
    covers: str = COVERS
    not_covered: str = NOT_COVERED


class Timing(Frozen):
    """Seconds."""

    wall_s: NonNegativeFloat
    setup_s: NonNegativeFloat
    round_s: list[NonNegativeFloat]  # each round, in order
    virtual_s: list[NonNegativeFloat] = []  # each round by the clock of a simulated population
    work_s: list[NonNegativeFloat] = []  # the slowest site's own work in each round


class Transport(Frozen):
    """What protected the connections."""

    tls: bool
    mutual_tls: bool
    node_auth: bool


class ModelFile(Frozen):
    """The released parameters, a safetensors file."""

    path: str
    sha256: str
    parameters: NonNegativeInt


class Result(BaseModel):
    """``result.json``. Numbers are finite; unknown fields are refused; ``schema`` changes when the meaning of one does.

    Read one with ``Result.model_validate_json(text)``, write it with ``.model_dump_json(by_alias=True)``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)
    schema_: Literal["fedtailor.result/1"] = Field(default=SCHEMA, alias="schema")
    study: str
    strategy: str
    rounds: NonNegativeInt
    sites: dict[str, SiteResult]
    metrics: dict[Kind, Metrics]  # means over sites, weighted by training rows
    privacy: PrivacyResult | None
    timing: Timing
    transport: Transport | None
    engine: str  # "flower": a deployment; "simulation", "flower simulation", "flwr run"
    seed: NonNegativeInt
    model: ModelFile
    versions: dict[str, str]
    status: Ending = "completed"
    dropped: Annotated[list[dict[str, Any]], AfterValidator(_checked(Dropped))] = []  # each a Dropped
    population: dict[str, Any] | None = None  # of a simulation with more clients than sites: how rows were dealt out
    simulation: dict[str, Any] | None = None  # its settings that change a result and are in no plan
    history: Annotated[list[dict[str, Any]], AfterValidator(_checked(Evaluated))] = []  # each an Evaluated


def weighted(by_site: Mapping[str, Metrics], rows: Mapping[str, int]) -> Metrics:
    """Means over the sites where a metric is estimable, weighted by rows; None where it is nowhere.

    >>> weighted({"a": {"auroc": 0.8}, "b": {"auroc": 0.6}, "c": {"auroc": None}}, {"a": 100, "b": 300, "c": 50})
    {'auroc': 0.65}
    """
    names = dict.fromkeys(name for metrics in by_site.values() for name in metrics)
    means: Metrics = {}
    for name in names:
        known = [(m[name], rows[site]) for site, m in by_site.items() if m.get(name) is not None]
        total = sum(weight for _, weight in known)
        means[name] = sum(value * weight for value, weight in known if value is not None) / total if total else None
    return means


def privacy_result(
    privacy: Privacy, epsilon_max: float, population: str | None = None, rate: float = 1.0
) -> PrivacyResult:
    """The statement of a study.

    Args:
        population: how a simulation dealt rows out to clients; None: the sites are the clients.
        rate: at which a round draws each client, where privacy is of whole clients.
    """
    record = isinstance(privacy, RecordPrivacy)
    covers = COVERS if record else COVERS_SITE
    if population is not None:
        covers += "; each client of the population is a site of its own"
    if population == "drawn" and record:
        covers += ", and its copy of a row, which others may have drawn too, a record of its own"
    if rate < 1:
        covers += f", which is in a round with probability {rate:g}, drawn anew in secret for each"
    return PrivacyResult(
        unit=privacy.unit,
        delta=privacy.delta,
        epsilon_max=epsilon_max,
        epsilon_budget=privacy.epsilon,
        accountant=f"PLD (dp-accounting), {'Poisson' if record or rate < 1 else 'no'} sampling, zero-out neighbours",
        covers=covers,
        not_covered=NOT_COVERED if record else NOT_COVERED_SITE,
    )


def model_bytes(params: Params) -> bytes:
    """The released file: parameters only, no metadata."""
    return b"".join(store.safetensors(params))


def model_file(model: Model) -> ModelFile:
    """How the released file will be described."""
    total = hashlib.sha256()
    for piece in pieces_of(model):  # model_bytes, without a copy of the model
        total.update(piece)
    count = model.parameters if isinstance(model, Excerpt) else sum(p.numel() for p in model.values())
    return ModelFile(path="model.safetensors", sha256=total.hexdigest(), parameters=count)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("fedtailor", "flwr", "torch", "opacus", "dp-accounting", "numpy", "cryptography"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
