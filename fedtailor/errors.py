"""What callers catch.

FedtailorError            anything that a person can mend; its text names the field, the value and the way out
├── ConfigError           a setting is unknown, missing or out of range
├── ContractError         a site's data do not satisfy the contract
├── RefusedError          the site's policy or budget says no (exit code 3)
├── WireError             a message is malformed, too large or not what was agreed
├── StoreError            a file on disk is damaged, locked or cannot be written
└── ConnectionFailed      the other side cannot be reached or is not who it should be
"""


class FedtailorError(Exception):
    """Something a person can mend. ``code`` is a stable word that may leave a site; the text never does."""

    code = "failed"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code or type(self).code


class ConfigError(FedtailorError):
    """A setting is unknown, missing or out of range."""

    code = "config"


class ContractError(FedtailorError):
    """A site's data do not satisfy the data contract."""

    code = "contract"


class RefusedError(FedtailorError):
    """The site's policy or privacy budget refuses."""

    code = "refused"


class WireError(FedtailorError):
    """A message is malformed, too large or not what was agreed."""

    code = "wire"


class StoreError(FedtailorError):
    """A file on disk is damaged, locked or cannot be written."""

    code = "store"


class ConnectionFailed(FedtailorError):
    """The other side cannot be reached, or is not who it should be."""

    code = "connection"
