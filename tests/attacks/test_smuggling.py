"""Ways to smuggle a row out of a site by a training process that has turned, each tried with the airlock and without.

The process is the real worker, in its cell, which trains honestly and then changes what it leaves for the daemon. What it
wants out is 40 bits of a patient's row. Without the airlock (whatever lies in the folder is sent as it is) every way
succeeds; with it, none does. What an allowed tensor can carry is not denied: ``client plans`` states it in bits a round.
"""

import json
import shutil
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from turned import HUB, PLAN, Left, Site
from ways import WAYS

from fedtailor.client import airlock, inbox, visits
from fedtailor.client.workshop import Workshop
from fedtailor.errors import FedtailorError


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory):
    made = Site(tmp_path_factory.mktemp("smuggling"))
    yield made
    made.workshop.stop()
    made.ledger.close()


class Open(NamedTuple):
    """An answer as a site without an airlock would store it."""

    report: Any
    payload: bytes
    reservation: int | None
    listed: dict[str, Any]


class Raw:
    """A report as the training process wrote it."""

    def __init__(self, text: str) -> None:
        known = json.loads(text)
        self.text, self.run, self.round, self.summand_sha256 = text, known["run"], known["round"], ""
        self.epsilon, self.metrics, self.baseline, self.rows, self.seconds = None, None, None, 0, 0.0

    def model_dump_json(self) -> str:
        return self.text


@pytest.fixture
def without_the_airlock(site, monkeypatch):
    """What lies in the folder is sent; a refusal is sent as it was worded; counts are believed."""
    left: list[Open] = []

    def admit(out, outbox, visit, leaves, policy, facts):
        files = sorted(path for path in out.iterdir() if path.suffix == ".safetensors")
        for path in files:
            left.append(Open(Raw((out / "work.json").read_text()), path.read_bytes(), None, {}))
        (outbox / inbox.key_of(visit)).mkdir(exist_ok=True)

    def release(post, envelope, stored, egress):
        for one in left or [stored]:
            post.left.heads.append(one.report.model_dump_json())
            post.left.payloads.append(one.payload)
        left.clear()

    def decline(post, envelope, code, egress):
        post.left.words.append(f"{code} {site.said}")

    def described(answer):
        return visits.Described(**answer)

    real = Workshop._ask

    def ask(self, op, limits, **request):
        try:
            return real(self, op, limits, **request)
        except FedtailorError as error:
            site.said = str(error)
            raise

    site.said = ""
    monkeypatch.setattr(Workshop, "_ask", ask)
    monkeypatch.setattr(airlock, "admit", admit)
    monkeypatch.setattr(airlock, "release", release)
    monkeypatch.setattr(airlock, "decline", decline)
    monkeypatch.setattr(visits, "read", described)
    monkeypatch.setattr(inbox, "stored", lambda outbox, visit: left[0] if left else None)


def wanted(way: str, secret: int, names: list[str]) -> Any:
    """What a way brings out: the secret, or as much of it as the way can carry."""
    if way == "a value beyond the norm":
        return float(torch.tensor(float(secret)))
    if way == "blanks in the file's header":
        return secret % 997
    if way == "the order of tensors in the file":
        return list(reversed(sorted(names)))
    return secret


def brought_out(decode: Callable[[Left], Any], left: Left) -> Any:
    try:
        return decode(left)
    except (KeyError, IndexError, StopIteration, ValueError, TypeError, struct.error, OverflowError):
        return None


@pytest.mark.parametrize("way", WAYS)
def test_what_gets_out_without_the_airlock(site, without_the_airlock, way):
    attack, decode = WAYS[way]
    left = site.round(attack)
    names = list(HUB.propose(PLAN).leaves.spec())
    assert brought_out(decode, left) == wanted(way, site.secret, names)


@pytest.mark.parametrize("way", WAYS)
def test_does_not_get_out_with_it(site, way):
    attack, decode = WAYS[way]
    left = site.round(attack)
    names = list(HUB.propose(PLAN).leaves.spec())
    assert brought_out(decode, left) != wanted(way, site.secret, names)
    everything = " ".join([*left.heads, *left.words]) + repr(left.payloads)
    assert str(site.secret) not in everything and f"{site.secret:x}" not in everything
    assert len(left.heads) + len(left.words) == 1  # an answer, or a word why there is none
    assert set(left.words) <= airlock.WORDS


def test_rows_cannot_be_counted_as_somebody_likes(site):
    left = site.round("answer['rows'] = secret", at="describe")
    assert left.heads == [] and left.words == ["worker"]
    left = site.round("answer['notes'] = [str(secret)]", at="describe")
    assert str(site.secret) not in left.heads[0]


@pytest.mark.parametrize("kept", [True, False])
def test_the_same_question_brings_the_same_answer(site, kept, monkeypatch):
    """A process that answers each repetition differently has as many messages as it likes, where none is kept."""
    turns = "flat['weight'] = torch.tensor(float(int.from_bytes(os.urandom(2), 'little') % 900))"
    if not kept:
        stored, asked = inbox.stored, []

        def forgetful(outbox, visit):
            asked.append(visit)
            if len(asked) % 2:  # before the work is done: as if nothing were there
                shutil.rmtree(outbox / inbox.key_of(visit), ignore_errors=True)
                return None
            return stored(outbox, visit)

        monkeypatch.setattr(inbox, "stored", forgetful)
    left = site.round(turns, times=3)
    assert len(left.heads) == 3
    answers = {json.loads(text)["summand_sha256"] for text in left.heads}
    assert (len(set(left.payloads)) == len(answers) == 1) == kept


def test_an_answer_cannot_be_planted_before_it_is_asked_for(site):
    """Early: the outbox is not the training process's to write. Its cell forbids it."""
    planted = (
        f"folder = Path({str(site.home.outbox)!r}) / 'planted'\n"
        "try:\n    folder.mkdir(); (folder / 'payload').write_text(str(secret))\nexcept OSError: pass"
    )
    site.round(planted)
    if site.workshop.confinement is None or not site.workshop.confinement.files:
        pytest.skip("this host offers no Landlock")
    assert not (site.home.outbox / "planted").exists()


PRINTS = "sys.stderr.write(f'row {secret}\\n'); raise FedtailorError('see the log')"


def test_what_the_process_prints_stays_in_the_sites_own_log(site):
    left = site.round(PRINTS)
    assert str(site.secret) in site.log.read_text()
    assert left.heads == [] and left.words == ["failed"]


def test_what_it_prints_gets_out_where_logs_are_sent(site, without_the_airlock, monkeypatch):
    """As a failure report with the end of the log would."""
    monkeypatch.setattr(airlock, "decline", lambda post, *_: post.left.words.append(site.log.read_text()[-200:]))
    assert str(site.secret) in site.round(PRINTS).words[0]


def test_the_rows_of_a_site_are_not_told_apart_by_what_it_is_allowed_to_say(site):
    """What is left: the plan says how many bits its tensors could carry, and each metric at most 14."""
    leaves = HUB.propose(PLAN).leaves
    assert leaves.bits() == 32 * sum(leaf.numel() for leaf in _tensors(leaves))
    assert len({leaves.rounded({"auroc": value / 20_000})["auroc"] for value in range(20_001)}) <= 2**14


def _tensors(leaves):
    return [torch.empty(shape, dtype=dtype) for dtype, shape in leaves.spec().values()]


def test_a_study_stops_here_with_the_first_attempt(site):
    left = site.round(WAYS["an extra tensor"][0], times=2)
    assert left.words == ["airlock-keys", "stopped"]
