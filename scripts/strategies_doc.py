#!/usr/bin/env python3
"""Write the catalogue of docs/strategies.md from the code: scripts/strategies_doc.py [--check]."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from fedtailor import Strategy, strategies
from fedtailor.config import build, load, shipped

PAGE = Path(__file__).resolve().parent.parent / "docs" / "strategies.md"
BEGIN, END = "<!-- catalogue: written by scripts/strategies_doc.py -->", "<!-- end of the catalogue -->"


def catalogue() -> str:
    """One row for each choice of the group ``strategy``: everything comes from its code, its YAML file and its value."""
    head = "| `strategy=` | what for | arguments | sum | privacy | paper |\n|---|---|---|---|---|---|\n"
    return head + "".join(f"{row(name)}\n" for name in shipped("strategy"))


def row(name: str) -> str:
    """One choice."""
    factory = getattr(strategies, name)
    spec = load([f"strategy={name}"]).plan.strategy
    strategy = build(spec, Strategy)
    listed = spec.model_extra or {}
    arguments = ", ".join(f"`{key}`: {shown(listed[key])}" for key in inspect.signature(factory).parameters)
    paper = re.search(r"https://[\w./-]*\w", inspect.getmodule(factory).__doc__ or "")
    units = [unit for unit, ok in (("record", not strategy.needs_loss), ("site", strategy.reduce.is_sum)) if ok]
    purpose = (inspect.getdoc(factory) or "").splitlines()[0].replace("``", "`").replace("|", "\\|")
    link = f"[{paper[0].rpartition('/')[2]}]({paper[0]})" if paper else ""
    is_sum = "yes" if strategy.reduce.is_sum else "no"
    return f"| `{name}` | {purpose} | {arguments} | {is_sum} | {', '.join(units) or 'none'} | {link} |"


def shown(value: Any) -> str:
    """An argument's value as YAML has it."""
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def page() -> str:
    """The page with its catalogue made anew."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{catalogue()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    made = page()
    if "--check" in sys.argv and made != PAGE.read_text():
        sys.exit(f"{PAGE} is out of date; run scripts/strategies_doc.py")
    PAGE.write_text(made)
