"""What a peer's process says of its rounds, in the interpreter of any of them: no more than the standard library."""

import json

COLD = 2  # rounds that do not count, before the others


def say(marks: list[float]) -> None:
    """Print the seconds between ``marks``, which are of the beginning and of every round's end."""
    each = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    print(json.dumps({"seconds": each[COLD:], "warm_up_s": each[:COLD]}))
