"""Setting a site up from the kit that the coordinator's operator handed over."""

import shutil
from pathlib import Path

import yaml
from pydantic import ValidationError

from fedtailor import pki, store
from fedtailor.client.site import Home, SiteConfig
from fedtailor.config import readable
from fedtailor.errors import ConfigError


def set_up(folder: Path, kit: Path, *, data: Path, studies: list[str], epsilon: float, delta: float) -> SiteConfig:
    """Write ``site.yaml`` and the keys under ``folder``. A site that is set up already is left alone.

    Raises:
        ConfigError: naming what is missing or out of range.
    """
    home = Home(folder)
    if (home.folder / "site.yaml").exists():
        raise ConfigError(f"{home.folder / 'site.yaml'} exists: edit it, or choose another --home")
    try:
        known = yaml.safe_load((kit / "kit.yaml").read_text())
        site, server = known["site"], known["server"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{kit} is not a site's kit: {error}") from error
    if not data.is_file():
        raise ConfigError(f"--data {data}: there is no such file")
    raw = {
        "site": site,
        "server": server,
        "keys": "keys",
        "data": {"name": studies[0] if studies else "", "path": str(data.resolve())},
        "policy": {"studies": list(studies), "epsilon": epsilon, "delta": delta},
    }
    try:
        config = SiteConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(readable(error)) from error
    home.make()
    keys = home.folder / "keys"
    keys.mkdir(mode=0o700, exist_ok=True)
    for name in ("ca.pem", "plans.pub", "site.pem", "site.key"):
        if not (kit / name).exists():
            raise ConfigError(f"{kit / name} is missing: ask the operator for the whole kit")
        shutil.copyfile(kit / name, keys / name)
        (keys / name).chmod(0o600)
    pki.load_key(keys / "site.key")
    store.write_text(home.folder / "site.yaml", yaml.safe_dump(raw, sort_keys=False))
    return config
