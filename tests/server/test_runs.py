"""What the coordinator keeps on disk: runs, checkpoints, its home. Damage is named, and nothing is half-written."""

import errno
import json
import os
import stat

import pytest
import torch

from fedtailor.config import load
from fedtailor.errors import ConfigError, StoreError
from fedtailor.server.folding import Closed
from fedtailor.server.home import Home, ServerConfig
from fedtailor.server.record import Progress, noted, result_of
from fedtailor.server.runs import Run
from fedtailor.wire import Report

PLAN = load(["study=heart", "sites=[a,b]", "quorum=1", "rounds=3", "privacy=none", "seed=5"]).plan
STATE = {"params": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(0.5)}, "n": torch.tensor(3)}
PROGRESS = Progress(
    round=2,
    history=({"round": 0, "sites": {"a": {"auroc": 0.75}}},),
    dropped=({"round": 1, "site": "b", "code": "late"},),
    round_s=(0.5, 0.25),
    work_s=(0.1, 0.1),
    wall_s=1.5,
    sites={"a": {"rows": 9, "epsilon": None}},
)


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "studies", PLAN, "study: heart\n", str)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A coordinator's home."""
    home = Home(tmp_path_factory.mktemp("home"))
    home.init(ServerConfig(name="test", port=1234, hosts=("hub.example", "127.0.0.1")))
    return home


# --- a run's folder ---


def test_a_new_run_is_proposed_with_its_plan(run):
    assert run.plan() == PLAN and run.plan().digest() == PLAN.digest()
    assert run.status() == (run.name, "heart", "proposed", 0, 3, "") and not run.ended()
    assert (run.folder / "config.yaml").read_text() == "study: heart\n"
    assert run.load(PLAN.digest()) is None and not run.agreed()
    run.agree()
    assert run.agreed() and run.status().status == "queued"


def test_runs_of_one_plan_in_one_second_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    names = [Run.create(tmp_path, PLAN, "", str).name for _ in range(4)]
    stem = f"heart-20260101-000000-{PLAN.digest()[:4]}"
    assert names == [stem, f"{stem}-1", f"{stem}-2", f"{stem}-3"]


@pytest.mark.parametrize("status,ended", [("running", False), ("completed", True), ("stopped", True), ("failed", True)])
def test_a_status_is_read_as_it_was_written(run, status, ended):
    run.write_status(status, 2, "why")
    assert Run(run.folder).status()[2:] == (status, 2, 3, "why") and run.ended() is ended


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"status": "running"}', "7", b"\xff\xfe"])
def test_an_unreadable_status_is_shown_as_failed(run, text):
    path = run.folder / "status.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run.status()[2:] == ("failed", 0, 3, "status.json cannot be read")
    run.ended()  # does not raise


@pytest.mark.parametrize("text", [None, "{", "[]", '{"study": "heart"}', b"\xff\xfe"])
def test_an_unreadable_plan_is_named(run, text):
    path = run.folder / "plan.json"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(StoreError, match="plan.json"):
        run.plan()


# --- checkpoints ---


def same(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert same(value, two[key]) if isinstance(value, dict) else torch.equal(value, two[key])
    return True


def test_a_checkpoint_comes_back_as_it_was(run):
    run.save(STATE, Progress(), PLAN.digest())
    run.save(STATE, PROGRESS, PLAN.digest())
    state, progress = Run(run.folder).load(PLAN.digest())
    assert same(state, STATE)
    assert json.dumps(progress._asdict()) == json.dumps(PROGRESS._asdict())
    again = noted(progress, PLAN, Closed(None, {}, {"b": "late"}, {}, {}), 2, 1.0)  # and it can be added to
    assert len(again.dropped) == 2 and again.round_s == (0.5, 0.25, 1.0)


def test_a_checkpoint_of_another_plan_is_refused(run):
    run.save(STATE, PROGRESS, PLAN.model_copy(update={"seed": 6}).digest())
    with pytest.raises(StoreError, match="checkpoint.safetensors belongs to another plan"):
        run.load(PLAN.digest())


def test_a_corrupted_checkpoint_is_refused_and_named_wherever_the_damage_is(run):
    run.save(STATE, PROGRESS, PLAN.digest())
    path = run.folder / "checkpoint.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in (0, 9, whole.index(b"history"), whole.index(b"auroc") + 2, header, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StoreError, match="checkpoint.safetensors"):
            run.load(PLAN.digest())
    for cut in (0, 5, header, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(StoreError, match="checkpoint.safetensors"):
            run.load(PLAN.digest())
    path.write_bytes(whole)
    assert run.load(PLAN.digest())[1].round == 2


def test_a_full_disk_leaves_the_checkpoint_before_it(run, monkeypatch):
    run.save(STATE, PROGRESS, PLAN.digest())

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="checkpoint.safetensors cannot be written: No space left"):
            run.save(STATE | {"n": torch.tensor(4)}, PROGRESS._replace(round=3), PLAN.digest())
    state, progress = run.load(PLAN.digest())
    assert progress.round == 2 and int(state["n"]) == 3
    assert not [p.name for p in run.folder.iterdir() if p.name.startswith(".")]
    run.save(STATE, PROGRESS._replace(round=3), PLAN.digest())
    assert run.load(PLAN.digest())[1].round == 3


# --- the record ---


def report(**changed):
    fields = {"run": "r", "round": 0, "rows": 30, "train_rows": 20, "summand_sha256": "0" * 64, "salt": "0" * 64}
    return Report(**fields | changed)


def test_the_record_adds_up_what_rounds_brought():
    reports = {"a": report(metrics={"auroc": 0.9}, seconds=2.0), "b": report(rows=90, train_rows=60, seconds=1.0)}
    first = Closed(None, reports, {"c": "late"}, {"a": 100, "b": 10}, {"a": 7, "b": 7, "c": 7})
    record = noted(Progress(), PLAN, first, 0, 4.0)
    assert record.sites["a"]["bytes_sent"] == 100 and record.sites["c"] == {"bytes_sent": 0, "bytes_received": 7}
    assert (record.round_s, record.work_s) == ((4.0,), (2.0,))
    last = {
        "a": report(round=1, metrics={"auroc": 0.5}, baseline={"auroc": 0.4}, epsilon=1.5),
        "b": report(round=1, metrics={"auroc": 0.9}, rows=90, train_rows=60),
    }
    final = noted(record, PLAN, Closed(None, last, {}, {"a": 1, "b": 1}, {"a": 7, "b": 7}), 1, None)
    assert record.sites["a"]["bytes_sent"] == 100 and final.sites["a"]["bytes_sent"] == 101  # not changed in place
    assert final.round_s == (4.0,) and final.dropped == ({"round": 0, "site": "c", "code": "late"},)
    transport = {"tls": True, "mutual_tls": True, "node_auth": True}
    result = result_of(PLAN, final._replace(round=1), STATE["params"], status="completed", setup_s=0.0, transport=transport)  # fmt: skip
    assert set(result.sites) == {"a", "b"} and result.dropped == [{"round": 0, "site": "c", "code": "late"}]
    assert result.metrics["federated"]["auroc"] == pytest.approx((20 * 0.5 + 60 * 0.9) / 80)
    assert result.metrics["local_only"] == {"auroc": 0.4} and result.sites["a"].epsilon == 1.5
    assert result.sites["b"].metrics["local_only"] == {} and result.sites["a"].bytes_received == 14


def test_a_sites_own_model_counts_with_its_last_figure_only():
    """An answer to an earlier round, and a site that misses the final visit, say nothing of the model at the end."""
    first = {"a": report(personal={"auroc": 0.7}), "b": report(personal={"auroc": 0.6})}
    sizes = {"a": 1, "b": 1}
    record = noted(Progress(), PLAN, Closed(None, first, {}, sizes, {}), 0, 1.0)
    late = {"a": report(personal={"auroc": 0.1})}
    record = noted(record, PLAN, Closed(None, late, {}, sizes, {}), 1, 1.0)
    assert {name: site["personal"] for name, site in record.sites.items()} == {"a": {"auroc": 0.7}, "b": {"auroc": 0.6}}
    last = {"a": report(round=2, personal={"auroc": 0.9})}
    final = noted(record, PLAN, Closed(None, last, {"b": "late"}, sizes, {}), 2, None)
    assert final.sites["a"]["personal"] == {"auroc": 0.9} and "personal" not in final.sites["b"]
    result = result_of(PLAN, final, STATE["params"], status="completed", setup_s=0.0, transport=None)
    assert result.metrics["personal"] == {"auroc": 0.9} and result.sites["b"].metrics["personal"] == {}


# --- the home ---


def test_a_home_is_made_once_and_its_ca_is_never_replaced(made):
    ca = (made.tls / "ca.key").read_bytes()
    with pytest.raises(ConfigError, match="already"):
        made.init(ServerConfig())
    (made.folder / "server.yaml").rename(made.folder / "kept")
    with pytest.raises(ConfigError, match="ca.key exists"):
        made.init(ServerConfig())
    (made.folder / "kept").rename(made.folder / "server.yaml")
    assert (made.tls / "ca.key").read_bytes() == ca and stat.S_IMODE(made.folder.stat().st_mode) == 0o700
    assert made.config() == ServerConfig(name="test", port=1234, hosts=("hub.example", "127.0.0.1"))


BAD = {
    "prt: 8443": "prt",
    **{f"port: {port}": "port" for port in (0, 65536, "many")},
    "name: Not A Name": "name",
    "hosts: 7": "hosts",
    "- a list": "server.yaml",
    "{": "server.yaml cannot be read",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_wrong_in_server_yaml_is_named(tmp_path, text):
    (tmp_path / "server.yaml").write_text(text)
    with pytest.raises(ConfigError, match=BAD[text]) as error:
        Home(tmp_path).config()
    assert "server.yaml" in str(error.value)


def test_a_server_yaml_that_is_missing_or_not_utf_8_is_named(tmp_path):
    with pytest.raises(ConfigError, match="server.yaml does not exist.*server init"):
        Home(tmp_path).config()
    (tmp_path / "server.yaml").write_bytes("name: universität".encode("latin-1"))
    with pytest.raises(ConfigError, match="server.yaml cannot be read"):
        Home(tmp_path).config()
