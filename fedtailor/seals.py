"""Signatures over canonical text: Ed25519 for what a consortium proposes, a site's own P-384 key for what a site does.

Every signature names its purpose, so that one made for a purpose is worth nothing for another.
"""

import json
import os
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedtailor import store
from fedtailor.errors import ConfigError

Private = Ed25519PrivateKey | ec.EllipticCurvePrivateKey
Public = Ed25519PublicKey | ec.EllipticCurvePublicKey

_PEM, _SPKI = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo


def canonical(document: Any) -> str:
    """A JSON document as text: equal documents give equal bytes. NaN and infinity are refused."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sign(key: Private, purpose: str, text: str) -> str:
    """The signature, hexadecimal, of ``text`` for ``purpose``."""
    message = _message(purpose, text)
    made = key.sign(message) if isinstance(key, Ed25519PrivateKey) else key.sign(message, ec.ECDSA(hashes.SHA384()))
    return made.hex()


def genuine(key: Public, purpose: str, text: str, signature: str) -> bool:
    """Whether ``signature`` is the key's, over this text and for this purpose."""
    try:
        made, message = bytes.fromhex(signature), _message(purpose, text)
        if isinstance(key, Ed25519PublicKey):
            key.verify(made, message)
        else:
            key.verify(made, message, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        return False
    return True


def _message(purpose: str, text: str) -> bytes:
    assert purpose.replace("-", "").isalpha(), purpose  # else a purpose could run into a text
    return f"fedtailor/{purpose}/1\n{text}".encode()


def spelled(key: Public) -> str:
    """A public key as hexadecimal (DER), to stand in a document."""
    return key.public_bytes(serialization.Encoding.DER, _SPKI).hex()


def public(text: str) -> Public:
    """The key that :func:`spelled` wrote.

    Raises:
        ConfigError: if it is none.
    """
    try:
        key = serialization.load_der_public_key(bytes.fromhex(text))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"not a public key: {text[:16]}…") from error
    return _of_ours(key, "the public key")


def make_signer(private: Path, shown: Path) -> None:
    """Make an Ed25519 key pair: ``private`` is its owner's alone, ``shown`` is for everybody. Nothing is replaced."""
    if private.exists():
        raise ConfigError(f"{private} exists; it is not replaced, because what it signed would no longer verify")
    key = Ed25519PrivateKey.generate()
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.parent.mkdir(parents=True, exist_ok=True)
    store.write_bytes(private, key.private_bytes(_PEM, form, plain), mode=0o600)
    store.write_bytes(shown, key.public_key().public_bytes(_PEM, _SPKI), mode=0o644)


def load_signer(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 private key; it must be readable by its owner only."""
    try:
        if os.stat(path).st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others; run: chmod 600 {path}")
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not a readable private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is not an Ed25519 key")
    return key


def load_public(path: Path) -> Public:
    """Read a public key from a PEM file."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not a readable public key: {error}") from error
    return _of_ours(key, str(path))


def _of_ours(key: Any, name: str) -> Public:
    if not isinstance(key, Ed25519PublicKey | ec.EllipticCurvePublicKey):
        raise ConfigError(f"{name} is neither Ed25519 nor elliptic-curve")
    return key
