"""A proposal for people: what it asks, what it costs, what leaves, and which of the site's rules stands against what."""

import time
from typing import Any

from fedtailor.leaving import METRIC_DIGITS
from fedtailor.policy import Rule
from fedtailor.proposal import Proposal


def document(proposal: Proposal, rules: list[Rule]) -> dict[str, Any]:
    """The proposal and a policy's verdict on it, as plain values."""
    plan, leaves = proposal.plan, proposal.leaves
    privacy = plan.privacy
    return {
        "hash": proposal.digest(),
        "run": proposal.run,
        "study": plan.study,
        "recipe": plan.recipe.model_dump(by_alias=True),
        "strategy": plan.strategy.model_dump(by_alias=True),
        "sites": list(plan.sites),
        "quorum": plan.quorum,
        "rounds": plan.rounds,
        "steps": plan.local.steps,
        "within_s": plan.local.within_s,
        "buffer": plan.buffer.model_dump() if plan.buffer else None,
        "privacy": privacy.model_dump() if privacy else None,
        "leaves": {
            "tensors": [one.model_dump() for one in leaves.tensors],
            "metrics": list(leaves.metrics),
            "models": leaves.models,
            "norm": leaves.norm,
            "bytes": leaves.bytes,
            "packed": leaves.packed,
            "bits": leaves.bits(),
        },
        "code": proposal.code,
        "created": proposal.created,
        "expires": proposal.expires,
        "rules": [rule._asdict() for rule in rules],
    }


def rules(shown: dict[str, Any]) -> list[Rule]:
    """The verdict in a document."""
    return [Rule(**rule) for rule in shown["rules"]]


def sentences(shown: dict[str, Any]) -> list[str]:
    """A document in plain words."""
    privacy, leaves = shown["privacy"], shown["leaves"]
    others = ", ".join(shown["sites"])
    lines = [
        f"Study {shown['study']!r} (run {shown['run']}), proposed for {others}.",
        f"{shown['rounds']} rounds of {shown['steps']} training steps each; a round counts with {shown['quorum']} sites.",
        f"It trains {_factory(shown['recipe'])} and aggregates by {_factory(shown['strategy'])}.",
    ]
    for rule in (rule for rule in shown["rules"] if rule["code"] == "plugin"):
        approved = "this site's policy approves it" if rule["ok"] else "this site has NOT approved it"
        lines.append(f"It runs THIRD-PARTY CODE, {rule['asked']}: {approved}.")
    if privacy is None:
        lines.append("WITHOUT differential privacy: what leaves may reveal single records.")
    elif privacy["unit"] == "site":
        lines += [
            f"Site-level differential privacy: epsilon at most {privacy['epsilon']:g} for the whole study at delta "
            f"{privacy['delta']:g} (PLD), noise multiplier {privacy['noise_multiplier']:.4g}, clip {privacy['clip']:g}.",
            "It hides this site's whole part from the other sites and from whoever gets the model. It hides NOTHING from the "
            "coordinator, who adds the noise: what leaves may reveal single records to it.",
        ]
    else:
        lines.append(
            f"Record-level differential privacy: epsilon at most {privacy['epsilon']:g} for the whole study at delta "
            f"{privacy['delta']:g} (PLD), noise multiplier {privacy['noise_multiplier']:.4g}, clip {privacy['clip']:g}."
        )
    names = ", ".join(f"{one['name']} {one['shape']}" for one in leaves["tensors"][:6])
    more = f" and {len(leaves['tensors']) - 6} more" if len(leaves["tensors"]) > 6 else ""
    measured = "the shared model's and your own" if leaves["models"] == 2 else "the shared model's"
    if shown["within_s"] is not None:
        lines.append(f"A site takes as many of its steps as it begins in {shown['within_s']:g} s, and says how many.")
    if shown["buffer"] is not None:
        lines.append(
            f"A round closes on {shown['buffer']['answers']} answers, a quorum of them to its own model; a late one counts "
            "less, in a later round."
        )
    norm = f"an L2 norm of at most {leaves['norm']:g}" if leaves["norm"] else "no bound on their norm"
    packed = ", packed without loss" if leaves["packed"] else ""
    lines += [
        f"Each round these tensors leave, with {norm}, in at most {leaves['bytes']:,} bytes{packed}: {names}{more}.",
        f"If whoever trains were free to choose them, they could carry {leaves['bits']:,} bits a round; the noise of "
        "record-level differential privacy is what limits what they say of a record.",
        f"Metrics that may leave, {measured}, rounded to {METRIC_DIGITS} digits and not private: "
        f"{', '.join(leaves['metrics'])}; beside them row counts and seconds of work.",
        f"It may start until {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(shown['expires']))}.",
    ]
    return lines


def _factory(spec: dict[str, Any]) -> str:
    arguments = ", ".join(f"{key}={value}" for key, value in spec.items() if key != "_target_")
    return f"{spec['_target_'].rpartition('.')[2]}({arguments})"
