"""What a site gets for having taken part: the coordinator's signed word that the round's model contains its answer.

The answers of a round are the leaves of a Merkle tree (RFC 6962, section 2.1). A receipt holds the path from the
site's leaf to the root, so that a site can show that it is in a model, and an operator which sites are, without either
seeing another site's answer. A leaf is salted: its hash says nothing about what was answered.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fedtailor.seals import canonical
from fedtailor.study import Frozen, Name


class Leaf(NamedTuple):
    """One site's answer of a round."""

    site: str
    summand_sha256: str
    salt: str  # of the answer, 32 random bytes in hexadecimal

    def hash(self) -> bytes:
        """SHA-256, kept apart from that of an inner node."""
        return hashlib.sha256(b"\0" + canonical(list(self)).encode()).digest()


class Head(Frozen):
    """The last entry of a site's ledger, by the site's own hand: a later ledger without it is an older copy."""

    count: int
    hash: str
    signature: str  # the site's, over "count:hash" for the purpose "ledger-head"

    def text(self) -> str:
        """What is signed."""
        return f"{self.count}:{self.hash}"


class Receipt(Frozen):
    """Inclusion of one answer in one round; signed by the coordinator for the purpose "receipt"."""

    run: Name
    proposal: str  # SHA-256 of the study's proposal
    round: int
    site: Name
    summand_sha256: str
    salt: str
    index: int
    count: int  # sites in the round
    path: tuple[str, ...]  # the siblings' hashes, from the leaf up
    root: str
    head: Head | None = None  # the site's ledger when it answered: counter-signed with the rest

    def text(self) -> str:
        """What is signed."""
        return canonical(self.model_dump(mode="json"))

    def holds(self) -> bool:
        """Whether the path leads from the answer to the root."""
        leaf = Leaf(self.site, self.summand_sha256, self.salt).hash()
        at, last, made = self.index, self.count - 1, leaf
        if not 0 <= at <= last:
            return False
        for word in self.path:
            try:
                sibling = bytes.fromhex(word)
            except ValueError:
                return False
            if at % 2 or at == last:
                made = _node(sibling, made)
                while at % 2 == 0 and at:  # the last of an odd row went up alone
                    at, last = at // 2, last // 2
            else:
                made = _node(made, sibling)
            at, last = at // 2, last // 2
        return last == 0 and made.hex() == self.root


def root_of(leaves: Sequence[Leaf]) -> str:
    """The root over the leaves in order of their sites, hexadecimal."""
    return _root([leaf.hash() for leaf in _sorted(leaves)]).hex()


def receipts(
    run: str, proposal: str, round: int, leaves: Sequence[Leaf], heads: Mapping[str, Head]
) -> dict[str, Receipt]:
    """Every site's receipt of a round."""
    ordered = _sorted(leaves)
    hashes = [leaf.hash() for leaf in ordered]
    root = _root(hashes).hex() if hashes else ""
    return {
        leaf.site: Receipt(
            run=run,
            proposal=proposal,
            round=round,
            site=leaf.site,
            summand_sha256=leaf.summand_sha256,
            salt=leaf.salt,
            index=index,
            count=len(ordered),
            path=tuple(one.hex() for one in _path(index, hashes)),
            root=root,
            head=heads.get(leaf.site),
        )
        for index, leaf in enumerate(ordered)
    }


def _sorted(leaves: Sequence[Leaf]) -> list[Leaf]:
    return sorted(leaves, key=lambda leaf: leaf.site)


def _split(n: int) -> int:
    """The largest power of two below ``n``."""
    return 1 << ((n - 1).bit_length() - 1)


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _root(hashes: Sequence[bytes]) -> bytes:
    if len(hashes) == 1:
        return hashes[0]
    k = _split(len(hashes))
    return _node(_root(hashes[:k]), _root(hashes[k:]))


def _path(index: int, hashes: Sequence[bytes]) -> list[bytes]:
    if len(hashes) == 1:
        return []
    k = _split(len(hashes))
    if index < k:
        return [*_path(index, hashes[:k]), _root(hashes[k:])]
    return [*_path(index - k, hashes[k:]), _root(hashes[:k])]
