"""Who may import whom, as pyproject.toml states it; and that it states it of every module."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RULES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
PARTS = {p.stem for p in (ROOT / "fedtailor").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}


def sources(words: str) -> set[str]:
    rule = next(rule for rule in RULES if words in rule["name"])
    return {name.removeprefix("fedtailor.") for name in rule["source_modules"]}


def test_nobody_reaches_up_or_sideways():
    command = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_has_its_floor():
    layers = " ".join(next(rule for rule in RULES if rule["type"] == "layers")["layers"])
    named = {word.removeprefix("fedtailor.") for word in layers.replace("|", " ").replace(":", " ").split()}
    assert named == PARTS - {"__init__", "__main__", "configs"}


def test_the_rules_on_libraries_leave_out_only_whom_they_name():
    everything = PARTS - {"__init__", "__main__", "configs", "cli"}
    assert sources("Flower") == everything - {"wire", "server", "client"}
    assert sources("Opacus") == everything - {"privacy", "client"}
    assert sources("Hydra") == everything - {"config"}
