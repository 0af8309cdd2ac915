"""A site's notice that it takes no further part: signed, so that a coordinator can show why it left the site out."""

import time
from typing import Literal

from pydantic import NonNegativeInt, ValidationError

from fedtailor.errors import WireError
from fedtailor.seals import Private, Public, canonical, genuine, sign
from fedtailor.study import Frozen, Name

NOTICE = "/v1/notice"  # a notice is posted there


class Notice(Frozen):
    """What a site says, in force until it says otherwise; of two, the one with the greater number counts."""

    site: Name
    number: NonNegativeInt
    study: Name | None = None  # None: all of them
    says: Literal["withdrawn", "back"]
    time: int  # seconds since the epoch, by the site's clock
    signature: str = ""  # the site's, over :meth:`text`, for the purpose "withdrawal"

    def text(self) -> str:
        """What is signed."""
        return canonical([self.site, self.number, self.study, self.says, self.time])


def noticed(key: Private, site: str, number: int, study: str | None, says: Literal["withdrawn", "back"]) -> Notice:
    """A signed notice; ``number`` is greater than any before."""
    made = Notice(site=site, number=number, study=study, says=says, time=int(time.time()))
    return made.model_copy(update={"signature": sign(key, "withdrawal", made.text())})


def read(text: str, site: str, key: Public) -> Notice:
    """Verify a notice.

    Raises:
        WireError: code ``notice``, if it is none, or not of this site.
    """
    try:
        notice = Notice.model_validate_json(text)
    except ValidationError:
        raise WireError("not a notice", code="notice") from None
    if notice.site != site or not genuine(key, "withdrawal", notice.text(), notice.signature):
        raise WireError("a notice that its site did not sign", code="notice")
    return notice


def standing(notices: list[Notice]) -> set[str | None]:
    """What is withdrawn from: studies by name, None for all. To be back in all undoes everything before it."""
    out: set[str | None] = set()
    for notice in sorted(notices, key=lambda one: one.number):
        if notice.says == "withdrawn":
            out.add(notice.study)
        elif notice.study is None:
            out.clear()
        else:
            out.discard(notice.study)
    return out
