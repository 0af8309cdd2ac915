"""A run's result: one versioned document, the same for a deployment and a simulation."""

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from safetensors.torch import save

from fedtailor.recipe import Metrics
from fedtailor.study import Frozen, RecordPrivacy
from fedtailor.tree import Params

SCHEMA: Literal["fedtailor.result/1"] = "fedtailor.result/1"
Ending = Literal["completed", "stopped", "failed"]
COVERS = (
    "everything that depends on one record of a site's training part and left the site as parameters, over all rounds "
    "of this run: the released model among it"
)
NOT_COVERED = (
    "metrics (of the held-out part, and of the model trained alone for comparison), numbers of rows, timing; "
    "they are exact and not private"
)


class SiteResult(Frozen):
    """One site."""

    rows: NonNegativeInt  # training and held-out part together
    metrics: dict[str, Metrics]  # "local_only", "federated"; None is: not estimable
    epsilon: float | None  # spent by this run on this site's data
    bytes_sent: NonNegativeInt
    bytes_received: NonNegativeInt


class PrivacyResult(Frozen):
    """What is promised, exactly."""

    unit: Literal["record", "site"]
    delta: float
    epsilon_max: float  # the greatest over the sites
    accountant: str
    covers: str = COVERS
    not_covered: str = NOT_COVERED


class Timing(Frozen):
    """Seconds."""

    wall_s: float
    setup_s: float
    round_s: list[float]
    work_s: list[float] = []  # the slowest site's own work in each round


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
    """``result.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)
    schema_: Literal["fedtailor.result/1"] = Field(default=SCHEMA, alias="schema")
    study: str
    strategy: str
    rounds: NonNegativeInt
    sites: dict[str, SiteResult]
    metrics: dict[str, Metrics]  # means over sites, weighted by training rows
    privacy: PrivacyResult | None
    timing: Timing
    transport: Transport | None
    engine: str  # "flower" or "simulation"
    seed: NonNegativeInt
    model: ModelFile
    versions: dict[str, str]
    status: Ending = "completed"
    dropped: list[dict[str, Any]] = []  # replies that did not count: {"round", "site", "code"}
    history: list[dict[str, Any]] = []  # per evaluated round: {"round", "sites": {name: metrics}, "metrics"}


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


def privacy_result(privacy: RecordPrivacy, epsilon_max: float) -> PrivacyResult:
    """The statement of a record-level study."""
    accountant = "PLD (dp-accounting), Poisson sampling, zero-out neighbours"
    return PrivacyResult(unit=privacy.unit, delta=privacy.delta, epsilon_max=epsilon_max, accountant=accountant)


def model_bytes(params: Params) -> bytes:
    """The released file: parameters only."""
    return save({name: p.detach().cpu().contiguous() for name, p in params.items()})


def model_file(params: Params) -> ModelFile:
    """How the released file will be described."""
    count = sum(p.numel() for p in params.values())
    digest = hashlib.sha256(model_bytes(params)).hexdigest()
    return ModelFile(path="model.safetensors", sha256=digest, parameters=count)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("fedtailor", "flwr", "torch", "opacus", "dp-accounting", "numpy", "cryptography"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
