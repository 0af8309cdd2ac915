"""A run's folder, its card, table and picture: nothing rounded down, nothing made up."""

import hashlib
import io
import os
import re
import sys
from fractions import Fraction

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from fedtailor import report, store
from fedtailor.card import at_most, model_card
from fedtailor.config import load
from fedtailor.errors import StoreError
from fedtailor.plots import curves, rounds_png
from fedtailor.report import console_table, write_run
from fedtailor.result import PrivacyResult, Result, model_bytes, model_file, versions, weighted

PARAMS = {"layers.head.weight": torch.tensor([[1.5, -2.0]]), "layers.head.bias": torch.zeros(1)}
FILES = ["model.safetensors", "rounds.png", "model_card.md", "config.yaml", "result.json"]
PLAN = load(["study=heart"]).plan
GOOD = {"auroc": 0.81, "accuracy": 0.7512, "loss": 0.5}
NONE = dict.fromkeys(GOOD)
EPSILON = 1.0000000004  # printed with three digits, 1.000 would claim too much


def site(rows=303, alone=GOOD, federated=GOOD, epsilon=EPSILON):
    metrics = {"local_only": alone, "federated": federated}
    return {"rows": rows, "metrics": metrics, "epsilon": epsilon, "bytes_sent": 12_345, "bytes_received": 999}


def made(**changes):
    """A private deployment of two sites, at one of which nothing was estimable."""
    sites = {"va": site(rows=200), "ch": site(rows=123, alone=NONE, federated=NONE)}
    rounds = [{"round": r, "sites": {"va": GOOD, "ch": NONE}, "metrics": GOOD} for r in range(3)]
    raw = {
        "schema": "fedtailor.result/1", "study": "heart", "strategy": "fedavg", "rounds": 2, "sites": sites,
        "metrics": {"local_only": GOOD, "federated": GOOD}, "seed": 7, "engine": "flower",
        "privacy": {"unit": "record", "delta": 1e-5, "epsilon_max": EPSILON, "accountant": "PLD", "epsilon_budget": 3.0},
        "timing": {"wall_s": 9.0, "setup_s": 1.0, "round_s": [1.0, 2.0]}, "history": rounds,
        "transport": {"tls": True, "mutual_tls": True, "node_auth": True},
        "model": model_file(PARAMS).model_dump(), "versions": {"python": "3.11.7"},
    }  # fmt: skip
    return Result.model_validate(raw | changes)


def write(folder, result=None, params=PARAMS):
    write_run(folder, result=result or made(), plan=PLAN, model=params, config_yaml="study: heart\n")


def printed(result):
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(console_table(result))
    return out.getvalue()


def line(text, start):
    return next(row for row in text.splitlines() if row.strip(" |").startswith(start))


def test_a_result_comes_back_from_json_under_the_alias_schema():
    result = made(dropped=[{"round": 1, "site": "va", "code": "deadline"}], status="stopped")
    text = result.model_dump_json(by_alias=True)
    assert Result.model_validate_json(text) == result
    assert '"schema":"fedtailor.result/1"' in text and "schema_" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": {"federated": {"auroc": float("nan")}}}, r"metrics\.federated\.auroc"),
        ({"sites": {"va": site(federated={"auroc": float("inf")})}}, r"sites\.va\.metrics\.federated\.auroc"),
        ({"sites": {"va": site(epsilon=float("inf"))}}, r"sites\.va\.epsilon"),
        ({"sites": {"va": site(epsilon=-1.0)}}, r"sites\.va\.epsilon"),
        ({"sites": {"va": site() | {"patients": 3}}}, r"sites\.va\.patients"),
        ({"metrics": {"best": GOOD}}, "metrics.best"),
        ({"history": [{"round": 0, "sites": {"va": {"auroc": float("nan")}}, "metrics": {}}]}, "auroc"),
        ({"history": [{"round": 0, "sites": {}, "metrics": {}, "rows": 3}]}, "rows"),
        ({"dropped": [{"round": 0, "site": "va"}]}, "code"),
        ({"timing": {"wall_s": float("nan"), "setup_s": 0, "round_s": []}}, r"timing\.wall_s"),
        ({"schema": "fedtailor.result/2"}, "schema"),
        ({"status": "fine"}, "status"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_result_refuses_what_is_not_finite_or_not_known(changes, words):
    with pytest.raises(ValidationError, match=words):
        made(**changes)


def test_means_are_weighted_by_rows_over_the_sites_that_could_estimate():
    by_site = {"a": {"auroc": 0.9, "f1": None}, "b": {"auroc": 0.6, "f1": None}, "c": {"auroc": None}}
    assert weighted(by_site, {"a": 100, "b": 200, "c": 900}) == {"auroc": pytest.approx(0.7), "f1": None}
    assert weighted({"a": {"auroc": 0.9}}, {"a": 0}) == {"auroc": None} and weighted({}, {}) == {}


def test_the_model_file_is_described_as_the_library_reads_it():
    raw, described = model_bytes(PARAMS), model_file(PARAMS)
    assert described.sha256 == hashlib.sha256(raw).hexdigest() and described.parameters == 3
    loaded = safetensors.torch.load(raw)
    assert loaded.keys() == PARAMS.keys() and all(torch.equal(loaded[name], PARAMS[name]) for name in PARAMS)
    assert versions()["python"] == ".".join(map(str, sys.version_info[:3])) and "torch" in versions()


@pytest.fixture
def drawn(monkeypatch):
    """Pictures in no time."""
    monkeypatch.setattr(report, "rounds_png", lambda result: (b"picture", "") if result.history else (None, "why"))


@pytest.mark.usefixtures("drawn")
def test_a_run_is_written_with_its_result_last(tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(os.path.basename(b)), replace(a, b)))
    write(tmp_path / "a" / "run")
    assert order == FILES and sorted(os.listdir(tmp_path / "a" / "run")) == sorted(FILES)
    folder = tmp_path / "a" / "run"
    assert Result.model_validate_json((folder / "result.json").read_text()) == made()
    assert store.digest(folder / "model.safetensors") == made().model.sha256
    assert (folder / "model_card.md").read_text() == model_card(made(), PLAN)
    assert (folder / "config.yaml").read_text() == "study: heart\n"


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("failing", FILES)
def test_a_run_that_cannot_be_written_has_no_result_not_even_an_earlier_one(tmp_path, monkeypatch, failing):
    write(tmp_path)
    replace = os.replace

    def full(a, b):
        if os.path.basename(b) == failing:
            raise OSError(28, "No space left on device")
        replace(a, b)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match=f"{failing} cannot be written: No space left"):
        write(tmp_path, made(seed=8))
    assert not (tmp_path / "result.json").exists() and not list(tmp_path.glob(".*"))
    whole = {"model.safetensors": model_bytes(PARAMS), "config.yaml": b"study: heart\n"}
    assert all((tmp_path / name).read_bytes() == raw for name, raw in whole.items())


def test_a_folder_or_a_model_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"model\.safetensors is not the model that the result describes"):
        write(tmp_path / "run", params=PARAMS | {"layers.head.bias": torch.ones(1)})
    assert not (tmp_path / "run" / "result.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be made: Not a directory; choose another folder"):
        write(tmp_path / "file" / "run")


@pytest.mark.usefixtures("drawn")
def test_a_picture_of_an_earlier_run_does_not_stay(tmp_path):
    write(tmp_path)
    assert (tmp_path / "rounds.png").read_bytes() == b"picture"
    write(tmp_path, made(history=[]))
    assert not (tmp_path / "rounds.png").exists()


@example(2.007)  # times 1000 it is a little more than 2007
@given(
    st.floats(0, 1e6) | st.builds(lambda n, more: n / 1000 + more, st.integers(0, 5000), st.sampled_from([0, 1e-12]))
)
def test_an_epsilon_is_never_rounded_down_and_hardly_up(epsilon):
    shown = at_most(epsilon)
    assert re.fullmatch(r"\d+\.\d{3}", shown) and float(shown) >= epsilon
    assert Fraction(shown) - Fraction(str(epsilon)) < Fraction(1, 1000)


def test_card_and_table_say_what_was_spent_rounded_up():
    text = model_card(made(), PLAN)
    assert "**(1.001, 1e-05)-differential privacy for one record**" in text
    assert "| va | 1.001" in text and "1.000" not in text
    assert "1.001" in line(printed(made()), "va") and "1.000" not in printed(made())


def test_only_a_simulated_private_run_says_that_it_must_not_be_released():
    words = "must not be released"
    assert words in model_card(made(engine="simulation", transport=None), PLAN)
    assert "do not release" in " ".join(printed(made(engine="simulation", transport=None)).split())
    assert words not in model_card(made(), PLAN) and "do not release" not in " ".join(printed(made()).split())


def test_the_card_of_a_population_promises_nothing_to_a_deployments_sites():
    site_level = {"unit": "site", "delta": 1e-5, "epsilon_max": EPSILON, "accountant": "PLD", "epsilon_budget": 3.0}
    simulated = {"engine": "simulation", "transport": None}
    of = {"partition": "drawn", "clients": 1000, "cohort": 30}
    same, every = "what the same study gives in a deployment", "every site took"
    text = model_card(made(**simulated, privacy=site_level, population=of), PLAN)
    assert same not in text and "a deployment of this plan has none of them, asks its sites in every round" in text
    assert every not in text and "30 of 1000 virtual clients took" in text and "`drawn`" in text
    for changes in ({"privacy": site_level}, {"population": of}):  # what a record costs is the same with both
        assert same in model_card(made(**simulated, **changes), PLAN)
    assert every in model_card(made(), PLAN) and "virtual" not in model_card(made(), PLAN)


def test_the_card_of_rounds_that_wait_for_nobody_says_so():
    plan = load(["study=heart", "buffer={answers: 2}", "quorum=1"]).plan
    assert "rounds, each closed by 2 answers or its deadline" in model_card(made(), plan)
    assert "; for each, a site took" in model_card(made(), plan)
    of = {"partition": "drawn", "clients": 1000, "cohort": 30, "answers": 20}
    text = model_card(made(engine="simulation", transport=None, population=of), plan)
    assert "each closed by 20 answers" in text and "for each, one of 1000 virtual clients, 30 at a time, took" in text


def test_without_privacy_none_is_claimed():
    result = made(privacy=None, sites={"va": site(epsilon=None)})
    assert "**No differential privacy.**" in model_card(result, PLAN) and "-differential" not in model_card(
        result, PLAN
    )
    assert "no differential privacy" in printed(result) and "no DP" in line(printed(result), "va")


def test_not_estimable_is_a_word_and_never_a_number():
    text = model_card(made(), PLAN)
    assert all(f"| ch | {name} | not estimable | not estimable |" in text for name in GOOD)
    assert "| va | accuracy | 0.751 | 0.751 |" in text
    assert line(printed(made()), "ch").count("n/e → n/e") == 2 and "n/e: not estimable" in printed(made())
    assert "n/e" not in printed(made(sites={"va": site()}))


def test_not_measured_is_not_called_not_estimable():
    result = made(sites={"va": site(alone={}), "ch": site(alone={}, federated={})}, metrics={"federated": GOOD})
    assert "| va | auroc | not measured | 0.810 |" in model_card(result, PLAN)
    assert "– → 0.810" in line(printed(result), "va") and "n/e" not in printed(result)
    assert "– → –" in line(printed(result), "ch")
    assert line(printed(made(sites={"ch": site(alone={}, federated={})}, metrics={})), "ch")


def test_the_card_says_how_the_study_ended_and_which_replies_did_not_count():
    lost = [{"round": r, "site": "va", "code": "deadline"} for r in range(25)]
    text = model_card(made(status="stopped", dropped=lost), PLAN)
    assert "did not run to its end: stopped" in text and "va in round 19 (deadline), and 5 more" in text
    assert "did not run to its end" not in model_card(made(), PLAN) and "did not count:" not in model_card(made(), PLAN)
    assert made().model.sha256 in text and PLAN.digest() in text and "mutual TLS and authenticated nodes" in text
    bare = made(transport={"tls": False, "mutual_tls": False, "node_auth": False})
    assert "**unprotected connections**" in model_card(bare, PLAN)


def test_the_unit_of_a_site_is_stated_as_such():
    stated = PrivacyResult(unit="site", delta=1e-5, epsilon_max=2.0, accountant="PLD")
    text = model_card(made(privacy=stated.model_dump()), PLAN)
    assert "(2.000, 1e-05)-differential privacy for one site" in text and "Unit: one site" in text


def test_the_picture_is_a_png_or_says_why_there_is_none(monkeypatch):
    pytest.importorskip("matplotlib")
    plot, why = rounds_png(made())
    assert plot.startswith(b"\x89PNG\r\n\x1a\n") and plot.endswith(b"IEND\xaeB`\x82") and why == ""
    plot, why = rounds_png(made(history=[]))
    assert plot is None and why == "no metric was estimable at any site in any round"
    assert f"There is no picture of the rounds: {why}." in model_card(made(), PLAN, why)
    assert "rounds.png" in model_card(made(), PLAN) and "rounds.png" not in model_card(made(), PLAN, why)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plot, why = rounds_png(made())
    assert plot is None and why == "matplotlib is not installed: pip install 'fedtailor[plots]'"


def test_what_is_drawn_is_auroc_or_the_first_metric_that_could_be_estimated():
    assert curves(made()) == ("auroc", [("va", [(1, 0.81), (2, 0.81)], 0.81)])
    late = [{"round": 1, "sites": {"va": {"f1": 0.5, "auroc": 0.6}}, "metrics": {}}]
    assert curves(made(history=late)) == ("auroc", [("va", [(1, 0.6)], 0.81)])
    rounds = [{"round": r, "sites": {"va": {"f1": None, "auroc": None, "loss": r / 4}}, "metrics": {}} for r in (0, 1)]
    assert curves(made(history=rounds)) == ("loss", [("va", [(1, 0.25)], 0.5)])
    assert curves(made(history=rounds[:1])) == ("loss", [("va", [(0, 0.0)], 0.5)])
