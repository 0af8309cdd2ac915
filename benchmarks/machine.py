"""Where figures come from: the machine, and the versions of what was measured."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ASK = """
import importlib.metadata, json, platform, sys
found = {name: importlib.metadata.version(name) for name in sys.argv[1:]}
print(json.dumps({"python": platform.python_version()} | found))
"""


def machine() -> dict[str, Any]:
    """Its processor, and how busy it is already."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "cores_of_this_process": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],  # of the last minute
    }


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """Its name."""
    said = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in said if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions(python: Path | str, *packages: str) -> dict[str, str]:
    """Of an interpreter and of packages that it has."""
    run = subprocess.run([python, "-c", ASK, *packages], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(run.stdout)
    return found
