"""The data contract: every problem is named by column, row and value, with the way out."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from fedtailor import contract as contracts
from fedtailor.contract import Contract, Row, check, load_contract
from fedtailor.errors import ConfigError, ContractError

GOOD = {
    "name": "ward",
    "columns": [
        {"name": "weight", "kind": "number", "unit": "kg", "bounds": [1, 300], "missing": [0, -9], "required": False},
        {"name": "stage", "kind": "category", "codes": [1, 2, 3], "missing": ["?"]},
        {"name": "smokes", "kind": "category", "codes": [False, True], "required": True},
    ],
    "label": {"name": "died", "positive": [1, "yes"], "negative": [0, "no"]},
    "min_rows": 1,
}
ROW = {"weight": "80", "stage": "1", "smokes": "true", "died": "1"}


def made(**changes):
    return Contract.model_validate(GOOD | changes)


def column(index, **changes):
    columns = [dict(each) for each in GOOD["columns"]]
    columns[index] |= changes
    return {"columns": columns}


def table(*rows):
    return {name: [(ROW | row).get(name, "") for row in rows] for name in dict.fromkeys([*ROW, *rows[0]])}


def problems(contract, cells):
    with pytest.raises(ContractError) as refusal:
        check(contract, cells)
    assert refusal.value.code == "contract"
    return str(refusal.value).split("; ")


def heart(**changes):
    return {name: ["1"] * 30 for name in (c.name for c in load_contract("heart").columns)} | changes


def test_rows_are_coded_by_hand():
    rows = check(
        made(),
        table({}, {"weight": "72.5", "stage": "3", "smokes": "FALSE", "died": "No"}, {"stage": "", "died": "YES"}),
    )
    assert rows == [
        Row((80.0, 0.0, 1.0), 1.0, None),
        Row((72.5, 2.0, 0.0), 0.0, None),
        Row((80.0, None, 1.0), 1.0, None),
    ]


@pytest.mark.parametrize("cell", ["0", "0.0", " -9 ", "-9.00", "", "  "])
def test_a_code_for_missing_is_missing_and_not_out_of_bounds(cell):
    assert check(made(), table({"weight": cell}))[0].values[0] is None
    assert check(made(), table({"stage": " ? "}))[0].values[1] is None


@pytest.mark.parametrize("cell", ["1", "1.0", " 1 ", "01", "1e0", "+1"])
@pytest.mark.parametrize("code", [1, 1.0, "1", "1.0", "01"])
def test_one_and_one_point_zero_are_one_code(cell, code):
    other = made(**column(1, codes=[code, 2]), label={"name": "died", "positive": [code], "negative": [0]})
    assert check(other, table({"stage": cell, "died": cell})) == [Row((80.0, 0.0, 1.0), 1.0, None)]


def test_long_codes_that_differ_in_the_last_digit_are_two():
    codes = [900000000000207008, 900000000000207009]
    other = made(**column(1, codes=codes), label={"name": "died", "positive": [codes[1]], "negative": [codes[0]]})
    rows = check(other, table(*({"stage": str(code), "died": str(code)} for code in codes)))
    assert [(row.values[1], row.label) for row in rows] == [(0.0, 0.0), (1.0, 1.0)]
    near = made(**column(0, bounds=[0, 1e6], missing=[999999]))
    assert check(near, table({"weight": "999999.4"}))[0].values[0] == 999999.4


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"weight": "heavy"}, "weight, row 2: 'heavy' is not a number"),
        ({"weight": "1,5"}, "weight, row 2: '1,5' is not a number"),
        ({"weight": "300.1"}, "weight, row 2: 300.1 lies outside 1 to 300; is it in kg?"),
        ({"weight": "0.5"}, "weight, row 2: 0.5 lies outside 1 to 300; is it in kg?"),
        ({"weight": "nan"}, "weight, row 2: nan lies outside 1 to 300; is it in kg?"),
        ({"weight": "inf"}, "weight, row 2: inf lies outside 1 to 300; is it in kg?"),
        ({"stage": "4"}, "stage, row 2: '4' is not one of the codes 1, 2, 3"),
        ({"stage": "1.5"}, "stage, row 2: '1.5' is not one of the codes 1, 2, 3"),
        ({"smokes": "1"}, "smokes, row 2: '1' is not one of the codes false, true"),
        ({"smokes": ""}, "smokes, row 2: a value is required and there is none"),
        ({"died": ""}, "died, row 2: the label is missing; leave such a row out"),
        ({"died": "2"}, "died, row 2: '2' is not one of the label's codes"),
    ],
)
def test_a_cell_that_is_wrong_is_named(row, words):
    assert "; ".join(problems(made(), table({}, row, {}))) == words


def test_a_bound_itself_is_inside():
    assert [row.values[0] for row in check(made(), table({"weight": "1"}, {"weight": "300"}))] == [1.0, 300.0]


def test_a_missing_column_is_named_with_the_nearest_name():
    cells = heart(num=["0"] * 30)
    cells["talach"] = cells.pop("thalach")
    cells.pop("ca")
    assert problems(load_contract("heart"), cells) == [
        "column 'thalach' is missing",
        "rename 'talach', if that is it",
        "column 'ca' is missing",
    ]
    assert problems(load_contract("heart"), heart()) == ["column 'num' is missing"]


def test_a_column_that_serves_already_is_not_offered_for_another():
    cells = table({})
    cells["weigth"] = cells.pop("weight")
    assert "rename 'weigth', if that is it" in problems(made(subject="weights"), cells)
    assert problems(made(subject="weights"), table({})) == ["column 'weights' is missing"]


def test_units_of_the_heart_contract_are_asked_about():
    cells = heart(num=["0"] * 30, age=["50"] * 30, trestbps=["130"] * 30, thalach=["140"] * 30, thal=["3"] * 30)
    cells |= {"chol": ["5.2"] + ["200"] * 29}
    assert problems(load_contract("heart"), cells) == ["chol, row 1: 5.2 lies outside 60 to 700", "is it in mg/dl?"]
    rows = check(load_contract("heart"), cells | {"chol": ["0"] + ["200"] * 29, "ca": ["-9.0"] * 30})
    assert rows[0].values[4] is None and rows[1].values[4] == 200.0 and rows[0].values[11] is None


@pytest.mark.parametrize("count", [9, 10, 11, 500])
def test_ten_problems_are_told_at_once(count):
    told = problems(made(), table(*({"stage": "x"} for _ in range(count))))
    assert sum(text.startswith("stage, row") for text in told) == min(count, 10)
    assert any("only the first ten are told" in text for text in told) == (count > 10)


def test_ten_problems_are_told_even_of_one_row_or_of_the_header():
    wide = made(columns=[{"name": f"c{i}", "kind": "number", "bounds": [0, 1]} for i in range(14)])
    for cells in ({f"c{i}": ["x"] for i in range(14)} | {"died": ["1"]}, {"died": ["1"]}):
        told = problems(wide, cells)
        assert [text.startswith(("c", "column 'c")) for text in told] == [True] * 10 + [False]


def test_too_few_rows_are_counted():
    assert problems(made(min_rows=3), table({}, {})) == ["2 rows", "the contract 'ward' asks for at least 3"]
    assert len(check(made(min_rows=2), table({}, {}))) == 2


def test_every_row_needs_its_subject():
    cells = table({"who": "p1"}, {"who": ""}, {"who": "p1"})
    assert problems(made(subject="who"), cells) == ["who, row 2: the subject is missing", "every row needs one"]
    assert [r.subject for r in check(made(subject="who"), cells | {"who": ["p1", "p2", "p1"]})] == ["p1", "p2", "p1"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (column(0, bounds=None), "weight: a number needs bounds"),
        (column(0, bounds=[3, 3]), "weight: a number needs bounds"),
        (column(0, bounds=[0, float("inf")]), r"columns\.0\.bounds"),
        (column(0, default=0.5), "weight: default 0.5 lies outside the bounds"),
        (column(1, codes=[1]), "stage: a category needs at least two codes"),
        (column(1, kind="text"), r"columns\.1\.kind"),
        (column(1, colour="red"), r"columns\.1\.colour"),
        (column(1, name="weight"), "column 'weight' is declared twice"),
        (column(1, name="died"), "column 'died' is declared twice"),
        ({"columns": []}, "columns"),
        ({"min_rows": 0}, "min_rows"),
        ({"version": 0}, "version"),
        ({"label": {"name": "died", "positive": [], "negative": [0]}}, r"label\.positive"),
        ({"label": {"name": "died", "positive": [1]}}, r"label\.negative"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_malformed_contract_is_refused_by_field(changes, words):
    with pytest.raises(ValidationError, match=words):
        made(**changes)


def test_a_contract_is_found_by_name_or_the_nearest_is_told():
    heart = load_contract("heart")
    assert len(heart.columns) == 13 and heart.label.name == "num" and heart.min_rows == 30
    with pytest.raises(ConfigError, match="'haert' is not installed; did you mean 'heart'") as refusal:
        load_contract("haert")
    assert refusal.value.code == "unknown"
    for name in ("zzz", "../../../etc/passwd", ""):
        with pytest.raises(ConfigError, match="is not installed; there are heart"):
            load_contract(name)


@pytest.mark.parametrize("text", ["columns: [", "name: bad", "- a list"])
def test_an_installed_contract_that_is_malformed_is_named(tmp_path, monkeypatch, text):
    (tmp_path / "contract").mkdir()
    (tmp_path / "contract" / "bad.yaml").write_text(text)
    monkeypatch.setattr(contracts.resources, "files", lambda package: Path(tmp_path))
    with pytest.raises(ConfigError, match="contract 'bad' is malformed"):
        load_contract("bad")
