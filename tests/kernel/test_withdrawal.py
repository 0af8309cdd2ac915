"""A notice of withdrawal: signed by its site, and the later of two counts."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedtailor import withdrawal
from fedtailor.errors import WireError
from fedtailor.withdrawal import Notice, noticed, standing

KEY = ec.generate_private_key(ec.SECP384R1())


def at(number, says, study=None):
    return Notice(site="a", number=number, study=study, says=says, time=9)


def test_a_notice_is_read_by_who_has_the_sites_key():
    notice = noticed(KEY, "a", 3, "heart", "withdrawn")
    assert withdrawal.read(notice.model_dump_json(), "a", KEY.public_key()) == notice


@pytest.mark.parametrize(
    "changed", [{"site": "b"}, {"study": None}, {"says": "back"}, {"time": 1}, {"number": 4}, {"signature": ""}]
)
def test_a_notice_that_was_changed_is_none(changed):
    notice = noticed(KEY, "a", 3, "heart", "withdrawn").model_copy(update=changed)
    with pytest.raises(WireError) as error:
        withdrawal.read(notice.model_dump_json(), "a", KEY.public_key())
    assert error.value.code == "notice"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_what_is_no_notice_is_refused(text):
    with pytest.raises(WireError):
        withdrawal.read(text, "a", KEY.public_key())


@pytest.mark.parametrize(
    ("notices", "out"),
    [
        ([], set()),
        ([at(1, "withdrawn")], {None}),
        ([at(1, "withdrawn", "heart")], {"heart"}),
        ([at(3, "back"), at(1, "withdrawn"), at(2, "withdrawn", "heart")], set()),
        ([at(1, "back"), at(2, "withdrawn")], {None}),
        ([at(1, "withdrawn"), at(2, "back", "heart")], {None}),  # all is all
        ([at(1, "withdrawn", "heart"), at(2, "withdrawn", "lungs"), at(3, "back", "heart")], {"lungs"}),
    ],
)
def test_the_later_counts(notices, out):
    assert standing(notices) == out
