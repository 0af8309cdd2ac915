"""docs/strategies.md says what the code says."""

import re
import runpy
import shlex
from pathlib import Path

from fedtailor import Strategy
from fedtailor.config import build, load, shipped

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "strategies.md").read_text()


def test_the_catalogue_is_up_to_date():
    made = runpy.run_path(str(ROOT / "scripts" / "strategies_doc.py"))["page"]()
    assert made == PAGE, "run scripts/strategies_doc.py"


def test_every_row_has_a_purpose_a_paper_and_its_own_words():
    rows = [
        re.split(r"(?<!\\) \| ", line)
        for line in PAGE.split("<!--")[1].splitlines()
        if line.startswith("| `") and "`strategy=`" not in line
    ]
    assert [row[0] for row in rows] == [f"| `{name}`" for name in shipped("strategy")]
    assert len({row[1] for row in rows}) == len(rows)
    assert all("](https://" in row[-1] for row in rows)
    told = {row[0][3:-1]: (row[3], row[4]) for row in rows}
    assert told["fedavg"] == ("yes", "record, site")
    assert told["robust"] == ("no", "record")
    assert told["qfedavg"] == ("yes", "site")


def test_every_command_on_the_page_makes_a_strategy():
    commands = re.findall(r"^fedtailor simulate (.*)$", PAGE, re.M)
    assert len(commands) == 2
    for command in commands:
        build(load(shlex.split(command)).plan.strategy, Strategy)
