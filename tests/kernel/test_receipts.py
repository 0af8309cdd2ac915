"""Receipts: every site's answer leads to the root that is signed, and nothing else does."""

import hashlib
import secrets

import pytest

from fedtailor.receipts import Head, Leaf, receipts, root_of
from fedtailor.seals import canonical


def leaves(n):
    return [Leaf(f"s{i:03d}", secrets.token_hex(32), secrets.token_hex(32)) for i in range(n)]


def leaf(one):
    return hashlib.sha256(b"\0" + canonical(list(one)).encode()).digest()


def node(a, b):
    return hashlib.sha256(b"\1" + a + b).digest()


def test_a_known_tree_of_three():
    a, b, c = three = leaves(3)
    assert root_of([c, a, b]) == node(node(leaf(a), leaf(b)), leaf(c)).hex()
    made = receipts("r", "0" * 64, 4, three, {})
    assert made["s002"].path == (node(leaf(a), leaf(b)).hex(),)
    assert made["s000"].path == (leaf(b).hex(), leaf(c).hex())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 31, 33])
def test_every_receipt_leads_to_the_root(n):
    given = leaves(n)
    made = receipts("r", "0" * 64, 4, given, {})
    assert len(made) == n and {one.root for one in made.values()} == {root_of(given)}
    assert all(one.holds() for one in made.values())


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_a_receipt_with_anything_changed_does_not_hold(n):
    for one in receipts("r", "0" * 64, 4, leaves(n), {}).values():
        for changed in (
            {"summand_sha256": "1" * 64},
            {"salt": "1" * 64},
            {"site": "mallory"},
            {"root": "1" * 64},
            {"index": one.index + 1},
            {"index": -1},
            {"count": 0},
            {"path": one.path[:-1]},
            {"path": (*one.path, "1" * 64)},
            {"path": ("zz", *one.path[1:])},
        ):
            assert not one.model_copy(update=changed).holds(), changed


def test_a_leaf_cannot_pass_for_an_inner_node():
    """Without the prefixes, the two hashes of an inner node would be the content of a leaf."""
    a, b = leaves(2)
    assert leaf(a) != hashlib.sha256(canonical(list(a)).encode()).digest()
    assert root_of([a, b]) != hashlib.sha256(leaf(a) + leaf(b)).hexdigest()


def test_the_head_that_is_countersigned_is_the_sites():
    head = Head(count=3, hash="ab", signature="cd")
    made = receipts("r", "0" * 64, 4, leaves(2), {"s000": head})
    assert made["s000"].head == head and made["s001"].head is None and '"head":{' in made["s000"].text()
