"""One table over run folders: seeds together, the rest apart, and nothing that cannot be read passed over in silence."""

import csv
import json
import sys
from io import StringIO

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from fedtailor.cli import app, compare
from fedtailor.cli.tables import typed
from fedtailor.config import load
from fedtailor.errors import StoreError
from fedtailor.result import PrivacyResult, Result, SiteResult, Timing, model_file

DP = {"unit": "record", "delta": 1e-4, "accountant": "PLD"}


def write(folder, auroc, *overrides, seed=0, epsilon=None, wall_s=2.0, own=None, **changes):
    """A run folder, as a simulation leaves it, without its model."""
    plan = load(["study=heart", f"seed={seed}", *overrides]).plan
    metrics = {"local_only": {}, "federated": {"auroc": auroc, "accuracy": 0.75}}
    metrics |= {} if own is None else {"personal": {"auroc": own, "accuracy": 0.5}}
    privacy = None if epsilon is None else PrivacyResult(**DP, epsilon_max=epsilon)
    site = SiteResult(rows=9, metrics=metrics, epsilon=epsilon, bytes_sent=0, bytes_received=0)
    result = Result(
        study=plan.study, strategy=plan.strategy.names()[0], rounds=plan.rounds, sites={"va": site}, metrics=metrics,
        privacy=privacy, timing=Timing(wall_s=wall_s, setup_s=0, round_s=[]), transport=None, engine="simulation",
        seed=seed, model=model_file({}), versions={},
    ).model_copy(update=changes)  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(result.model_dump_json(by_alias=True))
    (folder / "config.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json", by_alias=True), sort_keys=False))


def rows_of(folder, *options):
    run = CliRunner().invoke(app, ["compare", str(folder), "--json", *options])
    assert run.exit_code == 0, run.output
    return json.loads(run.stdout)["rows"]


def printed(folder):
    out = StringIO()
    rows = compare.compared([compare.read(path.parent) for path in sorted(folder.rglob("result.json"))])
    Console(file=out, width=160, color_system=None).print(compare.shown(rows))
    return out.getvalue()


def test_seeds_are_one_row_with_the_interval_of_students_t(tmp_path):
    for seed, auroc in enumerate((0.80, 0.82, 0.90)):
        write(tmp_path / "deep" / str(seed), auroc, seed=seed, wall_s=1.0 + seed)
    (row,) = rows_of(tmp_path)
    assert row["study"] == "heart" and row["strategy"] == "fedavg" and row["settings"] == {}
    assert row["seeds"] == [0, 1, 2] and row["seconds"] == 2.0 and row["epsilon"] is None
    mean, half, seeds = row["metrics"]["auroc"]
    assert (mean, half, seeds) == (pytest.approx(0.84), pytest.approx(4.302653 * 0.0529150 / 3**0.5, rel=1e-5), 3)
    assert row["metrics"]["accuracy"] == [0.75, 0.0, 3]
    assert "0.840 ± 0.131" in printed(tmp_path) and "no DP" in printed(tmp_path)


def test_one_seed_has_no_interval_and_a_seed_run_twice_counts_once(tmp_path):
    write(tmp_path / "a", 0.8)
    assert rows_of(tmp_path)[0]["metrics"]["auroc"] == [0.8, None, 1]
    write(tmp_path / "b", 0.9)
    assert rows_of(tmp_path)[0]["metrics"]["auroc"] == [pytest.approx(0.85), None, 1]
    write(tmp_path / "c", 0.95, seed=1)
    assert rows_of(tmp_path)[0]["metrics"]["auroc"] == [pytest.approx(0.9), pytest.approx(12.7062 * 0.05, rel=1e-4), 2]


def test_what_differs_is_a_column_and_what_is_the_same_is_not(tmp_path):
    write(tmp_path / "a", 0.8, "strategy=fedprox", "rounds=5")
    write(tmp_path / "b", 0.8, "strategy=fedprox", "rounds=7", "quorum=2")
    write(tmp_path / "c", 0.8, "strategy=fedprox", "rounds=7", "quorum=2", "strategy.mu=0.7", "local.lr=0.25")
    write(tmp_path / "d", 0.8, "strategy=fedprox", "rounds=5", seed=9)
    found = rows_of(tmp_path)
    assert [row["seeds"] for row in found] == [[0, 9], [0], [0]]
    assert found[2]["settings"] == {"rounds": "7", "quorum": "2", "strategy.mu": "0.7", "local.lr": "0.25"}
    text = printed(tmp_path)
    assert "rounds" in text.splitlines()[1] and "differ in quorum" in text  # it tells nothing that rounds does not


def test_plain_sgd_is_named_beside_another_optimizer(tmp_path):
    """Though its plan does not name it."""
    write(tmp_path / "a", 0.8)
    write(tmp_path / "b", 0.7, "local.optimizer=adam")
    assert sorted(row["settings"]["local.optimizer.name"] for row in rows_of(tmp_path)) == ["adam", "sgd"]


def test_epsilon_is_the_greatest_and_rounded_up(tmp_path):
    write(tmp_path / "a", 0.8, epsilon=2.0001)
    write(tmp_path / "b", 0.8, seed=1, epsilon=1.5)
    assert rows_of(tmp_path)[0]["epsilon"] == 2.0001 and "2.001" in printed(tmp_path)


def test_what_is_not_estimable_is_said(tmp_path):
    write(tmp_path / "a", None)
    assert rows_of(tmp_path)[0]["metrics"]["auroc"] == [None, None, 0] and "n/e" in printed(tmp_path)
    write(tmp_path / "b", 0.7, seed=1)
    assert "0.700 (1 of 2)" in printed(tmp_path)


def test_own_models_and_unfinished_runs_are_told_apart(tmp_path):
    write(tmp_path / "a", 0.8, own=0.9)
    write(tmp_path / "b", 0.8, status="stopped", seed=1)
    whole, stopped = rows_of(tmp_path)
    assert whole["metrics"]["own auroc"] == [0.9, None, 1] and "own auroc" not in stopped["metrics"]
    assert (whole["settings"]["status"], stopped["settings"]["status"]) == ("completed", "stopped")


def test_a_csv_has_all_of_it(tmp_path):
    write(tmp_path / "a", 0.8123456789, "rounds=5", "quorum=2")
    write(tmp_path / "b", None, "rounds=7", epsilon=2.5)
    rows_of(tmp_path, "--csv", str(tmp_path / "t.csv"))
    first, second = csv.DictReader(StringIO((tmp_path / "t.csv").read_text()))
    assert first == {
        "study": "heart", "strategy": "fedavg", "quorum": "2", "rounds": "5", "seeds": "0", "auroc": "0.8123456789",
        "auroc ± 95 %": "", "accuracy": "0.75", "accuracy ± 95 %": "", "epsilon": "", "seconds": "2.0",
    }  # fmt: skip
    assert second["auroc"] == "" and second["epsilon"] == "2.5" and second["quorum"] == "3"


def test_a_damaged_folder_is_named_and_the_others_are_compared(tmp_path):
    write(tmp_path / "good", 0.8)
    write(tmp_path / "bad", 0.8)
    (tmp_path / "bad" / "config.yaml").unlink()
    (tmp_path / "worse").mkdir()
    (tmp_path / "worse" / "result.json").write_text("{")
    run = CliRunner().invoke(app, ["compare", str(tmp_path)])
    assert run.exit_code == 1 and "0.800" in run.stdout
    assert "bad/config.yaml cannot be read" in run.stderr and "worse/result.json cannot be read" in run.stderr
    with pytest.raises(StoreError, match=r"worse/result\.json"):
        compare.read(tmp_path / "worse")
    (tmp_path / "bad" / "config.yaml").write_text("")
    with pytest.raises(StoreError, match=r"bad/config\.yaml cannot be read: it holds no plan"):
        compare.read(tmp_path / "bad")


def test_a_folder_without_runs_is_refused(tmp_path):
    run = CliRunner().invoke(app, ["compare", str(tmp_path)])
    assert run.exit_code and "no run folder" in str(run.exception)


def test_populations_are_told_apart(tmp_path):
    for alpha in (0.1, 1.0):
        of = {"partition": "dirichlet_split", "clients": 50, "cohort": 10, "alpha": alpha}
        write(tmp_path / f"{alpha}", 0.8, population=of)
    assert [row["settings"] for row in rows_of(tmp_path)] == [{"population.alpha": "0.1"}, {"population.alpha": "1.0"}]


def test_simulations_of_other_data_rules_or_clocks_are_told_apart(tmp_path):
    for n, step_s in enumerate(({}, {"va": 2.0}, {})):
        write(tmp_path / f"{n}", 0.8 + n / 10, simulation={"data": {"_target_": "x"}, "step_s": step_s})
    write(tmp_path / "rules", 0.5, simulation={"data": {"_target_": "x"}, "step_s": {}, "policy": {"path": "a.yaml"}})
    found = rows_of(tmp_path)
    assert [row["settings"].get("simulation.step_s.va", "") for row in found] == ["", "2.0", ""]
    assert [row["settings"]["simulation.policy.path"] for row in found] == ["", "", "a.yaml"]


def test_the_rounds_are_drawn_a_line_for_each_row(tmp_path):
    pytest.importorskip("matplotlib")
    for seed, last in ((0, 0.8), (1, 0.9)):
        history = [
            {"round": r, "sites": {}, "metrics": {"auroc": v, "accuracy": None}} for r, v in ((0, None), (5, last))
        ]
        write(tmp_path / f"{seed}", last, seed=seed, history=history)
    write(tmp_path / "other", 0.7, "local.lr=0.25")
    one, other = rows_of(tmp_path, "--plot", str(tmp_path / "all.png"))
    assert one["rounds"] == {
        "auroc": [[5, [pytest.approx(0.85), pytest.approx(12.7062 * 0.05, rel=1e-4), 2]]],
        "accuracy": [],
    }
    assert other["rounds"]["auroc"] == [] and (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch):
    write(tmp_path / "a", 0.8)
    run = CliRunner().invoke(app, ["compare", str(tmp_path), "--plot", str(tmp_path / "all.png")])
    assert run.exit_code != 0 and "no metric was estimable in any round" in str(run.exception)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = CliRunner().invoke(app, ["compare", str(tmp_path), "--plot", str(tmp_path / "all.png")])
    assert "matplotlib is not installed: pip install 'fedtailor[plots]'" in str(run.exception)
    assert not (tmp_path / "all.png").exists()


def differ_by_all_kinds(tmp_path):
    history = [
        {
            "round": 0,
            "sites": {"va": {"auroc": 0.5, "accuracy": None}, "ch": {"auroc": 0.25}},
            "metrics": {"auroc": 0.4},
        },
        {"round": 5, "sites": {}, "metrics": {"auroc": None}},
    ]
    write(tmp_path / "a", 0.8123456789, "rounds=5", "local.lr=1", "evaluation.baseline=false", history=history)
    write(tmp_path / "b", None, "rounds=7", "local.lr=0.5", "+local.within_s=3", seed=1, epsilon=2.5)


def test_each_metric_of_a_run_round_and_site_is_a_line(tmp_path):
    differ_by_all_kinds(tmp_path)
    rows_of(tmp_path, "--rounds", str(tmp_path / "r.csv"))
    lines = list(csv.DictReader(StringIO((tmp_path / "r.csv").read_text())))
    assert [(x["run"], x["round"], x["site"], x["metric"], x["value"]) for x in lines] == [
        ("a", "0", "va", "auroc", "0.5"),
        ("a", "0", "va", "accuracy", ""),
        ("a", "0", "ch", "auroc", "0.25"),
        ("a", "0", "", "auroc", "0.4"),
        ("a", "5", "", "auroc", ""),
    ]
    about = {"study": "heart", "strategy": "fedavg", "rounds": "5", "local.lr": "1.0", "seed": "0"}
    assert about.items() <= lines[0].items()
    assert lines[0]["evaluation.baseline"] == "false" and lines[0]["local.within_s"] == ""
    run = CliRunner().invoke(app, ["compare", str(tmp_path), "--rounds", str(tmp_path / "r.xlsx")])
    assert "end it in .csv or .parquet" in str(run.exception) and not (tmp_path / "r.xlsx").exists()


@pytest.mark.slow
def test_parquet_has_types(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    differ_by_all_kinds(tmp_path)
    rows_of(tmp_path, "--parquet", str(tmp_path / "t"), "--rounds", str(tmp_path / "r.parquet"))
    table = parquet.read_table(tmp_path / "t")
    kinds = dict(zip(table.column_names, map(str, table.schema.types), strict=True))
    assert kinds == {
        "study": "string", "strategy": "string", "rounds": "int64", "local.lr": "double", "local.within_s": "double",
        "evaluation.baseline": "bool", "seeds": "string", "auroc": "double", "auroc ± 95 %": "double",
        "accuracy": "double", "accuracy ± 95 %": "double", "epsilon": "double", "seconds": "double",
    }  # fmt: skip
    first, second = table.to_pylist()
    assert (first["rounds"], first["local.lr"], first["local.within_s"], first["auroc"]) == (5, 1.0, None, 0.8123456789)
    assert first["evaluation.baseline"] is False and second["epsilon"] == 2.5 and second["auroc"] is None
    long = parquet.read_table(tmp_path / "r.parquet")
    assert long.column("value").to_pylist() == [0.5, None, 0.25, 0.4, None]
    assert long.column("site").to_pylist() == ["va", "va", "ch", None, None]
    assert [str(long.schema.field(name).type) for name in ("seed", "round", "site", "value")] == [
        "int64", "int64", "string", "double",
    ]  # fmt: skip


def test_parquet_without_its_extra_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a", 0.8)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    run = CliRunner().invoke(app, ["compare", str(tmp_path), "--parquet", str(tmp_path / "t.parquet")])
    assert "pip install 'fedtailor[tables]'" in str(run.exception) and not (tmp_path / "t.parquet").exists()


@pytest.mark.parametrize(
    ("texts", "cells"),
    [
        (["1", "", "2"], [1, None, 2]),
        (["1", "2.5"], [1.0, 2.5]),
        (["true", "false"], [True, False]),
        (["true", "1"], ["true", "1"]),
        (["1", "[1]"], ["1", "[1]"]),
        (["NaN", "1e999"], ["NaN", "1e999"]),
        (["9223372036854775808"], ["9223372036854775808"]),
        (["", ""], [None, None]),
    ],
)
def test_settings_are_numbers_where_all_are(texts, cells):
    made = typed(texts)
    assert made.cells == cells and {type(cell) for cell in made.cells if cell is not None} <= {made.kind}
