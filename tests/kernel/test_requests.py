"""Certificate requests come from strangers: of a good one the key counts, and everything else is refused by code."""

import base64

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor import pki
from fedtailor.errors import WireError

PEM = serialization.Encoding.PEM
KEY = pki.new_key()
DER = x509.load_pem_x509_csr(pki.make_request(KEY, "va").encode()).public_bytes(serialization.Encoding.DER)


def test_of_a_request_only_the_key_counts():
    key = pki.new_key()
    assert pki.read_request(pki.make_request(key, "anybody")) == key.public_key()


def self_signed_by_another(key):
    """A request whose key is not the one that signed it: P-384 keys have the same length, so that it still parses."""
    other = pki.new_key().public_key()
    pem = pki.make_request(key, "va")
    der = x509.load_pem_x509_csr(pem.encode()).public_bytes(serialization.Encoding.DER)
    spki = [k.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
            for k in (key.public_key(), other)]  # fmt: skip
    return x509.load_der_x509_csr(der.replace(*spki)).public_bytes(PEM).decode()


def test_a_request_for_a_key_that_its_sender_does_not_hold_is_refused():
    with pytest.raises(WireError, match="not signed by the key it names") as error:
        pki.read_request(self_signed_by_another(pki.new_key()))
    assert error.value.code == "request"


@given(where=st.integers(0, 10_000), what=st.binary(min_size=1, max_size=4), text=st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_whatever_comes_instead_of_a_request_is_refused_by_code(where, what, text):
    der = bytearray(DER)
    where %= len(der)
    der[where : where + len(what)] = what
    forged = b"-----BEGIN CERTIFICATE REQUEST-----\n%s-----END CERTIFICATE REQUEST-----\n" % base64.encodebytes(der)
    for pem in (text, forged.decode()):
        try:
            assert pki.read_request(pem) == KEY.public_key()
        except WireError as error:
            assert error.code == "request"
