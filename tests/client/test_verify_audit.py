"""What a site exports, examined by somebody who does not trust it and has no fedtailor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cryptography
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtailor import pki, store
from fedtailor.client import verify_audit
from fedtailor.client.audit import Audit, gather, heads
from fedtailor.client.chain import Chain
from fedtailor.client.ledger import Cap, Charge, Ledger
from fedtailor.client.signing import Signer, load_signer
from fedtailor.client.site import Home, SiteConfig
from fedtailor.client.verify_audit import NO_TENSORS, canonical, examine

SCRIPT = Path(__file__).parents[2] / "scripts" / "verify_audit.py"
RAW = {"site": "a", "server": "hub:1", "data": {"name": "heart", "path": "x.csv"},
       "policy": {"studies": ["heart"], "epsilon": 8.0, "delta": 1e-4}}  # fmt: skip


class Site:
    """A site's records, without a daemon."""

    def __init__(self, folder, keys):
        self.home, self.keys, self.rounds = Home(folder), keys, 0
        self.config = SiteConfig.model_validate(RAW).model_copy(update={"keys": keys})
        self.home.make()
        (folder / "site.yaml").write_text("policy: one")
        self.start()

    def start(self, signer=None):
        signer = signer or load_signer(self.keys)
        self.ledger = Ledger(self.home.state / "ledger.db", signer)
        self.egress = Chain(self.home.state / "egress.jsonl", signer)
        self.audit = Audit(self.home.state / "audit.jsonl", signer)
        self.audit.begin(self.ledger, self.egress, self.home.folder / "site.yaml")

    def round(self, digest=None, epsilon=1.0, pay=True, run="r"):
        """One answer, as the daemon accounts for it."""
        digest = digest or f"{self.rounds:064x}"
        if pay:
            one = self.ledger.reserve(account="heart", fingerprint="f", study=run, visit=f"v{self.rounds}",
                                      charge=Charge(4.0, 0.01, 1), cap=Cap(8.0, 1e-4))  # fmt: skip
            assert self.ledger.settle(one.id, digest)
            self.audit.note("daemon", "settled", run=run, sha256=digest, **heads(self.ledger, self.egress))
        self.egress.append(run="r", round=self.rounds, bytes=1, sha256=digest, epsilon=epsilon, metrics=[], baseline=[])
        self.audit.note("daemon", "released", **heads(self.ledger, self.egress))
        self.rounds += 1

    def export(self):
        return json.loads(json.dumps(gather(self.home, self.config)))


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    pki.make_ca(folder / "ca", "test")
    pki.make_ca(folder / "other", "test")  # of the same name
    pki.issue(folder / "ca", folder / "a", "site", "a", server=False, hosts=[])
    return folder


@pytest.fixture
def site(tmp_path, keys):
    it = Site(tmp_path / "site", keys / "a")
    for _ in range(3):
        it.round()
    yield it
    it.ledger.close()


def wrong(export, **given):
    return examine(export, **given)[0]


def test_an_honest_site_has_nothing_wrong(site, keys):
    found, notes = examine(
        site.export(), ca=(keys / "ca" / "ca.pem").read_bytes(), heads=[f"egress:{site.egress.head}"]
    )
    assert found == [] and notes == [
        f"audit: 9 records, head audit:{site.audit.chain.head}",
        f"egress: 4 records, head egress:{site.egress.head}",
        f"ledger: 7 records, head ledger:{site.ledger.head()[0]}:{site.ledger.head()[1]}",
    ]
    assert site.export()["ledger"] == site.ledger.export()
    assert any("not checked; give the consortium's" in note for note in examine(site.export())[1])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    log=st.sampled_from(verify_audit.LOGS),
    at=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 127),
    data=st.data(),
)
def test_a_flipped_byte_in_any_record_shows(site, log, at, flip, data):
    export = site.export()
    number = data.draw(st.integers(0, len(export[log]) - 1))
    text = bytearray(canonical(export[log][number]))
    text[int(at * len(text))] ^= flip
    try:
        export[log][number] = json.loads(text)
    except ValueError:
        return  # then it is no export at all
    found = wrong(export)
    assert found and found[0].startswith((f"{log}: record {number + 1} ", f"{log}: record {number + 2} "))


@pytest.mark.parametrize("log", verify_audit.LOGS)
@pytest.mark.parametrize("change", [lambda e: e.pop(1), lambda e: e.insert(1, e.pop(2)), lambda e: e.insert(1, e[1])])
def test_removed_reordered_and_doubled_records_are_named(site, log, change):
    export = site.export()
    change(export[log])
    assert wrong(export)[0].startswith((f"{log}: record 2 ", f"{log}: record 3 "))


@pytest.mark.parametrize("log", verify_audit.LOGS)
def test_a_cut_off_end_shows_against_an_earlier_export_or_a_noted_head(site, log):
    earlier = site.export()
    site.round()
    noted = {
        "egress": site.egress.head,
        "audit": site.audit.chain.head,
        "ledger": heads(site.ledger, site.egress)["ledger"],
    }
    export = site.export()
    assert wrong(export, earlier=earlier) == wrong(export, earlier=export) == []
    cut = export | {log: export[log][:-1]}
    gone = "is gone: an older copy was put back"
    assert any(line.startswith(f"{log}: record {len(export[log])}, earlier noted, {gone}")
               for line in wrong(cut, heads=[f"{log}:{noted[log]}"]))  # fmt: skip
    assert any(gone in line and "exported" in line for line in wrong(cut, earlier=export))
    assert any("egress" in line or "ledger" in line for line in wrong(cut)) == (log != "audit"), "the audit log knows"


def test_another_history_shows_against_an_earlier_export(site, tmp_path, keys):
    other = Site(tmp_path / "other", keys / "a")
    for _ in range(5):
        other.round()
    found = wrong(other.export(), earlier=site.export())
    assert len(found) == 3 and all("earlier exported, is another one now" in line for line in found)
    other.ledger.close()


def test_a_log_that_began_anew_under_the_old_ones_eyes_shows(site):
    """The whole file is honest and signed; but the audit log names records that it does not hold."""
    site.egress.path.unlink()
    site.start()
    site.round()
    assert any(line.startswith("egress: record 4, earlier in the audit log, is") for line in wrong(site.export()))


@pytest.mark.parametrize(
    "answer,fits",
    [
        ({}, True),
        ({"pay": False}, False),
        ({"run": "another"}, False),  # paid for, but by another run
        ({"pay": False, "epsilon": None}, True),  # a study without privacy
        ({"pay": False, "digest": NO_TENSORS}, True),  # metrics only
    ],
)
def test_every_private_answer_was_paid_for(site, answer, fits):
    site.round(**answer)
    expected = [] if fits else ["egress: record 5, run r, round 3: the ledger has no charge for it"]
    assert wrong(site.export()) == expected


def test_an_answer_without_tensors_is_what_the_store_writes():
    import hashlib

    assert hashlib.sha256(b"".join(store.safetensors({}))).hexdigest() == NO_TENSORS


def test_a_certificate_of_another_consortium_site_or_key_shows(site, keys, tmp_path):
    ca, other = ((keys / name / "ca.pem").read_bytes() for name in ("ca", "other"))
    export = site.export()
    assert wrong(export, ca=other) == ["the site's certificate was not issued by this consortium"]
    assert wrong(export | {"site": "b"}, ca=ca) == ["the site's certificate is not for 'b'"]
    pki.issue(keys / "ca", tmp_path / "b", "site", "b", server=False, hosts=[])
    found = wrong(export | {"certificate": (tmp_path / "b" / "site.pem").read_text()})
    assert len(found) == 3 and all("is not signed by the key of the site's certificate" in line for line in found)


def test_a_lost_key_is_told_until_it_is_accepted(site, keys, tmp_path):
    site.ledger.close()
    new = tmp_path / "new"
    pki.issue(keys / "ca", new, "site", "a", server=False, hosts=[])
    site.config, site.keys = site.config.model_copy(update={"keys": new}), new
    site.start()
    breaks = ["audit:10", "egress:5", "ledger:8"]
    assert [line.split(" begins")[0].replace(" record ", "") for line in wrong(site.export())] == breaks
    assert wrong(site.export(), accept=breaks) == [] and len(wrong(site.export(), accept=breaks[:2])) == 1


def test_a_renewed_key_that_the_old_one_vouches_for_fits(site, keys, tmp_path):
    site.ledger.close()
    new = tmp_path / "new"
    pki.issue(keys / "ca", new, "site", "a", server=False, hosts=[])
    (new / "former.key").write_bytes((keys / "a" / "site.key").read_bytes())
    (new / "former.key").chmod(0o600)
    site.config, site.keys = site.config.model_copy(update={"keys": new}), new
    site.start()
    site.round()
    assert wrong(site.export()) == [] and isinstance(load_signer(new), Signer)


# --- the file by itself ---


@pytest.fixture
def alone(tmp_path):
    """Run the script by a Python that knows ``cryptography`` and nothing else."""
    near = tmp_path / "only"
    near.mkdir()
    packages = Path(cryptography.__file__).parent.parent
    for path in [
        packages / "cryptography",
        packages / "cffi",
        *packages.glob("_cffi_backend*"),
        packages / "pycparser",
    ]:
        if path.exists():
            os.symlink(path, near / path.name)
    code = (
        "import importlib.util, runpy, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "assert not any(map(importlib.util.find_spec, ('fedtailor', 'torch', 'flwr', 'pydantic')))\n"
        "sys.argv = sys.argv[2:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )

    def run(*arguments):
        command = [sys.executable, "-I", "-S", "-c", code, str(near), str(SCRIPT), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout

    return run


def test_the_script_runs_without_fedtailor(site, keys, alone, tmp_path):
    export, earlier, bad = (tmp_path / f"{name}.json" for name in ("export", "earlier", "bad"))
    store.write_json(earlier, site.export())
    site.round()
    store.write_json(export, site.export())
    given = (
        "--earlier",
        earlier,
        "--ca",
        keys / "ca" / "ca.pem",
        "--head",
        f"ledger:{heads(site.ledger, site.egress)['ledger']}",
    )
    code, out = alone(export, *given)
    assert code == 0 and "every record fits, and every signature is the site's" in out and "WRONG" not in out
    code, out = alone(earlier, "--earlier", export)
    assert code == 1 and "WRONG  ledger: record 9, earlier exported, is gone: an older copy was put back" in out
    spoilt = site.export()
    spoilt["egress"][2]["record"]["fields"]["bytes"] = 0
    store.write_json(bad, spoilt)
    code, out = alone(bad)
    assert code == 1 and "WRONG  egress: record 3 was changed: its hash does not match" in out


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "7", '{"schema": "fedtailor.audit/2"}', '{"schema": "fedtailor.audit/1"}', "[" * 99999]
)
def test_what_is_no_export_is_told_in_one_line(alone, tmp_path, text):
    (tmp_path / "e.json").write_text(text)
    code, out = alone(tmp_path / "e.json")
    assert code == 1 and "WRONG  it cannot be verified" in out
    assert alone(tmp_path / "nowhere.json")[0] == 1


def test_a_bad_head_is_told(site, tmp_path, capsys):
    store.write_json(tmp_path / "e.json", site.export())
    for head in ("ledger", "ledger:x:y", "nothing:1:ab"):
        assert verify_audit.main([str(tmp_path / "e.json"), "--head", head]) == 1
        assert "cannot be verified" in capsys.readouterr().out
