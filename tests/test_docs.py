"""The documents name commands, options, files and tests that are there."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from fedtailor.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = typer.main.get_command(app)


def commands(page: Path) -> list[str]:
    """The fedtailor commands in a page's code blocks and code words."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL))
    lines = [line.split("  #")[0].strip() for line in blocks.splitlines()]
    words = [word.replace("\n", " ") for word in re.findall(r"`(fedtailor [^`]*)`", text)]
    found = [line for line in [*lines, *words] if re.match(r"fedtailor( |$)", line)]
    return [alternative for line in found for alternative in alternatives(line)]


def alternatives(line: str) -> list[str]:
    """``fedtailor client plans | explain`` names two commands."""
    head, *more = [part.strip() for part in line.split(" | ")]
    stem = " ".join(head.split()[:2])
    return [head, *(f"{stem} {part}" for part in more)]


def check(line: str) -> None:
    words = shlex.split(line.replace("…", "").replace("'", '"'))[1:]
    command: click.Command = COMMAND
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{line}: there is no {words[0]!r}"
        command = command.commands[words.pop(0)]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in options | {"--help"}, f"{line}: there is no {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_are_there(page):
    for line in commands(page):
        check(line)


def test_this_finds_commands_and_knows_a_wrong_one():
    assert len([line for page in PAGES for line in commands(page)]) > 60
    for wrong in ("fedtailor client jion", "fedtailor server up --prot 1", "fedtailor sever"):
        with pytest.raises(AssertionError):
            check(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_are_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"`((?:tests|scripts|benchmarks|configs)/[\w/.*-]+)`", text):
        assert "/my_" in name or list(ROOT.glob(name)), f"{page.name} names {name}"
