"""A fixed split by subject, the same whatever the order of the rows."""

import hashlib
from collections.abc import Sequence

from fedtailor.contract import Row
from fedtailor.errors import ContractError


def held_out(rows: Sequence[Row], fraction: float, seed: int) -> list[bool]:
    """Which rows are held out for testing: about ``fraction`` of each label's subjects, drawn by a keyed hash.

    All rows of a subject are on one side. A subject without a name is its row's content, and equal rows are told
    apart by counting. A subject's label, for stratifying, is positive if any of its rows is.

    Raises:
        ContractError: if either side would have fewer than two rows.
    """
    seen: dict[str, int] = {}
    subjects: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        name = row.subject
        if name is None:
            content = repr((row.values, row.label))
            seen[content] = seen.get(content, 0) + 1
            name = f"{content}#{seen[content]}"
        subjects.setdefault(name, []).append(i)
    test = [False] * len(rows)
    for label in (0.0, 1.0):
        members = [name for name, where in subjects.items() if max(rows[i].label for i in where) == label]
        members.sort(key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
        for name in members[: round(fraction * len(members))]:
            for i in subjects[name]:
                test[i] = True
    if sum(test) < 2 or len(test) - sum(test) < 2:
        raise ContractError(
            f"{len(rows)} rows split into {len(test) - sum(test)} for training and {sum(test)} for testing; "
            "each side needs at least two: more data, or another test_fraction"
        )
    return test
