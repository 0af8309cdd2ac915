"""Switch off everything in Flower that would talk to the outside. The package imports it
before anything else, and so before flwr.

Flower 1.41 sends telemetry and asks for updates by default, and reads both switches when it is first imported.
"""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
