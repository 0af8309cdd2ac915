"""docs/extending.md is done as it says: its package is built, installed and run, and is FedNova."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

from fedtailor.config import load
from fedtailor.datasets import heart_disease
from fedtailor.policy import Policy
from fedtailor.simulations.run import simulate

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"^`([\w./]+)`:\n```\w+\n(.*?)```", PAGE, re.S | re.M))
STUDY = ["study=heart", "privacy=none", "rounds=2"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Where the page's package is installed, by pip, from the files that it shows."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pip")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name, text in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    run(os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}, *pip, str(source))
    path = os.pathsep.join(filter(None, [str(target), str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}


def run(environment, *command, cwd=None):
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_takes_at_most_forty_lines():
    code = [text for name, text in FILES.items() if name.endswith((".py", ".yaml"))]
    assert len(FILES) == 3 and len(code) == 2 and sum(len(text.splitlines()) for text in code) <= 40


def test_it_runs_and_is_fednova(environment, tmp_path):
    (command,) = re.findall(r"^fedtailor (simulate .*my_fednova.*)$", PAGE, re.M)
    assert command.split()[1:] == [*STUDY[:2], "strategy=my_fednova", STUDY[2]]
    ended = run(
        environment, "-m", "fedtailor", *command.split(), "--out", str(tmp_path / "run"), "--json", cwd=tmp_path
    )
    assert json.loads(ended.splitlines()[-1])["strategy"] == "my_fednova"

    sources = heart_disease()
    shipped, other = (simulate(load([*STUDY, f"strategy={name}"]).plan, sources)[1] for name in ("fednova", "fedexp"))
    params = load_file(tmp_path / "run" / "model.safetensors")
    assert params.keys() == shipped.keys()
    for name, tensor in params.items():
        assert_close(tensor, shipped[name], rtol=0, atol=1e-6)
    assert any((params[name] - other[name]).abs().max() > 1e-3 for name in params)


def test_the_list_gives_the_lines_that_the_page_shows(environment, tmp_path):
    shown = run(environment, "-m", "fedtailor", "plugins", cwd=tmp_path)
    assert "my_fednova: my-fednova 1.0, module my_fednova, adds strategy=my_fednova" in shown
    lines = yaml.safe_load(shown[shown.index("policy:") :])["policy"]
    (block,) = re.findall(r"```yaml\n(policy:\n.*?)```", PAGE, re.S)
    told = yaml.safe_load(block)["policy"]
    assert told["plugins"].keys() == lines["plugins"].keys() == {"my_fednova"}
    for some in (lines, told):
        Policy.model_validate(some | {"studies": ["heart"], "epsilon": 1.0, "delta": 1e-4})


@pytest.mark.slow
def test_it_inherits_the_contract_suite(environment):
    assert "`pytest tests/contracts -k my_fednova`" in PAGE
    pytest_ = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", "tests/contracts", "-k", "my_fednova"]
    ended = run(environment, *pytest_, cwd=ROOT)
    found = re.search(r"(\d+) passed", ended)
    assert found and int(found[1]) >= 20, ended
