"""A site's own settings and rules. They live on the site's disk; the coordinator can neither push nor loosen them."""

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, PositiveInt, ValidationError

from fedtailor.config import readable
from fedtailor.errors import ConfigError, RefusedError
from fedtailor.privacy.accounting import Charge, epsilon
from fedtailor.study import Frozen, Name, Plan


class Data(Frozen):
    """One data set. ``name`` is its account in the privacy ledger: keep it when the file changes."""

    name: Name
    path: Path


class Policy(Frozen):
    """What this site allows. There is no default: a site without a policy refuses everything."""

    studies: Annotated[tuple[Name, ...], Field(min_length=1)]  # the studies it takes part in, by name
    epsilon: Annotated[float, Field(gt=0)]  # the most that the data set may ever spend, all studies together
    delta: Annotated[float, Field(gt=0, lt=0.1)]
    without_privacy: bool = False  # whether a study without differential privacy may train here
    metrics: bool = True  # whether metrics of the held-out part may leave; they are exact, not private
    minimum_count: PositiveInt = 10  # fewer held-out rows than this, and no metric leaves
    max_rounds: PositiveInt = 1000
    max_download_mb: PositiveInt = 2048


class SiteConfig(Frozen):
    """``site.yaml``."""

    site: Name
    server: Annotated[str, Field(pattern=r"^[A-Za-z0-9.\-\[\]:]+:\d{1,5}$")]  # name:port
    keys: Path = Path("keys")  # holds ca.pem, site.pem, site.key
    data: Data
    policy: Policy
    threads: PositiveInt = 1  # CPU threads for training


class Home:
    """Paths and settings under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.state = self.folder / "state"
        self.inbox, self.outbox, self.memory = (self.state / name for name in ("inbox", "outbox", "memory"))

    def make(self) -> None:
        """Create the state folders, readable by their owner only."""
        for folder in (self.folder, self.state, self.inbox, self.outbox, self.memory):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)

    def config(self) -> SiteConfig:
        """The settings, with paths resolved against the home; ConfigError names what is wrong in the file."""
        path = self.folder / "site.yaml"
        try:
            raw = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; make one with: fedtailor client join") from error
        if isinstance(raw, dict) and not raw.get("policy"):
            raise ConfigError(f"{path}: policy is missing; a site without a policy refuses everything, so write one")
        try:
            config = SiteConfig.model_validate(raw)
        except ValidationError as error:
            raise ConfigError(f"{path}: {readable(error)}") from error
        data = config.data.model_copy(update={"path": self.folder / config.data.path})
        return config.model_copy(update={"keys": self.folder / config.keys, "data": data})


def charge_of(plan: Plan) -> Charge | None:
    """What one round of a plan costs, or None where the plan has no differential privacy."""
    if plan.privacy is None:
        return None
    if plan.privacy.noise_multiplier is None:
        raise RefusedError("the plan does not say how much noise to add (privacy.noise_multiplier)", code="plan")
    return Charge(plan.privacy.noise_multiplier, plan.local.rate, plan.local.steps)


def judge(config: SiteConfig, plan: Plan) -> None:
    """Whether this site takes part in ``plan`` at all, before any work.

    Raises:
        RefusedError: naming the rule, what the plan asks and what the policy allows; only its code leaves the site.
    """
    policy = config.policy
    if config.site not in plan.sites:
        raise RefusedError(f"the plan lists {list(plan.sites)}, not {config.site}", code="roster")
    if plan.study not in policy.studies:
        allowed = ", ".join(policy.studies)
        raise RefusedError(f"study {plan.study!r} is not in policy.studies ({allowed})", code="study")
    if plan.rounds > policy.max_rounds:
        raise RefusedError(f"{plan.rounds} rounds; policy.max_rounds is {policy.max_rounds}", code="rounds")
    charge = charge_of(plan)
    if plan.privacy is None or charge is None:
        if not policy.without_privacy:
            raise RefusedError("a study without differential privacy; policy.without_privacy is false", code="privacy")
        return
    if plan.privacy.delta > policy.delta:
        raise RefusedError(f"delta {plan.privacy.delta}; policy.delta is {policy.delta}", code="delta")
    whole = epsilon([charge] * plan.rounds, plan.privacy.delta)
    if whole > plan.privacy.epsilon * (1 + 1e-9):
        promised = plan.privacy.epsilon
        raise RefusedError(f"the plan promises epsilon {promised} but its noise gives {whole:.3f}", code="epsilon")
