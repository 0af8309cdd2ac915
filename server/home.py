"""The coordinator's home: a folder with its settings, keys, sites and studies."""

from pathlib import Path
from typing import Annotated

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, PositiveFloat, ValidationError

from fedtailor import pki, seals, store
from fedtailor.config import readable
from fedtailor.errors import ConfigError
from fedtailor.study import Frozen, Name

HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9.\-:]{1,253}$")]  # a name, punycode if need be, or an address


class ServerConfig(Frozen):
    """``server.yaml``."""

    name: Name = "consortium"
    host: str = "127.0.0.1"  # the address to listen on; loopback until an operator says otherwise
    port: Annotated[int, Field(ge=1, le=65535)] = 8443
    hosts: Annotated[tuple[HostName, ...], Field(min_length=1)] = ("localhost", "127.0.0.1")  # that sites may use
    server_days: PositiveFloat = 30.0  # the life of the server's certificate; it renews itself at two thirds
    site_days: PositiveFloat = 30.0  # the life of a site's certificate; the site renews it at two thirds


class Home:
    """Paths and settings under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.tls, self.signing, self.sites, self.studies, self.invitations = (
            self.folder / name for name in ("tls", "signing", "sites", "studies", "invitations")
        )
        self.revoked = self.folder / "revoked.json"

    def config(self) -> ServerConfig:
        """The settings; ConfigError names what is wrong in the file."""
        path = self.folder / "server.yaml"
        if not path.exists():
            raise ConfigError(f"{path} does not exist; make it with: fedtailor server init --home {self.folder}")
        try:
            return ServerConfig.model_validate(yaml.safe_load(path.read_text()) or {})
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        except ValidationError as error:
            raise ConfigError(f"{path}: {readable(error)}") from error

    def init(self, config: ServerConfig) -> None:
        """Make the CA, the server's certificate, the key that signs plans, and the settings. Refuses a home with them."""
        if (self.folder / "server.yaml").exists():
            raise ConfigError(f"{self.folder} is a coordinator's home already; choose another --home")
        for folder in (self.folder, self.signing, self.sites, self.studies, self.invitations):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        pki.make_ca(self.tls, f"{config.name[:60]} CA")
        pki.issue(
            self.tls, self.tls, "server", config.name, server=True, hosts=list(config.hosts), days=config.server_days
        )
        seals.make_signer(self.signing / "plans.key", self.signing / "plans.pub")
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        store.write_text(self.folder / "server.yaml", text)

    def signer(self) -> Ed25519PrivateKey:
        """The key that signs proposals, visits and receipts. Sites pin its public half when they join."""
        return seals.load_signer(self.signing / "plans.key")
