"""A signed log: any change to it shows, and no crash loses a record in silence."""

import json
import os
import stat
import threading

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtailor.client import verify_audit
from fedtailor.client.chain import Chain, read, rows
from fedtailor.client.signing import Signer
from fedtailor.client.verify_audit import Wrong, canonical, follow
from fedtailor.errors import StoreError


def signer(number, *former):
    return Signer(ec.derive_private_key(number, ec.SECP384R1()), tuple(one.key for one in former))


SIGNER, OTHER = signer(20260101), signer(7)
# The format, frozen: made once by this code, with the key above.
KEY = (
    "MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEG9WVyEE5WqdyvgGLCqd+srMEiSqiVI7TVKRGv9o1ZIFp2IkrJAlT6VYDwa0O/toEWQjeQgBdYNoFoa071aXo"
    "r/4m1U83v9eCt8fJMqhAefx5I/ljKOB91ZLxCEO71bM5"
)
FROZEN = (
    '{"hash":"d7130abe8e325bcafc37b3672f499a41e2d77387f0b5aebfc9efbe8022405fd4","record":{"before":"","fields":{},"key":"'
    + KEY
    + '","number":1,"time":"2026-01-01T00:00:00.000Z"},"signature":"MGYCMQCLr+6MkjhYpOZy1Y7mTcH9nORG3ETcVAbTe2ZFjL9F3USX6d'
    'E+WmyDrZaDd6pjzFUCMQC3pcIYcxiO4IVa0OZ8vVjwLjGJV62La4pBeQAn01lGGKKMc8+kAeT+knHiKq8I8Wo="}',
    '{"hash":"31900dd883aeb657e4747a61b107848e4007a317a92aa3ace265088867797e09","record":{"before":"d7130abe8e325bcafc37b36'
    '72f499a41e2d77387f0b5aebfc9efbe8022405fd4","fields":{"epsilon":0.1,"round":3,"what":"plan","who":"\\u00e9"},"number":2'
    ',"time":"2026-01-01T00:00:00.000Z"},"signature":"MGUCMQDigSygJmdpXiUnjVedRIFneAfqKDjA55/5g/ifqLC8ADQNzflnpUitU16+68OP'
    '8a0CMC+hYY9zN4W4SopsK7lP9okDTkEBO+AUWtxHdq/gZCTw4m7EOtnSllDl404jAaRBcA=="}',
)


def log(tmp_path, records=5):
    chain = Chain(tmp_path / "egress.jsonl", SIGNER)
    for round in range(records):
        chain.append(run="r", round=round, epsilon=round / 7, metrics=["auroc"], text="\u00e9 \u2028 \ud83d\ude00\r\n")
    return chain


def test_the_format_is_what_it_was(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_text("".join(line + "\n" for line in FROZEN))
    assert Chain(path, SIGNER).head.startswith("2:31900dd8") and SIGNER.public == KEY
    head = follow("audit", read(path))
    assert (head.number, head.key, head.breaks) == (2, KEY, ())
    assert rows(path) == [
        {"time": "2026-01-01T00:00:00.000Z", "who": "\u00e9", "what": "plan", "round": 3, "epsilon": 0.1}
    ]
    with pytest.raises(Wrong, match="record 1 has a signature that is not the site's"):
        follow("egress", read(path))  # a log is signed as the log that it is


def test_what_was_appended_is_read(tmp_path):
    chain = log(tmp_path)
    found = rows(chain.path)
    assert [row["round"] for row in found] == list(range(5)) and found[4]["epsilon"] == 4 / 7
    assert all(row["time"].endswith("Z") and len(row["time"]) == 24 for row in found)
    assert stat.S_IMODE(chain.path.stat().st_mode) == 0o600
    seen = []
    again = Chain(chain.path, SIGNER, seen.append)
    assert again.head == chain.head and seen == read(chain.path)
    assert again.append(round=5) == again.head and seen == read(chain.path) and len(seen) == 7


def test_a_record_is_on_disk_before_append_returns(tmp_path, monkeypatch):
    chain, synced = log(tmp_path), []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(rows(chain.path)[-1]["round"]))
    chain.append(round=77)
    assert synced == [77]


def test_only_json_is_appended(tmp_path):
    chain = log(tmp_path, 1)
    for value in (float("nan"), object(), b"bytes"):
        with pytest.raises((ValueError, TypeError)):
            chain.append(value=value)
    assert chain.append(ok=1).startswith("3:")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_anywhere_shows(tmp_path, at, flip):
    path = tmp_path / "egress.jsonl"
    path.unlink(missing_ok=True)
    path.with_name("egress.jsonl.torn").unlink(missing_ok=True)
    log(tmp_path, 3)
    whole = bytearray(path.read_bytes())
    whole[place := int(at * len(whole))] ^= flip
    path.write_bytes(whole)
    number = bytes(whole[:place]).count(b"\n") + 1
    if place == len(whole) - 1:  # the last line's end: like a crash
        Chain(path, SIGNER)
        assert "torn" in rows(path)[-1]
        return
    for verify in (lambda: Chain(path, SIGNER), lambda: Chain(path, signer(7, SIGNER)), lambda: read_and_follow(path)):
        with pytest.raises((StoreError, Wrong), match=rf"record {number}\b|record {number + 1}\b"):
            verify()
    assert path.read_bytes() == whole, "evidence is left alone"


def read_and_follow(path):
    return follow("egress", read(path))


CHANGES = {
    "removed": (lambda e: e.pop(2), 3),
    "swapped": (lambda e: e.insert(2, e.pop(3)), 3),
    "doubled": (lambda e: e.insert(2, e[2]), 4),
    "its beginning cut off": (lambda e: e.pop(0), 1),
    "renumbered": (lambda e: (e.pop(2), [x["record"].update(number=i) for i, x in enumerate(e, 1)]), 3),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("every", [True, False])
def test_removed_reordered_and_doubled_records_are_named(tmp_path, change, every):
    entries = read(log(tmp_path).path)
    make, number = CHANGES[change]
    make(entries)
    with pytest.raises(Wrong, match=f"record {number} "):
        follow("egress", entries, every=every)


@pytest.mark.parametrize("every", [True, False])
def test_a_record_of_another_history_that_the_site_signed_too_does_not_pass(tmp_path, every):
    """An older copy was put back once, and the site went on from it: its records have the right numbers and signatures."""
    chain = log(tmp_path, 3)
    copy = tmp_path / "again" / "egress.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(chain.path.read_bytes())
    other = Chain(copy, SIGNER)
    for round in (3, 4):
        chain.append(round=round)
        other.append(round=round + 10)
    one, two = read(chain.path), read(copy)
    for spliced in (one[:4] + two[4:5] + one[5:], one[:5] + two[5:]):
        with pytest.raises(Wrong, match="record 6 does not follow the one before"):
            follow("egress", spliced, every=every)


@pytest.mark.parametrize("at", [0, 2, 5])
@pytest.mark.parametrize("every", [True, False])
def test_a_record_made_without_the_key_does_not_pass_though_every_hash_fits(tmp_path, at, every):
    """Who can write the file but has not the key: all hashes are made anew from the changed record on."""
    entries = read(log(tmp_path).path)
    entries[at]["record"]["fields"]["round"] = 99
    before = entries[at - 1]["hash"] if at else ""
    for entry in entries[at:]:
        entry["record"]["before"] = before
        before = entry["hash"] = verify_audit.hash_of(entry)
    with pytest.raises(Wrong, match="signature that is not the site's"):
        follow("egress", entries, every=every)
    path = tmp_path / "again" / "egress.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"".join(canonical(entry) + b"\n" for entry in entries))
    with pytest.raises(StoreError, match=r"record \d .*move audit.jsonl and egress.jsonl aside"):
        Chain(path, SIGNER)


def test_a_record_by_another_key_does_not_pass(tmp_path):
    chain = log(tmp_path)
    head = follow("egress", read(chain.path))
    forged = OTHER.entry("egress", head._replace(key=OTHER.public), "2026-01-01T00:00:00.000Z", {"round": 9})
    with chain.path.open("ab") as file:
        file.write(canonical(forged) + b"\n")
    for call in (lambda: chain.append(round=10), lambda: Chain(chain.path, SIGNER)):
        with pytest.raises(StoreError, match="record 7 has a signature that is not the site's"):
            call()


def test_no_key_but_p384_signs(tmp_path):
    small = Signer(ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(Wrong, match="record 1"):
        Chain(tmp_path / "egress.jsonl", small)


def test_a_new_key_that_the_old_one_vouches_for_is_no_break(tmp_path, caplog):
    chain = log(tmp_path, 2)
    chain.sign_with(signer(7, SIGNER))
    chain.append(round=2)
    head = follow("egress", read(chain.path))
    assert (head.number, head.key, head.breaks) == (5, OTHER.public, ()) and not caplog.records
    assert [("key" in entry["record"]) for entry in read(chain.path)] == [True, False, False, True, False]
    assert Chain(chain.path, OTHER).head == chain.head


def test_a_new_key_alone_is_a_break_that_is_told(tmp_path, caplog):
    chain = log(tmp_path, 2)
    again = Chain(chain.path, OTHER)
    again.append(round=2)
    assert follow("egress", read(chain.path)).breaks == (4,) and "the old one is not there" in caplog.text
    assert follow("egress", read(chain.path), every=False).breaks == (4,)


def test_a_log_that_is_cut_or_replaced_while_it_is_used_shows(tmp_path):
    chain = log(tmp_path)
    whole = chain.path.read_bytes()
    os.truncate(chain.path, whole.rfind(b"\n", 0, -1) + 1)
    with pytest.raises(StoreError, match="record 6 is gone: it was cut or replaced"):
        chain.append(round=5)
    chain.path.unlink()
    with pytest.raises(StoreError, match="nothing leaves"):
        chain.append(round=5)
    assert not chain.path.exists()
    chain.path.write_bytes(whole)
    copy = tmp_path / "copy"
    copy.write_bytes(whole)
    os.replace(copy, chain.path)
    with pytest.raises(StoreError, match="replaced"):
        chain.append(round=5)


def test_an_older_copy_shows_in_a_head_that_was_noted(tmp_path):
    chain = log(tmp_path, 3)
    older, noted = chain.path.read_bytes(), [chain.head, chain.append(round=3)]
    assert all(chain.holds(head) for head in ["0:", *noted]) and not chain.holds(f"2:{'0' * 64}")
    chain.path.write_bytes(older)
    again = Chain(chain.path, SIGNER)
    assert [again.holds(head) for head in noted] == [True, False]
    again.append(round=3)  # the same words, at another time
    assert not again.holds(noted[1])


def test_a_full_disk_leaves_whole_lines_and_the_log_goes_on(tmp_path, monkeypatch):
    chain = log(tmp_path)
    whole, real = chain.path.read_bytes(), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: real(handle, data[:50], at))
    with pytest.raises(StoreError, match="disk is full.*nothing was recorded"):
        chain.append(round=5)
    assert chain.path.read_bytes() == whole
    monkeypatch.undo()
    chain.append(round=6)
    assert [row["round"] for row in rows(chain.path)][-2:] == [4, 6] and Chain(chain.path, SIGNER).head == chain.head


def test_threads_and_other_openers_append_at_once(tmp_path):
    one, two = log(tmp_path, 0), Chain(tmp_path / "egress.jsonl", SIGNER)

    def work(chain, thread):
        for i in range(20):
            chain.append(thread=thread, i=i)

    threads = [threading.Thread(target=work, args=((one, two)[n % 2], n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert follow("egress", read(one.path)).number == 161
    found = rows(one.path)
    assert all([row["i"] for row in found if row["thread"] == n] == list(range(20)) for n in range(8))


def test_a_file_that_is_no_log_is_left_alone(tmp_path):
    path = tmp_path / "egress.jsonl"
    for text in (
        b'{"run": "r"}\n',
        b"[" * 100_000 + b"\n",
        b"null\n",
        b"\n",
        b'{"record":1,"signature":"","hash":""}\n',
    ):
        path.write_bytes(text)
        with pytest.raises(StoreError, match="record 1 is not"):
            Chain(path, SIGNER)
        assert path.read_bytes() == text
    path = tmp_path / "audit.jsonl"
    path.write_text(json.dumps(json.loads(FROZEN[0])) + "\n")  # the same document, with blanks
    with pytest.raises(StoreError, match="record 1 is not a line of a signed log"):
        Chain(path, SIGNER)


def test_opening_checks_one_signature_for_each_key(tmp_path, monkeypatch):
    """At 0.7 ms each, a year's signatures would keep the daemon from starting for minutes."""
    chain, calls = log(tmp_path, 20), []
    chain.sign_with(signer(7, SIGNER))
    chain.append(round=1)
    real = verify_audit.signed_by
    monkeypatch.setattr(verify_audit, "signed_by", lambda *what: calls.append(what) or real(*what))
    assert Chain(chain.path, OTHER).head == chain.head and len(calls) == 1 + 2 + 1  # first, last and new key, last
    follow("egress", read(chain.path))
    assert len(calls) == 4 + 23


def test_numbers_are_in_order_even_where_the_site_signed_others(tmp_path):
    chain = log(tmp_path)
    head = follow("egress", read(chain.path))
    skipped = SIGNER.entry("egress", head._replace(number=9), "2026-01-01T00:00:00.000Z", {"round": 9})
    with pytest.raises(Wrong, match="record 7 is missing, or stands elsewhere: number 10"):
        follow("egress", [*read(chain.path), skipped])
