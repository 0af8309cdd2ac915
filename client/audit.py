"""Who did what at this site: a signed, hash-chained log of numbers, words and hashes; and the site's whole record."""

import logging
import math
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import fedtailor
from fedtailor import control, store
from fedtailor.client import chain, journal
from fedtailor.client.chain import Chain
from fedtailor.client.ledger import Ledger
from fedtailor.client.signing import Signer, now
from fedtailor.client.site import Home, SiteConfig
from fedtailor.client.verify_audit import SCHEMA, Entry, parse_head
from fedtailor.errors import RefusedError, StoreError

DECISIONS = {
    "Approve": "approved",
    "Refuse": "refused",
    "Release": "let-go",
    "Withdraw": "withdrawn",
    "Back": "back",
}  # by people
WHICH = {
    "run": "run",
    "plan": "hash",
    "state": "state",
    "round": "round",
    "answer": "answer",
    "study": "study",
}  # of a method's reply
_WORD = re.compile(r"[A-Za-z0-9_.:@/+=\[\]-]{0,200}")
_log = logging.getLogger("fedtailor.client")


class Audit:
    """The audit log in the file ``path``.

    It names the heads of the ledger and the egress log as it goes, so that neither can be put back alone.

    Raises:
        StoreError: from any method, as :class:`Chain`.
    """

    def __init__(self, path: Path, signer: Signer) -> None:
        self._last: dict[str, dict[str, Any]] = {}  # what -> the fields of its last record
        self._heads: dict[str, str] = {}  # log -> its head as it was last noted
        self.chain = Chain(path, signer, self._see)

    def note(self, who: str, what: str, **facts: Any) -> None:
        """Record that ``who`` did ``what``, durably.

        Args:
            who: ``daemon``, ``coordinator``, ``person:LOGIN`` (see :func:`person`) or ``officer:FINGERPRINT``.
            facts: numbers, words, hashes, or lists of them.

        Raises:
            ValueError: if a fact is anything else: a text could carry data.
        """
        self.chain.append(**_plain({"who": who, "what": what, **facts}))

    def changed(self, who: str, what: str, **facts: Any) -> bool:
        """:meth:`note`, unless the last record of ``what`` says the same; whether it was noted."""
        fields = _plain({"who": who, "what": what, **facts})
        if self._last.get(what) == fields:
            return False
        self.chain.append(**fields)
        return True

    def begin(self, ledger: Ledger, egress: Chain, settings: Path) -> None:
        """Note that the daemon starts: its version, the heads of the other two logs, and the digest of its settings.

        Raises:
            StoreError: if the ledger does not hold the head that was noted last: the site would forget what it spent.
        """
        noted = self._heads.get("ledger", "0:")
        if not ledger.contains(parse_head(noted)):
            raise StoreError(
                f"ledger: record {noted.partition(':')[0]} of the audit log's last note is not in it: an older copy was "
                f"put back. Restore the newest; if it is lost, the site can no longer say what it has spent. {chain.WAY_OUT}"
            )
        if not egress.holds(noted := self._heads.get("egress", "0:")):
            _log.warning("egress: record %s is gone; the audit log still names it", noted.partition(":")[0])
        self.note("daemon", "started", version=fedtailor.__version__, **heads(ledger, egress))
        self.changed("daemon", "policy", sha256=store.digest(settings))

    def attend(self, methods: Mapping[str, control.Method]) -> dict[str, control.Method]:
        """The same methods of the control socket; what people decide by them is noted, and that they were refused."""
        return {name: self._noting(name, method) if name in DECISIONS else method for name, method in methods.items()}

    def _noting(self, name: str, method: control.Method) -> control.Method:
        def call(request: dict[str, Any]) -> dict[str, Any]:
            try:
                answer = method(request)
            except RefusedError as error:
                self.note(person(request), DECISIONS[name], refused=error.code)
                raise
            facts = {fact: answer[key] for fact, key in WHICH.items() if answer.get(key) is not None}
            self.note(person(request), DECISIONS[name], **facts)
            return answer

        return call

    def _see(self, entry: Entry) -> None:
        fields = entry["record"]["fields"]
        if "what" in fields:
            self._last[fields["what"]] = fields
            self._heads |= {log: fields[log] for log in ("ledger", "egress") if log in fields}


def heads(ledger: Ledger, egress: Chain) -> dict[str, str]:
    """The heads of the other two logs, as facts."""
    number, hash = ledger.head()
    return {"ledger": f"{number}:{hash}", "egress": egress.head}


def person(request: dict[str, Any]) -> str:
    """Who asks over the control socket: an officer by the fingerprint of the key that signed, else the login name that
    the command sends. The socket lets nobody in but the daemon's user; the name is what that user says."""
    if request.get("signature"):
        return f"officer:{sha256(str(request.get('officer')).encode()).hexdigest()[:32]}"
    name = "".join(c for c in str(request.get("who", "")) if c.isascii() and (c.isalnum() or c in "-_.@"))
    return f"person:{name[:64] or 'unknown'}"


def gather(home: Home, config: SiteConfig) -> dict[str, Any]:
    """All three logs and the site's certificate as one document, for verify_audit.py.

    It reads the files as they are and verifies nothing; a daemon may be at work, or not.
    """
    return {
        "schema": SCHEMA,
        "site": config.site,
        "made": now(),
        "version": fedtailor.__version__,
        "certificate": (config.keys / "site.pem").read_text(),
        "audit": chain.read(home.state / "audit.jsonl"),  # first: it names heads of the other two
        "egress": chain.read(home.state / "egress.jsonl"),  # what has left was settled before
        "ledger": journal.read(home.state / "ledger.db"),
    }


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    for name, value in facts.items():
        if not all(_is_plain(each) for each in (value if isinstance(value, (list, tuple)) else [value])):
            raise ValueError(f"{name} is no number, word or hash; the audit log takes nothing else")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
