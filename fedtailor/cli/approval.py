"""``fedtailor client plans | approve | refuse | …``: a site's people decide what runs and what leaves."""

import getpass
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedtailor.cli.client import ask
from fedtailor.cli.options import SITE_HOME, Json, SiteHome, show, table

Which = Annotated[str, typer.Argument(metavar="PLAN", help="The beginning of the plan's hash, or the run's name.")]


def plans(
    plan: Annotated[str | None, typer.Argument(help="Show this one whole: the beginning of its hash.")] = None,
    home: SiteHome = SITE_HOME,
    json: Json = False,
) -> None:
    """List the studies that were proposed to this site, or show one in plain words."""
    if plan is not None:
        _print(ask(home, "Plan", {"plan": plan}), json)
        return
    answer = ask(home, "Plans")
    if not show(answer, json):
        rows = [
            [r["hash"], r["run"], r["state"], r["rounds"], r["epsilon"], ", ".join(r["sites"]), _day(r["expires"])]
            for r in answer["rows"]
        ]
        table("plans", ["hash", "run", "state", "rounds", "epsilon", "sites", "expires"], rows)


def check(plan: Which, home: SiteHome = SITE_HOME, json: Json = False) -> None:
    """Rehearse a plan on this site's data, sending nothing: what the policy will say, and what it would take."""
    answer = ask(home, "Check", {"plan": plan}, timeout=3600.0)
    forecast = answer["forecast"]
    if not show(answer, json):
        _rules(answer)
        for note in answer["notes"]:
            Console().print(f"data: {note}", highlight=False)
        if forecast is not None:
            rows = [
                ["epsilon of this study", forecast["epsilon"]],
                ["epsilon of the data set after it", forecast["epsilon_after"]],
                ["bytes that leave", f"{forecast['bytes_out']:,}"],
                ["bytes that come", f"{forecast['bytes_in']:,}"],
                ["seconds of work a round", forecast["seconds_a_round"]],
                ["minutes of work in all", forecast["minutes"]],
                ["megabytes of memory, at most", forecast["memory_mb"]],
            ]
            table("what it would take", ["", ""], rows)
    if forecast is None:
        raise typer.Exit(3)


def explain(plan: Which, home: SiteHome = SITE_HOME, json: Json = False) -> None:
    """Show rule by rule what this site's policy says of a plan. Exit code 3 where it refuses."""
    answer = ask(home, "Plan", {"plan": plan})
    if not show(answer, json):
        _rules(answer)
    if not all(rule["ok"] for rule in answer["rules"]):
        raise typer.Exit(3)


def approve(
    plan: Which,
    key: Annotated[Path | None, typer.Option(help="An officer's key, where the policy names officers.")] = None,
    home: SiteHome = SITE_HOME,
    json: Json = False,
) -> None:
    """Let a study run at this site. The approval is of the plan's hash: a changed plan needs a new one."""
    request: dict[str, Any] = {"plan": plan, "who": getpass.getuser()}
    if key is not None:
        from fedtailor import seals
        from fedtailor.client.plans import approves

        shown, signer = ask(home, "Plan", {"plan": plan}), seals.load_signer(key)
        words = approves(ask(home, "Status")["site"], shown["hash"])
        request |= {
            "plan": shown["hash"],
            "officer": seals.spelled(signer.public_key()),
            "signature": seals.sign(signer, "approval", words),
        }
    answer = ask(home, "Approve", request)
    if not show(answer, json):
        needed = f" ({answer['approvals']} of {answer['needed']} officers)" if answer["needed"] else ""
        Console().print(f"{answer['run']}: {answer['state']}{needed}", highlight=False)


def refuse(plan: Which, home: SiteHome = SITE_HOME, json: Json = False) -> None:
    """Refuse a study; one that runs stops here with its next visit."""
    answer = ask(home, "Refuse", {"plan": plan, "who": getpass.getuser()})
    if not show(answer, json):
        Console().print(f"{answer['run']}: {answer['state']}", highlight=False)


def held(home: SiteHome = SITE_HOME, json: Json = False) -> None:
    """List the answers that wait for a person's release (policy: hold)."""
    answer = ask(home, "Held")
    if not show(answer, json):
        rows = [[r["answer"], r["run"], r["round"], r["bytes"]] for r in answer["rows"]]
        table("held", ["answer", "run", "round", "bytes"], rows)


def release(
    answer: Annotated[str, typer.Argument(help="As listed by: fedtailor client held")],
    home: SiteHome = SITE_HOME,
    json: Json = False,
) -> None:
    """Let one held answer leave."""
    released = ask(home, "Release", {"answer": answer, "who": getpass.getuser()})
    if not show(released, json):
        Console().print(f"released: {released['run']}, round {released['round']}", highlight=False)


def receipts(plan: Which, home: SiteHome = SITE_HOME, json: Json = False) -> None:
    """Show the coordinator's signed receipts: in which rounds' models this site's answers are."""
    answer = ask(home, "Receipts", {"plan": plan})
    if not show(answer, json):
        import json as jsonlib

        found = [jsonlib.loads(one["receipt"]) for one in answer["receipts"]]
        rows = [[one["round"], one["summand_sha256"][:16], one["root"][:16], one["count"]] for one in found]
        table(f"receipts of {answer['run']}", ["round", "answer", "root", "sites"], rows)


def officer(
    key: Annotated[Path, typer.Argument(help="Where to write the officer's private key.")], json: Json = False
) -> None:
    """Make an officer's signing key; its public half goes into the site's policy, under officers."""
    from fedtailor import seals

    seals.make_signer(key, key.with_suffix(".pub"))
    word = seals.spelled(seals.load_signer(key).public_key())
    if not show({"key": str(key), "officer": word}, json):
        Console().print(
            f"keep {key} with the officer alone; in site.yaml, under policy.officers:\n{word}", highlight=False
        )


def _print(answer: dict[str, Any], as_json: bool) -> None:
    from fedtailor.inspection import sentences

    if show(answer, as_json):
        return
    Console().print(f"plan {answer['hash']}", highlight=False)
    for line in sentences(answer):
        Console().print(f"- {line}", highlight=False)
    _rules(answer)
    Console().print(f"state: {answer['state']}", highlight=False)
    if answer["state"] == "pending":
        Console().print(f"to let it run: fedtailor client approve {answer['hash'][:12]}", highlight=False)


def _rules(answer: dict[str, Any]) -> None:
    rows = [["yes" if r["ok"] else "NO", r["what"], r["asked"], r["allowed"], r["code"]] for r in answer["rules"]]
    table("this site's policy", ["holds", "rule", "the plan asks", "allowed", "code"], rows)


def _day(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def add_to(app: typer.Typer) -> None:
    """Offer these commands beside the client's others."""
    for command in (plans, check, explain, approve, refuse, held, release, receipts, officer):
        app.command()(command)
