"""What leaves is written down first, and a refusal is a word of a vocabulary."""

import re
from pathlib import Path

import pytest
from answers import ENVELOPE, SIGNER, admitted, honest, written

from fedtailor import wire
from fedtailor.client import airlock
from fedtailor.client.chain import Chain, rows
from fedtailor.errors import ConnectionFailed
from fedtailor.wire import Report

# --- the way out ---


class Sending:
    """A fleet that keeps what it is told to send."""

    def __init__(self):
        self.sent = []

    def answer(self, envelope, content, seconds):
        self.sent.append((envelope, content, seconds))
        return 1234


def log(tmp_path):
    return Chain(tmp_path / "egress.jsonl", SIGNER)


def lines(egress):
    return rows(egress.path)


def test_what_leaves_is_what_lies_in_the_outbox_and_is_written_down(tmp_path):
    stored, fleet, egress = admitted(tmp_path, written(tmp_path)), Sending(), log(tmp_path)
    assert airlock.release(fleet, ENVELOPE, stored, egress) == 1234
    ((envelope, content, seconds),) = fleet.sent
    assert (envelope, seconds) == (ENVELOPE, 1.2) and wire.unpacked(content)[1] == stored.payload
    assert Report.model_validate_json(content["head"]["json"]) == stored.report
    (line,) = lines(egress)
    assert line.pop("time").endswith("Z")
    size = len(stored.payload) + len(content["head"]["json"])
    assert line == {"run": "r", "round": 3, "bytes": size, "sha256": stored.report.summand_sha256, "epsilon": 1.5,
                    "metrics": ["auroc", "loss"], "personal": [], "baseline": ["auroc", "loss"], "rows": 200,
                    "tensors": {name: list(x.shape) for name, x in honest().items()},
                    "norm": round(sum(x.numel() for x in honest().values()) ** 0.5, 6)}  # fmt: skip


def test_what_may_have_left_is_written_down_even_if_sending_fails(tmp_path):
    class Broken:
        def answer(self, envelope, content, seconds):
            raise ConnectionFailed("gone")

    stored, egress = admitted(tmp_path, written(tmp_path)), log(tmp_path)
    with pytest.raises(ConnectionFailed):
        airlock.release(Broken(), ENVELOPE, stored, egress)
    assert [line["sha256"] for line in lines(egress)] == [stored.report.summand_sha256]


def test_every_release_is_a_line_of_its_own(tmp_path):
    stored, egress = admitted(tmp_path, written(tmp_path)), log(tmp_path)
    for _ in range(3):
        airlock.release(Sending(), ENVELOPE, stored, egress)
    airlock.decline(Sending(), ENVELOPE, "budget", egress)
    assert [line.get("refused") for line in lines(egress)] == [None, None, None, "budget"]


def test_the_vocabulary_holds_every_word_that_a_site_refuses_with():
    """A word that is missing would reach the operator as "failed", and nobody would know why."""
    kernel = ["policy", "proposal", "leaving", "config", "contract", "errors", "wire", "plugins", "privacy/accounting"]
    package = Path(airlock.__file__).resolve().parents[1]
    files = [*(package / "client").glob("*.py"), *(package / "fedtailor" / f"{name}.py" for name in kernel)]
    files += [package / f"{name}.py" for name in kernel]
    texts = "".join(path.read_text() for path in files if path.exists())
    found = set(re.findall(r'(?<!\w)code ?= ?"([a-z-]+)"', texts))
    found |= set(re.findall(r'_(?:rule|among|most|least)\(\s*"([a-z-]+)"', texts))
    own = {"officer", "extra", "withdraw", "certificate"}  # for this site's own people, who are not told by the airlock
    assert len(found) > 40 and found - own <= airlock.WORDS
    assert {f"airlock-{word}" for word in airlock.ANSWER} <= airlock.WORDS


@pytest.mark.parametrize("code,word", [("airlock-shape", "airlock-shape"), ("budget", "budget"), ("x" * 100, "failed"),
    ("JaneDoe12031960", "failed"), ("Jane Doe, 12.3.1960; /data/é患者.csv", "failed"), ("", "failed")])  # fmt: skip
def test_a_refusal_is_a_word_of_the_vocabulary(tmp_path, code, word):
    fleet, egress = Sending(), log(tmp_path)
    airlock.decline(fleet, ENVELOPE, code, egress)
    assert fleet.sent == [(ENVELOPE, word, 0.0)] and lines(egress)[0]["refused"] == word
