"""docs/strategies.md says what the code says, and its example is FedNova."""

import re
import runpy
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from fedtailor import strategies, tree
from fedtailor.config import build, choices, load
from fedtailor.strategy import Local, Strategy
from fedtailor.study import Spec

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "strategies.md").read_text()


def test_the_catalogue_is_up_to_date():
    made = runpy.run_path(str(ROOT / "scripts" / "strategies_doc.py"))["page"]()
    assert made == PAGE, "run scripts/strategies_doc.py"


def test_every_row_has_a_purpose_a_paper_and_its_own_words():
    rows = [
        re.split(r"(?<!\\) \| ", line)
        for line in PAGE.split("<!--")[1].splitlines()
        if line.startswith("| `") and "`strategy=`" not in line
    ]
    assert [row[0] for row in rows] == [f"| `{name}`" for name in choices("strategy")]
    assert len({row[1] for row in rows}) == len(rows)
    assert all("](https://" in row[-1] for row in rows)
    told = {row[0][3:-1]: (row[3], row[4]) for row in rows}
    assert told["fedavg"] == ("yes", "record, site")
    assert told["robust"] == ("no", "record")
    assert told["qfedavg"] == ("yes", "site")


def test_every_command_on_the_page_makes_a_strategy():
    commands = re.findall(r"^fedtailor simulate (.*)$", PAGE, re.M)
    assert len(commands) == 2
    for command in commands:
        build(load(shlex.split(command)).plan.strategy, Strategy)


@pytest.fixture
def example(monkeypatch):
    """The page's strategy, installed as it says."""
    (code,), (text,) = (re.findall(rf"```{kind}\n(.*?)```", PAGE, re.S) for kind in ("python", "yaml"))
    assert len(code.splitlines()) + len(text.splitlines()) < 40
    module = ModuleType("my_fednova")
    exec(code, module.__dict__)
    monkeypatch.setattr(strategies, "my_fednova", module.my_fednova, raising=False)
    monkeypatch.setattr(strategies, "__all__", [*strategies.__all__, "my_fednova"])
    return build(Spec.model_validate(yaml.safe_load(text)), Strategy)


def test_the_example_is_fednova(example):
    def run(strategy):
        state = strategy.init({"w": torch.zeros(3)})
        for round in range(3):
            acc, rng = None, torch.Generator().manual_seed(round)
            for rows, steps in ((1.0, 1.0), (3.0, 4.0), (9.0, 2.0)):
                params = {"w": state["params"]["w"] + torch.randn(3, generator=rng)}
                cast = strategy.broadcast(state)
                local = Local(cast, {}, params, torch.tensor(rows), torch.tensor(steps), 0.1)
                acc = strategy.reduce.add(acc, tree.at(strategy.report(local)[0], None))
            state = strategy.apply(state, acc, round)
        return state["params"]

    torch.testing.assert_close(run(example), run(strategies.fednova()))
    moved = (run(example)["w"] - run(strategies.fedavg())["w"]).abs().max()
    assert moved > 0.1
