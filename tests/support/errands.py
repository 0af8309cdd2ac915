"""What a launcher may be given to run instead of a study: found by its name in a process of joblib's, and without torch."""

import os
import signal
from pathlib import Path


def errand(overrides: list[str], folder: str, resume: bool) -> str | None:
    """Do what the first override says; the answer tells where."""
    began = Path(folder + ".began")
    if overrides == ["dies"] or (overrides == ["dies once"] and not began.exists()):
        began.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return None if overrides == ["works"] else f"{os.getpid()} {os.environ['OMP_NUM_THREADS']} {resume}"
