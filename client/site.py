"""A site's own settings and rules. They live on the site's disk; the coordinator can neither push nor loosen them."""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import PositiveInt, ValidationError

from fedtailor.config import readable
from fedtailor.errors import ConfigError
from fedtailor.invitation import Address
from fedtailor.policy import Policy
from fedtailor.study import Frozen, Name


class Data(Frozen):
    """One data set. ``name`` is its account in the privacy ledger: keep it when the file changes."""

    name: Name
    path: Path


class SiteConfig(Frozen):
    """``site.yaml``."""

    site: Name
    server: Address
    keys: Path = Path("keys")  # holds ca.pem, site.pem, site.key, plans.pub
    data: Data
    policy: Policy
    threads: PositiveInt = 1  # CPU threads for training
    confinement: Literal["required", "best"] = "best"  # required: no training where network or files stay open


class Home:
    """Paths and settings under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.state = self.folder / "state"
        self.inbox, self.outbox, self.memory = (self.state / name for name in ("inbox", "outbox", "memory"))
        self.models = self.state / "models"  # of this site's own, one a study that gave it one

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
