"""The coordinator's home: a folder with its settings, keys, sites and studies."""

import json
from pathlib import Path
from typing import Annotated

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, TypeAdapter, ValidationError

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


class Home:
    """Paths and settings under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.tls, self.sites, self.studies = (self.folder / name for name in ("tls", "sites", "studies"))
        self.kits = self.folder / "kits"

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
        """Make the CA, the server's certificate and the settings. Refuses a home that has them."""
        if (self.folder / "server.yaml").exists():
            raise ConfigError(f"{self.folder} is a coordinator's home already; choose another --home")
        for folder in (self.folder, self.sites, self.studies):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
        pki.make_ca(self.tls, f"{config.name[:60]} CA")
        pki.issue(self.tls, self.tls, "server", config.name, server=True, hosts=list(config.hosts))
        seals.make_signer(self.folder / "signing" / "plans.key", self.folder / "signing" / "plans.pub")
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        store.write_text(self.folder / "server.yaml", text)

    def signer(self) -> Ed25519PrivateKey:
        """The key that signs proposals, visits and receipts. Sites pin its public half when they join."""
        return seals.load_signer(self.folder / "signing" / "plans.key")

    def admit(self, site: str) -> Path:
        """Make a site's key and certificate; returns the kit to hand over to it, and remembers its public key."""
        try:
            TypeAdapter(Name).validate_python(site)
        except ValidationError as error:
            raise ConfigError(
                f"site {site!r}: a name has up to 64 small letters, digits, '_', '.' and '-', and begins with a "
                "letter or digit"
            ) from error
        kit = self.kits / site
        if (self.sites / f"{site}.json").exists():
            raise ConfigError(f"site {site!r} has been admitted already; its kit is {kit}")
        config = self.config()
        pki.issue(self.tls, kit, "site", site, server=False, hosts=[])
        store.write_bytes(kit / "plans.pub", (self.folder / "signing" / "plans.pub").read_bytes(), mode=0o644)
        address = f"{config.hosts[0]}:{config.port}"
        store.write_text(kit / "kit.yaml", yaml.safe_dump({"site": site, "server": address}))
        fingerprint = pki.fingerprint(kit / "site.pem")
        store.write_json(
            self.sites / f"{site}.json",
            {"name": site, "certificate": (kit / "site.pem").read_text(), "fingerprint": fingerprint},
        )
        return kit

    def admitted(self) -> dict[str, str]:
        """Name -> certificate (PEM) of every site."""
        found = {}
        for path in sorted(self.sites.glob("*.json")):
            try:
                found[path.stem] = str(json.loads(path.read_text())["certificate"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path} cannot be read ({error}); restore it or delete it to forget the site"
                ) from error
        return found
