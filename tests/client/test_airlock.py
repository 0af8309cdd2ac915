"""The airlock: an answer leaves as the plan says, or not at all, and everything that leaves is written down."""

import hashlib
import io
import json
import math
import os

import pytest
import torch
from answers import HEAD, LEAVES, METRICS, POLICY, VISIT, admitted, dropped, honest, written
from safetensors.torch import load, save

from fedtailor import packing, wire

# --- what passes ---


def test_an_honest_answer_is_salted_and_durable(tmp_path):
    report, payload, reservation, _ = admitted(tmp_path, written(tmp_path))
    plain = wire.salted(report.salt)(payload)
    assert payload != plain and hashlib.sha256(plain).hexdigest() == report.summand_sha256
    there = load(plain)
    assert there.keys() == honest().keys() and all(torch.equal(there[k], v) for k, v in honest().items())
    assert reservation == 4 and report.metrics == report.baseline == METRICS
    assert (report.rows, report.train_rows, report.seconds) == (200, 134, 1.2)  # to a tenth of a second only


def test_what_the_airlock_knows_itself_is_not_taken_from_the_training_process(tmp_path):
    report = admitted(tmp_path, written(tmp_path, rows=1, train_rows=77, witness="ee", head=None)).report
    assert (report.rows, report.train_rows, report.witness, report.head) == (200, 134, "ab", HEAD)
    assert report.epsilon == 1.5 and report.salt != "0" * 64 != report.summand_sha256


def test_every_answer_has_a_salt_of_its_own(tmp_path):
    salts = set()
    for round in (3, 4):
        visit = VISIT.model_copy(update={"round": round})
        salts.add(admitted(tmp_path, written(tmp_path, round=round), visit).report.salt)
    assert len(salts) == 2


def test_an_evaluation_carries_no_tensors(tmp_path):
    visit = VISIT.model_copy(update={"train": False})
    dropped(tmp_path, written(tmp_path), "keys", visit)
    report, payload, _, _ = admitted(tmp_path, written(tmp_path, {}), visit)
    assert load(wire.salted(report.salt)(payload)) == {} and report.metrics == METRICS


PACKED = LEAVES.model_copy(update={"packed": True})


def test_an_answer_is_packed_after_it_was_checked_where_the_proposal_says_so(tmp_path):
    report, payload, _, listed = admitted(tmp_path, written(tmp_path), leaves=PACKED)
    plain = wire.salted(report.salt)(payload)
    assert plain == b"".join(packing.pack(honest())) and len(plain) < len(save(honest()))
    assert hashlib.sha256(plain).hexdigest() == report.summand_sha256
    there = packing.unpack(io.BytesIO(plain), LEAVES.spec())
    assert all(torch.equal(there[name], leaf) for name, leaf in honest().items()) and "tensors" in listed


def test_the_training_process_does_not_pack(tmp_path):
    dropped(tmp_path, written(tmp_path, raw=b"".join(packing.pack(honest()))), "format", leaves=PACKED)
    dropped(tmp_path, written(tmp_path, with_first(lambda x: poked(x, math.nan))), "nonfinite", leaves=PACKED)


def test_an_evaluation_of_a_packed_study_carries_no_tensors(tmp_path):
    visit = VISIT.model_copy(update={"train": False})
    report, payload, _, _ = admitted(tmp_path, written(tmp_path, {}), visit, leaves=PACKED)
    assert packing.unpack(io.BytesIO(wire.salted(report.salt)(payload)), {}) == {}


# --- what does not ---


def first(flat):
    return next(name for name, x in flat.items() if x.dim())


def with_first(make):
    flat = honest()
    return flat | {first(flat): make(flat[first(flat)])}


def poked(x, value):
    x = x.clone()
    x.view(-1)[-1] = value
    return x


BAD = {
    "an unknown key": ("keys", lambda: honest() | {"more": torch.ones(1)}),
    "a missing key": ("keys", lambda: {k: v for k, v in honest().items() if k != "weight"}),
    "nothing": ("keys", dict),
    "another shape": ("shape", lambda: with_first(lambda x: x[None])),
    "double": ("dtype", lambda: with_first(lambda x: x.double())),
    "an eight-bit float": ("dtype", lambda: with_first(lambda x: x.to(torch.float8_e4m3fn))),
    "a complex number": ("dtype", lambda: with_first(lambda x: x.to(torch.complex64))),
    "NaN": ("nonfinite", lambda: with_first(lambda x: poked(x, math.nan))),
    "infinity": ("nonfinite", lambda: with_first(lambda x: poked(x, math.inf))),
    "minus infinity": ("nonfinite", lambda: with_first(lambda x: poked(x, -math.inf))),
}


@pytest.mark.parametrize("what", BAD)
def test_tensors_that_were_not_agreed_do_not_leave(tmp_path, what):
    code, flat = BAD[what]
    dropped(tmp_path, written(tmp_path, flat()), code)


@pytest.mark.parametrize("raw", [b"", b"\x80\x04pickle", b"\xff" * 100, save(honest())[:-1], save(honest()) + b"x"])
def test_a_file_that_is_not_safetensors_does_not_leave(tmp_path, raw):
    dropped(tmp_path, written(tmp_path, raw=raw), "format")


@pytest.mark.parametrize("missing", ["work.json", "summand.safetensors"])
def test_half_an_answer_does_not_leave(tmp_path, missing):
    out = written(tmp_path)
    (out / missing).unlink()
    dropped(tmp_path, out, "format")


def test_an_answer_to_another_visit_does_not_leave(tmp_path):
    dropped(tmp_path, written(tmp_path, round=2), "round")
    dropped(tmp_path, written(tmp_path, run="other"), "round")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"patient": "Jane Doe"}'])
def test_a_malformed_report_does_not_leave(tmp_path, text):
    out = written(tmp_path)
    (out / "work.json").write_bytes(text)
    dropped(tmp_path, out, "format" if b"\xff" in text else "head")


def test_a_report_with_more_than_was_agreed_does_not_leave(tmp_path):
    dropped(tmp_path, written(tmp_path, note="Jane Doe"), "head")
    dropped(tmp_path, written(tmp_path, rows="Jane Doe"), "head")
    dropped(tmp_path, written(tmp_path, metrics={"auroc": math.nan}), "head")


@pytest.mark.parametrize("name", ["work.json", "summand.safetensors"])
def test_a_link_to_elsewhere_is_not_followed(tmp_path, name):
    out = written(tmp_path)
    (out / name).rename(tmp_path / "elsewhere")
    (out / name).symlink_to(tmp_path / "elsewhere")
    dropped(tmp_path, out, "format")


@pytest.mark.parametrize("name", ["work.json", "summand.safetensors"])
def test_what_is_not_a_file_is_not_waited_for(tmp_path, name):
    out = written(tmp_path)
    (out / name).unlink()
    os.mkfifo(out / name)
    dropped(tmp_path, out, "format")


def test_an_answer_that_changes_while_it_is_looked_at_leaves_as_it_was_checked(tmp_path, monkeypatch):
    """The training process is alive, and the folder is its own."""
    out, check = written(tmp_path), type(LEAVES).check

    def then_change(self, flat, *, train):
        check(self, flat, train=train)
        size = (out / "summand.safetensors").stat().st_size
        with (out / "summand.safetensors").open("r+b") as file:
            file.seek(size - 100)
            file.write(b"\xff" * 100)  # NaN

    monkeypatch.setattr(type(LEAVES), "check", then_change)
    report, payload, _, _ = admitted(tmp_path, out)
    assert all(x.isfinite().all() for x in load(wire.salted(report.salt)(payload)).values())


def test_a_report_that_is_too_long_is_not_read(tmp_path):
    out = written(tmp_path)
    (out / "work.json").write_text((out / "work.json").read_text() + " " * wire.HEAD_LIMIT)
    dropped(tmp_path, out, "head")


def test_text_in_the_tensors_file_does_not_leave(tmp_path):
    dropped(tmp_path, written(tmp_path, raw=save(honest(), metadata={"note": "Jane Doe"})), "metadata")


def padded(blanks, **fields):
    """An honest file whose header says more than its readers look at."""
    whole = save(honest())
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header["weight"] |= fields
    text = json.dumps(header).encode() + b" " * blanks
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]


def test_text_hidden_in_the_tensors_header_does_not_leave(tmp_path):
    """The format's readers skip fields they do not know, and blanks."""
    out = written(tmp_path, raw=padded(800, note="Jane Doe"))
    report, payload, _, _ = admitted(tmp_path, out)
    plain = wire.salted(report.salt)(payload)
    assert b"Doe" not in plain and len(plain) < len(save(honest())) + 64
    assert all(torch.equal(load(plain)[k], v) for k, v in honest().items())


def test_a_file_that_is_larger_than_what_was_agreed_does_not_leave(tmp_path):
    dropped(tmp_path, written(tmp_path, raw=padded(10_000)), "oversized")


@pytest.mark.parametrize("bound,leaves_it", [(1.0, False), (6.5, False), (6.6, True), (1e9, True), (None, True)])
def test_an_answer_longer_than_agreed_does_not_leave(tmp_path, bound, leaves_it):
    leaves = LEAVES.model_copy(update={"norm": bound})  # the honest answer is 43 ones: 6.557
    if leaves_it:
        assert admitted(tmp_path, written(tmp_path), leaves=leaves).report.rows == 200
    else:
        dropped(tmp_path, written(tmp_path), "norm", leaves=leaves)


# --- metrics ---


@pytest.mark.parametrize("value", [-0.1, 1.0001, 734.0])
def test_a_metric_out_of_its_range_does_not_leave(tmp_path, value):
    dropped(tmp_path, written(tmp_path, metrics={"auroc": value}), "metrics")


def test_a_metric_that_was_not_agreed_does_not_leave(tmp_path):
    leaves = LEAVES.model_copy(update={"metrics": ("loss",)})
    dropped(tmp_path, written(tmp_path, metrics={"auroc": 0.5}), "metrics", leaves=leaves)


def test_a_metric_leaves_with_four_digits_at_most(tmp_path):
    """A row could be encoded in the digits of a metric."""
    given = {"auroc": 0.123456789, "loss": 1234.987654321, "rmse": 1e300}
    report = admitted(tmp_path, written(tmp_path, metrics=given)).report
    assert report.metrics == {"auroc": 0.1235, "loss": 1234.9877, "rmse": None}


@pytest.mark.parametrize(
    "policy,test_rows,asked,leave",
    [
        (POLICY, 66, {}, (True, True)),
        (POLICY, 10, {}, (True, True)),
        (POLICY, 9, {}, (False, False)),
        (POLICY.model_copy(update={"minimum_count": 100}), 66, {}, (False, False)),
        (POLICY.model_copy(update={"metrics": False}), 66, {}, (False, False)),
        (POLICY, 66, {"evaluate": False}, (False, True)),
        (POLICY, 66, {"baseline": False}, (True, False)),
    ],
)
def test_metrics_leave_only_when_asked_for_allowed_and_of_enough_rows(tmp_path, policy, test_rows, asked, leave):
    visit = VISIT.model_copy(update=asked)
    report = admitted(tmp_path, written(tmp_path), visit, policy, test_rows).report
    assert (report.metrics is not None, report.baseline is not None) == leave
    assert report.metrics in (None, METRICS) and report.baseline in (None, METRICS)
