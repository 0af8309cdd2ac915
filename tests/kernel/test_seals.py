"""Signatures: of one text, for one purpose, by one key."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedtailor import seals
from fedtailor.errors import ConfigError

KEYS = {"ed25519": Ed25519PrivateKey.generate, "p384": lambda: ec.generate_private_key(ec.SECP384R1())}


@pytest.mark.parametrize("kind", KEYS)
def test_a_signature_is_of_one_text_one_purpose_and_one_key(kind):
    key, other = KEYS[kind](), KEYS[kind]()
    made, public = seals.sign(key, "visit", "text"), key.public_key()
    assert seals.genuine(public, "visit", "text", made)
    assert not seals.genuine(public, "visit", "texT", made)
    assert not seals.genuine(public, "receipt", "text", made)
    assert not seals.genuine(other.public_key(), "visit", "text", made)
    for wrong in ("", "zz", made[:-2], made + "00", "00" * (len(made) // 2)):
        assert not seals.genuine(public, "visit", "text", wrong)


def test_a_purpose_cannot_run_into_a_text():
    with pytest.raises(AssertionError):
        seals.sign(Ed25519PrivateKey.generate(), "a/1\nb", "c")


@pytest.mark.parametrize("kind", KEYS)
def test_a_public_key_can_be_spelled_and_read(kind):
    key = KEYS[kind]()
    assert seals.public(seals.spelled(key.public_key())) == key.public_key()


def test_other_keys_and_other_texts_are_refused():
    strange = rsa.generate_private_key(65537, 1024).public_key()
    for word in (strange.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo).hex(), "", "zz", "00ff"):
        with pytest.raises(ConfigError):
            seals.public(word)


def test_canonical_text_does_not_depend_on_order_and_has_no_nan():
    assert seals.canonical({"b": [1, 2.5], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5]}'
    assert json.loads(seals.canonical({"x": None})) == {"x": None}
    with pytest.raises(ValueError):
        seals.canonical({"x": float("nan")})


def test_a_signers_file_is_its_owners_alone_and_never_replaced(tmp_path):
    private, shown = tmp_path / "s" / "plans.key", tmp_path / "s" / "plans.pub"
    seals.make_signer(private, shown)
    assert private.stat().st_mode & 0o777 == 0o600
    assert seals.load_signer(private).public_key() == seals.load_public(shown)
    with pytest.raises(ConfigError, match="exists"):
        seals.make_signer(private, shown)
    private.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        seals.load_signer(private)
    for path, read in ((private, seals.load_signer), (shown, seals.load_public)):
        path.write_text("no key")
        path.chmod(0o600)
        with pytest.raises(ConfigError, match=path.name):
            read(path)
