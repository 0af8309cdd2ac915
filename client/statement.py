"""What the ledger says, for people: what each data set has spent, on what, and what is left."""

from collections import Counter
from typing import Any

from fedtailor.client.ledger import Ledger
from fedtailor.policy import Policy


def statement(ledger: Ledger, account: str, fingerprint: str, policy: Policy) -> dict[str, Any]:
    """Every charge, the sums by data set, and the ledger's head.

    Args:
        account: the data set that ``policy`` caps; others are known by the ledger only, and have no cap.
        fingerprint: of its rows, as far as known; it links charges that were made under another name.
    """
    entries = ledger.statement()
    sums = []
    for name in sorted({entry.account for entry in entries} | {account}):
        of_it = [entry for entry in entries if entry.account == name]
        settled = Counter(entry.study for entry in of_it if entry.settled_digest)
        rounds = Counter(entry.study for entry in of_it)
        spent = ledger.spent(account=name, fingerprint=fingerprint if name == account else "", delta=policy.delta)
        cap = policy.epsilon if name == account else None
        runs = [{"run": run, "settled": settled[run], "open": rounds[run] - settled[run]} for run in rounds]
        sums.append({"data": name, "spent": spent, "cap": cap, "left": None if cap is None else max(cap - spent, 0.0),
                     "delta": policy.delta, "runs": runs})  # fmt: skip
    rows = [
        {"time": entry.time, "data": entry.account, "run": entry.study,
         "state": "settled" if entry.settled_digest else "reserved", "noise": entry.charge.noise_multiplier,
         "rate": entry.charge.rate, "steps": entry.charge.steps}
        for entry in entries
    ]  # fmt: skip
    number, hash = ledger.head()
    return {"accounts": sums, "head": f"{number}:{hash}", "rows": rows}


def sentences(stated: dict[str, Any]) -> list[str]:
    """A :func:`statement` in plain words."""
    lines = []
    for one in stated["accounts"]:
        limit = (
            f" of {one['cap']:g}; {one['left']:.3f} left"
            if one["cap"] is not None
            else "; site.yaml names another data set"
        )
        lines.append(f"{one['data']}: epsilon {one['spent']:.3f} spent{limit} (delta {one['delta']:g})")
        for run in one["runs"]:
            lines.append(f"  {run['run']}: {run['settled']} rounds settled, {run['open']} open")
    lines.append("An open round counts like a settled one.")
    lines.append(f"head: ledger:{stated['head']}")
    lines.append("Note the head elsewhere; later: fedtailor client audit verify --head ledger:NUMBER:HASH")
    return lines
