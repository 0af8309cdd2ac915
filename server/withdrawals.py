"""Sites that have withdrawn, by their own signed notices: they are left out of what is proposed from then on."""

from fedtailor import pki, store, withdrawal
from fedtailor.errors import ConfigError, WireError
from fedtailor.server.home import Home
from fedtailor.withdrawal import Notice

MOST = 1000  # notices of one site: they must not fill the disk


def take(home: Home, name: str, key: str, text: str) -> Notice:
    """Keep a site's notice.

    Args:
        key: the site's public key (PEM), by the certificate of its connection.

    Raises:
        WireError: code ``notice``.
    """
    notice = withdrawal.read(text, name, pki.read_key_text(key))
    folder = home.folder / "notices" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if notice.number >= MOST:
        raise WireError(f"a site sends at most {MOST} notices", code="notice")
    store.write_text(folder / f"{notice.number:06d}.json", notice.model_dump_json())
    return notice


def withdrawn(home: Home, study: str) -> set[str]:
    """The sites that take no part in a study.

    Raises:
        ConfigError: naming a notice that cannot be read.
    """
    out = set()
    for folder in (home.folder / "notices").glob("*"):
        notices = []
        for path in folder.glob("*.json"):
            try:
                notices.append(Notice.model_validate_json(path.read_text()))
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path} cannot be read ({error}); restore it") from error
        if not {None, study}.isdisjoint(withdrawal.standing(notices)):
            out.add(folder.name)
    return out
