"""The audit log: who did what, in words and hashes; and it knows when another log was put back."""

import json
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from fedtailor import pki
from fedtailor.cli import audit as commands
from fedtailor.client.audit import Audit, heads, person
from fedtailor.client.chain import Chain, rows
from fedtailor.client.ledger import Cap, Charge, Ledger
from fedtailor.client.signing import Signer, load_signer
from fedtailor.errors import ConfigError, RefusedError, StoreError

SIGNER = Signer(ec.derive_private_key(20260101, ec.SECP384R1()))
WORK = {"account": "heart", "fingerprint": "f0", "study": "s", "charge": Charge(1.0, 0.032, 20), "cap": Cap(3.0, 1e-5)}


@pytest.fixture
def audit(tmp_path):
    return Audit(tmp_path / "audit.jsonl", SIGNER)


def said(audit):
    return [{k: v for k, v in row.items() if k != "time"} for row in rows(audit.chain.path)]


def test_who_did_what(audit):
    audit.note("coordinator", "plan", run="heart-1", round=3, sha256="a" * 64, epsilon=1.5, codes=("budget", "noise"))
    audit.note("person:alice", "approved", ok=True, nothing=None)
    assert said(audit) == [
        {"who": "coordinator", "what": "plan", "run": "heart-1", "round": 3, "sha256": "a" * 64, "epsilon": 1.5,
         "codes": ["budget", "noise"]},
        {"who": "person:alice", "what": "approved", "ok": True, "nothing": None},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value", ["Jane Doe", "1,2,3;4", "a\nb", "x" * 201, "é", {"a": 1}, [["a"]], ["a b"], b"a", float("nan")]
)
def test_a_text_a_row_or_a_table_is_no_fact(audit, value):
    with pytest.raises(ValueError, match="fact is no number, word or hash") as error:
        audit.note("daemon", "did", fact=value)
    assert "Jane" not in str(error.value) and said(audit) == []
    with pytest.raises(ValueError):
        audit.changed("daemon", "did", fact=value)
    assert said(audit) == []


def test_only_a_change_is_noted_also_after_a_restart(audit):
    first, second = {"sha256": "a" * 64}, {"sha256": "b" * 64}
    told = [audit.changed("daemon", "policy", **facts) for facts in (first, first, second, second, first)]
    assert told == [True, False, True, False, True]
    again = Audit(audit.chain.path, SIGNER)
    assert not again.changed("daemon", "policy", **first) and again.changed("daemon", "data", **first)
    assert len(said(audit)) == 4


@pytest.mark.parametrize("sent,name", [("alice", "alice"), ("DOMAIN\\bob", "DOMAINbob"), ("a b\n", "ab"), ("", "unknown"),
                                       ("é", "unknown"), (None, "None"), ("x" * 100, "x" * 64)])  # fmt: skip
def test_a_persons_name_is_a_word(audit, sent, name):
    assert person({"who": sent}) == f"person:{name}" and person({}) == "person:unknown"
    audit.note(person({"who": sent}), "asked")


def test_what_people_decide_is_noted_and_what_they_read_is_not(audit):
    def approve(request):
        if request["plan"] == "bad":
            raise RefusedError("no", code="budget")
        return {"run": "heart-1", "hash": "a" * 64, "state": "approved", "sites": ["a text, at length"]}

    methods = audit.attend({"Approve": approve, "Status": lambda _: {"run": "r"}})
    assert methods["Status"]({"who": "alice"}) == {"run": "r"} and said(audit) == []
    assert methods["Approve"]({"who": "alice", "plan": "a"})["state"] == "approved"
    with pytest.raises(RefusedError):
        methods["Approve"]({"who": "bob", "plan": "bad"})
    methods["Approve"]({"who": "carol", "plan": "a", "officer": "key", "signature": "s"})
    assert said(audit) == [
        {"who": "person:alice", "what": "approved", "run": "heart-1", "plan": "a" * 64, "state": "approved"},
        {"who": "person:bob", "what": "approved", "refused": "budget"},
        {"who": f"officer:{sha256(b'key').hexdigest()[:32]}", "what": "approved", "run": "heart-1", "plan": "a" * 64,
         "state": "approved"},
    ]  # fmt: skip


class Site:
    def __init__(self, folder):
        self.folder = folder
        self.start()

    def start(self):
        (self.folder / "site.yaml").touch()
        self.ledger = Ledger(self.folder / "ledger.db", SIGNER)
        self.egress = Chain(self.folder / "egress.jsonl", SIGNER)
        self.audit = Audit(self.folder / "audit.jsonl", SIGNER)
        self.audit.begin(self.ledger, self.egress, self.folder / "site.yaml")


def test_a_start_says_with_what(tmp_path):
    site = Site(tmp_path)
    site.start()
    (tmp_path / "site.yaml").write_text("looser: true")
    site.start()
    assert [row["what"] for row in said(site.audit)] == ["started", "policy", "started", "started", "policy"]
    started, policy = said(site.audit)[-2:]
    assert started["version"] and (started["ledger"], started["egress"]) == tuple(
        heads(site.ledger, site.egress).values()
    )
    assert len(policy["sha256"]) == 64 != said(site.audit)[1]["sha256"]


def test_an_older_ledger_that_was_put_back_keeps_the_daemon_from_starting(tmp_path):
    site = Site(tmp_path)
    site.ledger.close()
    older = (tmp_path / "ledger.db").read_bytes()
    site.start()
    site.ledger.reserve(visit="v", **WORK)
    site.audit.note("daemon", "released", **heads(site.ledger, site.egress))
    site.ledger.close()
    site.start()  # nothing is wrong yet
    site.ledger.close()
    newest = (tmp_path / "ledger.db").read_bytes()
    (tmp_path / "ledger.db").write_bytes(older)
    for _ in range(2):
        with pytest.raises(StoreError, match="record 2 .*an older copy was put back. Restore the newest"):
            site.start()
    (tmp_path / "ledger.db").write_bytes(newest)
    site.start()


def test_an_egress_log_that_was_put_back_is_told(tmp_path, caplog):
    site = Site(tmp_path)
    site.egress.append(refused="budget")
    site.audit.note("daemon", "declined", **heads(site.ledger, site.egress))
    site.egress.path.unlink()
    site.start()
    assert "egress: record 2 is gone; the audit log still names it" in caplog.text


def test_keys_beside_the_sites_own_vouch_for_it(tmp_path):
    pki.make_ca(tmp_path / "ca", "test")
    for stem in ("site", "former"):
        pki.issue(tmp_path / "ca", tmp_path / "keys", stem, "a", server=False, hosts=[])
    (tmp_path / "keys" / "broken.key").write_text("nonsense")
    one = load_signer(tmp_path / "keys")
    assert len(one.former) == 1 and one.public not in one.vouching
    assert "PRIVATE" not in repr(one) and "key=" not in repr(one)


# --- the commands, with no daemon running ---


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "site"
    pki.make_ca(tmp_path / "ca", "test")
    pki.issue(tmp_path / "ca", folder / "keys", "site", "a", server=False, hosts=[])
    (folder / "state").mkdir()
    (folder / "site.yaml").write_text(
        json.dumps({"site": "a", "server": "hub:1", "data": {"name": "heart", "path": "x.csv"},
                    "policy": {"studies": ["heart"], "epsilon": 3.0, "delta": 1e-4}})
    )  # fmt: skip
    signer = load_signer(folder / "keys")
    ledger, egress = Ledger(folder / "state" / "ledger.db", signer), Chain(folder / "state" / "egress.jsonl", signer)
    audit = Audit(folder / "state" / "audit.jsonl", signer)
    audit.begin(ledger, egress, folder / "site.yaml")
    ledger.close()
    return folder


def run(*arguments):
    done = CliRunner().invoke(commands.app, [str(each) for each in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_show_verify_and_export(home, tmp_path):
    code, out = run("show", "--home", home, "--json")
    assert code == 0 and [row["what"] for row in json.loads(out)["rows"]] == ["started", "policy"]
    assert json.loads(run("show", "--home", home, "--json", "--since", "2999-01-01")[1])["rows"] == []
    assert len(json.loads(run("show", "--home", home, "--json", "--since", "2020-01-01T10:00")[1])["rows"]) == 2
    assert "started" in run("show", "--home", home)[1]
    with pytest.raises(ConfigError, match="--since tomorrow"):
        run("show", "--home", home, "--since", "tomorrow")
    file = tmp_path / "export.json"
    code, out = run("export", file, "--home", home)
    assert code == 0 and "3 records of the audit, 1 records of the egress, 1 records of the ledger" in out
    assert file.stat().st_mode & 0o777 == 0o600 and "PRIVATE" not in file.read_text()
    code, out = run("verify", "--home", home, "--earlier", file)
    assert code == 0 and "a: every record fits" in out and "not checked" not in out


def test_verify_fails_where_something_is_wrong(home, tmp_path):
    path = home / "state" / "egress.jsonl"
    head = json.loads(run("verify", "--home", home, "--json")[1])["notes"][1].split("head ")[1]
    assert run("verify", "--home", home, "--head", head)[0] == 0
    path.unlink()
    code, out = run("verify", "--home", home, "--head", head, "--json")
    assert code == 1 and "egress: record 1, earlier noted, is gone" in json.loads(out)["wrong"][0]
    with pytest.raises(StoreError, match="cannot be verified"):
        run("verify", "--home", home, "--head", "ledger")
    path.write_text("nonsense\n")
    with pytest.raises(StoreError, match="egress.jsonl: record 1 is not"):
        run("verify", "--home", home)
