"""Verify what a site exported: its audit log, its egress log and its privacy ledger.

This one file needs Python 3.11 and ``cryptography`` and nothing of fedtailor, so that whoever doubts a site can read it
and run it elsewhere: ``python verify_audit.py EXPORT.json``. The site's own daemon calls the same functions.

A log is a chain of entries ``{"record", "signature", "hash"}``. A record has its ``number``, from 1; ``time``, UTC;
``fields``; ``before``, the hash of the entry before; and ``key`` where the key that signs begins or changes. The
signature (ECDSA, P-384, SHA-384) covers the log's name and the record's canonical JSON, the hash (SHA-256) the
canonical JSON of record and signature. So the last signature vouches for all that stands before it.
"""

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

Entry = dict[str, Any]
SCHEMA = "fedtailor.audit/1"
LOGS = ("audit", "egress", "ledger")
BARE = ("account", "fingerprint", "study", "visit", "noise_multiplier", "rate", "steps", "reservation", "digest")
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)  # what reading something else raises
NO_TENSORS = hashlib.sha256(b"\x08\0\0\0\0\0\0\0{}      ").hexdigest()  # an answer that carries metrics only


class Wrong(Exception):
    """A record that is not what was signed."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"record {number} {text}")
        self.number = number


class Head(NamedTuple):
    """How far a chain was followed."""

    number: int = 0
    hash: str = ""
    key: str = ""  # that signs: base64 of its DER; empty before the first
    unsigned: int = 0  # so many records of the ledger are older than signatures
    breaks: tuple[int, ...] = ()  # records where the key changed and the one before did not vouch for it


START = Head()


def canonical(value: Any) -> bytes:
    """JSON in one way only: keys in order, no blanks, ASCII, numbers as Python writes them."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def signed_bytes(log: str, record: Entry) -> bytes:
    """What a signature covers; the site's key signs other things too, so this says what it is."""
    return b"fedtailor/record/1/" + log.encode() + b"\n" + canonical(record)


def hash_of(entry: Entry) -> str:
    """An entry's hash. Without a signature: as fedtailor's first ledgers made it."""
    record, signature = entry["record"], entry["signature"]
    if signature is not None:
        return hashlib.sha256(canonical({"record": record, "signature": signature})).hexdigest()
    row = [record["number"], record["fields"]["kind"], record["time"], *(record["fields"][name] for name in BARE)]
    return hashlib.sha256(json.dumps([record["before"], *row], separators=(",", ":")).encode()).hexdigest()


@lru_cache(maxsize=64)
def _key(text: str) -> ec.EllipticCurvePublicKey:
    key = serialization.load_der_public_key(base64.b64decode(text, validate=True))
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("not a P-384 key")
    return key


def signed_by(log: str, entry: Entry, key: str) -> bool:
    """Whether ``key`` signed the entry."""
    try:
        signature = base64.b64decode(entry["signature"], validate=True)
        _key(key).verify(signature, signed_bytes(log, entry["record"]), ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def follow(log: str, entries: Iterable[Entry], head: Head = START, *, every: bool = True) -> Head:
    """Follow a chain on from ``head``.

    Args:
        every: check each signature (0.7 ms). False: each hash, and the last signature under each key, which vouches for
            all before it; no change that was made without the key passes either way.

    Raises:
        Wrong: naming the first record that does not fit.
    """
    last: Entry | None = None  # not yet checked
    for entry in entries:
        number = head.number + 1
        try:
            head, last = _step(log, entry, head, last, every)
        except Wrong:
            raise
        except MALFORMED as error:
            raise Wrong(number, "is not a record") from error
    _require(log, last, head)
    return head


def _step(log: str, entry: Entry, head: Head, last: Entry | None, every: bool) -> tuple[Head, Entry | None]:
    record, number = entry["record"], head.number + 1
    if record["number"] != number:
        raise Wrong(number, f"is missing, or stands elsewhere: number {record['number']} stands in its place")
    if record["before"] != head.hash:
        raise Wrong(number, "does not follow the one before: one of the two was exchanged")
    if entry["hash"] != hash_of(entry):
        raise Wrong(number, "was changed: its hash does not match")
    after = head._replace(number=number, hash=entry["hash"])
    new: str = record.get("key", "")
    if entry["signature"] is None:
        if head.key or new or log != "ledger":
            raise Wrong(number, "is not signed")
        return after._replace(unsigned=number), None
    if not new:
        if every:
            _require(log, entry, after)
        return after, None if every else entry
    _require(log, last, head)
    if head.key and signed_by(log, entry, head.key):
        return after._replace(key=new), None
    _require(log, entry, after._replace(key=new))
    return after._replace(key=new, breaks=(*head.breaks, number) if head.key else ()), None


def _require(log: str, entry: Entry | None, head: Head) -> None:
    if entry is not None and not (head.key and signed_by(log, entry, head.key)):
        raise Wrong(head.number, "has a signature that is not the site's")


def holds(entries: Sequence[Entry], number: int, hash: str) -> bool:
    """Whether a head that was noted earlier is part of a chain."""
    return number == 0 or (number <= len(entries) and entries[number - 1]["hash"] == hash)


def parse_head(text: str) -> tuple[int, str]:
    """``12:ab34…`` as number and hash; ValueError if it is not of that form."""
    number, _, hash = text.partition(":")
    return int(number), hash


def examine(
    export: dict[str, Any],
    *,
    earlier: dict[str, Any] | None = None,
    heads: Sequence[str] = (),
    ca: bytes | None = None,
    accept: Sequence[str] = (),
    every: bool = True,
) -> tuple[list[str], list[str]]:
    """Everything that is wrong with an export, and what else its reader should know; both in plain words.

    Args:
        earlier: an export of the same site that was made before; it must be a prefix of this one.
        heads: noted before, each ``LOG:NUMBER:HASH``; ValueError if one is not of that form.
        ca: the consortium's certificate (PEM), to check the site's.
        accept: changes of key that are known to be honest though the old key was lost, each ``LOG:NUMBER``.
        every: as in :func:`follow`.
    """
    wrong: list[str] = []
    notes: list[str] = []
    certificate = x509.load_pem_x509_certificate(export["certificate"].encode())
    der, spki = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    key = base64.b64encode(certificate.public_key().public_bytes(der, spki)).decode()
    for log in LOGS:
        try:
            head = follow(log, export[log], every=every)
        except Wrong as error:
            wrong.append(f"{log}: {error}")
            continue
        notes.append(f"{log}: {head.number} records, head {log}:{head.number}:{head.hash}")
        if head.unsigned:
            notes.append(
                f"{log}: records 1 to {head.unsigned} are older than signatures; the next one vouches for them"
            )
        if head.number and head.key != key:
            wrong.append(f"{log}: record {head.number} is not signed by the key of the site's certificate")
        for number in head.breaks:
            known = f"{log}:{number}" in accept
            text = f"{log}: record {number} begins a new key, for which the old one did not vouch"
            (notes if known else wrong).append(text + (" (accepted)" if known else ""))
    if wrong:
        return wrong, notes  # what follows believes the records
    wrong += _compare(export, earlier, heads) + _cross_check(export)
    notes += [_torn(log, entry) for log in LOGS for entry in export[log] if "torn" in entry["record"]["fields"]]
    if ca is None:
        notes.append("the site's certificate is not checked; give the consortium's with --ca")
    else:
        wrong += _check_certificate(certificate, x509.load_pem_x509_certificate(ca), export["site"])
    return wrong, notes


def _torn(log: str, entry: Entry) -> str:
    record = entry["record"]
    return f"{log}: record {record['number']} says that {record['fields']['torn']} bytes of a torn line were set aside"


def _compare(export: dict[str, Any], earlier: dict[str, Any] | None, heads: Sequence[str]) -> list[str]:
    wrong = []
    noted = [("noted", *head.split(":", 1)) for head in heads]
    for log in LOGS if earlier else ():
        assert earlier is not None
        if earlier[log]:
            last = earlier[log][-1]
            noted.append(("exported", log, f"{last['record']['number']}:{last['hash']}"))
    for fields in (entry["record"]["fields"] for entry in export["audit"]):
        noted += [("in the audit log", log, fields[log]) for log in LOGS if log in fields]
    for where, log, head in noted:
        number, hash = parse_head(head)
        if not holds(export[log], number, hash):
            what = "is another one now" if number <= len(export[log]) else "is gone: an older copy was put back"
            wrong.append(f"{log}: record {number}, earlier {where}, {what}")
    return wrong


def _cross_check(export: dict[str, Any]) -> list[str]:
    """Every private answer that carried tensors was paid for."""
    reserved: dict[int, str] = {}
    paid = set()
    for record in (entry["record"] for entry in export["ledger"]):
        fields = record["fields"]
        if fields["kind"] == "reserve":
            reserved[record["number"]] = fields["study"]
        elif fields["kind"] == "settle":
            paid.add((reserved.get(fields["reservation"]), fields["digest"]))
    return [
        f"egress: record {record['number']}, run {fields['run']}, round {fields['round']}: the ledger has no charge for it"
        for record in (entry["record"] for entry in export["egress"])
        if (fields := record["fields"]).get("epsilon") is not None
        and fields["sha256"] != NO_TENSORS
        and (fields["run"], fields["sha256"]) not in paid
    ]


def _check_certificate(certificate: x509.Certificate, ca: x509.Certificate, site: str) -> list[str]:
    names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return ["the site's certificate was not issued by this consortium"]
    return [] if [name.value for name in names] == [site] else [f"the site's certificate is not for {site!r}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if everything fits, 1 if not."""
    parser = argparse.ArgumentParser(description="Verify what a site exported with: fedtailor client audit export FILE")
    parser.add_argument("export", type=Path)
    parser.add_argument("--earlier", type=Path, help="an export of the same site that was made before")
    parser.add_argument("--head", action="append", default=[], metavar="LOG:NUMBER:HASH", help="noted before")
    parser.add_argument("--ca", type=Path, help="the consortium's ca.pem, to check the site's certificate")
    parser.add_argument("--accept", action="append", default=[], metavar="LOG:NUMBER", help="a known loss of the key")
    given = parser.parse_args(arguments)
    try:
        earlier = load(given.earlier) if given.earlier else None
        ca = given.ca.read_bytes() if given.ca else None
        wrong, notes = examine(load(given.export), earlier=earlier, heads=given.head, ca=ca, accept=given.accept)
    except (OSError, *MALFORMED) as error:
        wrong, notes = [f"it cannot be verified: {type(error).__name__}: {error}"], []
    return tell(str(given.export), wrong, notes)


def load(path: Path) -> dict[str, Any]:
    """An export; OSError or one of MALFORMED if it is none."""
    export: dict[str, Any] = json.loads(path.read_bytes())
    if export["schema"] != SCHEMA:
        raise ValueError(f"{path}: its schema is {export['schema']!r}, not {SCHEMA}")
    return export


def tell(subject: str, wrong: Sequence[str], notes: Sequence[str]) -> int:
    """Print what was found; 0 if nothing is wrong, else 1."""
    for line in notes:
        print(f"       {line}")
    for line in wrong:
        print(f"WRONG  {line}")
    print(f"{subject}: " + ("does not hold" if wrong else "every record fits, and every signature is the site's"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
