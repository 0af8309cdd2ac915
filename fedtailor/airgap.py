"""Switch off everything in Flower and Ray that would talk to the outside. The package imports it
before anything else, and so before flwr.

Flower 1.41 sends telemetry and asks for updates by default, and reads both switches when it is first imported.
"""

import os
import secrets

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # who has no share of a GPU sees what it would see without Ray


def ray_of_our_own() -> dict[str, str]:
    """Settings, read when Ray is imported, of one that nobody else talks to.

    It listens on loopback, where other people of this machine come too, and could run code as this user: they lack the
    token.
    """
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what keeps Ray to loopback there keeps it to loopback here
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
