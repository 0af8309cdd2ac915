"""``fedtailor simulate … -m``: the product of what is listed, a folder each, and one failure that stops nobody."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from fedtailor import store
from fedtailor.cli import app
from fedtailor.cli.sweep import named
from fedtailor.config import choices, sweep
from fedtailor.errors import ConfigError, StoreError

QUICK = ["study=heart", "privacy=none", "evaluation.baseline=false"]


def run(folder, *words, options=("--json",)):
    done = CliRunner().invoke(app, ["simulate", *QUICK, "-m", *words, "--out", str(folder), *options])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_lists_make_a_product_in_order():
    fixed, chosen = sweep(["seed=0,1", "study=heart", "+x={a: 1},{a: 2}", "sites=[va,hungary]"])
    assert fixed == ["study=heart", "sites=[va,hungary]"]
    assert chosen == [["seed=0", "+x={a:1}"], ["seed=0", "+x={a:2}"], ["seed=1", "+x={a:1}"], ["seed=1", "+x={a:2}"]]
    assert sweep(["rounds=range(1,4)"]).chosen == [["rounds=1"], ["rounds=2"], ["rounds=3"]]
    assert sweep([]) == ([], [[]]) and sweep(["name='a,b'"]).chosen == [[]]
    every = [f"strategy={name}" for name in choices("strategy") if name.startswith("fed")]
    assert [each[0] for each in sweep(["strategy=glob(fed*)"]).chosen] == every


@pytest.mark.parametrize("wrong", ["rounds=interval(0,1)", "rounds=glob(*)", "strategy=glob(nothing*)", "rounds=[1"])
def test_what_makes_no_list_is_named(wrong):
    with pytest.raises(ConfigError, match=r"not a list of values|input '\[1'"):
        sweep([wrong])


def test_names_are_safe_and_different():
    assert named(["rounds=5", "seed=0"]) == "rounds=5,seed=0" and named([]) == "defaults"
    odd = [["a=../x"], ["a=.._x"], ["a=..?x"], ["a=" + 300 * "x"], ["a=" + 301 * "x"], [".."], ["a=é"], ["~b"]]
    names = [named(each) for each in odd]
    assert len(set(names)) == len(names)
    assert all("/" not in name and not name.startswith(".") and 0 < len(name.encode()) <= 150 for name in names)


def test_each_run_has_its_folder_and_a_failure_stops_nobody(tmp_path):
    stale = tmp_path / "local.lr=-1,rounds=1"
    stale.mkdir()
    (stale / "result.json").write_text("{}")
    done = run(tmp_path, "local.lr=-1,0.25", "rounds=1,2")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert [bool(one["error"]) for one in document["runs"]] == [True, True, False, False]
    assert "local.lr" in document["runs"][0]["error"] and "local.lr=-1,rounds=1 failed: local.lr" in done.stderr
    assert sorted(p.parent.name for p in tmp_path.rglob("result.json")) == [
        "local.lr=0.25,rounds=1",
        "local.lr=0.25,rounds=2",
    ]
    for rounds in (1, 2):
        folder = tmp_path / f"local.lr=0.25,rounds={rounds}"
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["rounds"], config["local"]["lr"], config["privacy"]) == (rounds, 0.25, None)
        assert json.loads((folder / "result.json").read_text())["rounds"] == rounds
    assert [row["settings"] for row in document["rows"]] == [{"rounds": "1"}, {"rounds": "2"}]


def test_a_fault_that_nobody_foresaw_stops_nobody_either(tmp_path, monkeypatch):
    from fedtailor.simulations import composed

    real = composed.run

    def breaks(experiment, *rest):
        if experiment.plan.seed == 0:
            raise RuntimeError("out of luck")
        return real(experiment, *rest)

    monkeypatch.setattr(composed, "run", breaks)
    done = run(tmp_path, "rounds=1", "seed=0,1", options=())
    assert done.exit_code == 1 and "seed=0 failed: RuntimeError: out of luck" in done.stderr
    assert "1 of 2 runs done" in done.stdout and (tmp_path / "seed=1" / "result.json").exists()


def test_without_lists_it_is_one_run(tmp_path):
    done = run(tmp_path, "rounds=1")
    assert done.exit_code == 0
    (only,) = json.loads(done.stdout)["runs"]
    assert only["error"] is None and only["overrides"] == [*QUICK, "rounds=1"]


def test_a_list_without_the_option_says_which():
    with pytest.raises(ConfigError, match="'rounds=1,2': -m runs one after the other"):
        from fedtailor.config import load

        load(["rounds=1,2"])


def test_a_folder_that_another_run_writes_is_left_alone(tmp_path):
    busy = tmp_path / "rounds=1"
    with store.alone(busy):
        (busy / "result.json").write_text("{}")
        done = run(tmp_path, "rounds=1,2")
        one = CliRunner().invoke(app, ["simulate", *QUICK, "rounds=1", "--out", str(busy)])
    assert [bool(each["error"]) for each in json.loads(done.stdout)["runs"]] == [True, False]
    assert done.exit_code == 1 and "rounds=1 failed" in done.stderr and "another run" in done.stderr
    assert isinstance(one.exception, StoreError) and "another run" in str(one.exception)
    assert (busy / "result.json").read_text() == "{}"
