"""The model card: what a hospital and a regulator must know of a released model."""

import math
from decimal import Decimal
from typing import Any

import yaml

from fedtailor.recipe import Metrics
from fedtailor.result import Kind, PrivacyResult, Result
from fedtailor.study import LocalTraining, Plan, Sgd

EMPTY: Metrics = {}


def model_card(result: Result, plan: Plan, no_plot: str = "") -> str:
    """Markdown. Everything in it comes from the result and the plan.

    Args:
        no_plot: why there is no picture of the rounds; empty where there is one.
    """
    sections = {
        "What it is for": _purpose(result, plan),
        "Data": _data(result),
        "How it was made": _recipe(result, plan),
        "How well it does": _metrics(result, no_plot),
        "Privacy": _privacy(result),
        "Limits": _limits(result),
        "How to load it": _loading(result),
        "Made with": [", ".join(f"{name} {version}" for name, version in sorted(result.versions.items())) + "."],
    }
    lines = [f"# Model card: {result.study}", ""]
    for heading, text in sections.items():
        lines += [f"## {heading}", "", *text, ""]
    return "\n".join(lines)


def number(value: float | None) -> str:
    """A metric for people; what was not estimable says so, and is never a zero."""
    return "not estimable" if value is None else f"{value:.3f}"


def at_most(epsilon: float) -> str:
    """An upper bound, rounded up: rounding to the nearest would promise more than was kept.

    >>> at_most(1.0001)
    '1.001'
    """
    thousandths = math.ceil(Decimal(str(epsilon)) * 1000)  # decimal: 2.007 is 2.007, not 2.008
    return f"{thousandths // 1000}.{thousandths % 1000:03d}"


def spent(epsilon: float | None, result: Result) -> str:
    """What a run cost one site, of what the plan allowed."""
    if epsilon is None:
        return "no DP"
    budget = result.privacy.epsilon_budget if result.privacy else None
    return at_most(epsilon) + ("" if budget is None else f" of {budget:g}")


def _purpose(result: Result, plan: Plan) -> list[str]:
    ended = "" if result.status == "completed" else f" **The study did not run to its end: {result.status}.**"
    return [
        f"The model that {len(result.sites)} sites made together in the study `{result.study}`, for the task that its "
        f"recipe describes (below), at institutions whose data satisfy the same contract.{ended}",
        "",
        "It is a research result. It is not a medical device, has not been validated for clinical or credit decisions, "
        "and must not decide anything about a person by itself.",
    ]


def _data(result: Result) -> list[str]:
    rows = [f"| {name} | {site.rows:,} |" for name, site in sorted(result.sites.items())]
    return [
        "Rows stayed at their sites. Each site trained on one part and held out the rest, split by subject, to measure.",
        "",
        "| site | rows, both parts |",
        "|---|---:|",
        *rows,
        f"| **all** | **{sum(site.rows for site in result.sites.values()):,}** |",
    ]


def _by(local: LocalTraining) -> str:
    said = local.optimizer.model_dump(exclude_defaults=True)
    parts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in said.items())
    name = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}[local.optimizer.name]
    if local.optimizer == Sgd():
        return ""
    return f" by {name}{' with ' if parts else ''}{parts}, which began anew in each round"


def _recipe(result: Result, plan: Plan) -> list[str]:
    used = {"recipe": plan.recipe, "strategy": plan.strategy}
    spec = yaml.safe_dump({k: v.model_dump(mode="json", by_alias=True) for k, v in used.items()}, sort_keys=False)
    local, of = plan.local, result.population
    return [
        f"{result.rounds} of {plan.rounds} rounds{_asked(plan, of)} took {local.steps} steps, each on {_share(local)} "
        f"of its training rows{_dealt(of)}, at learning rate {local.lr:g}{_by(local)}. Seed {result.seed}, engine "
        f"`{result.engine}`, {_transport(result)}.",
        "",
        "```yaml",
        *spec.rstrip().splitlines(),
        "```",
        "",
        f"The whole plan is in `config.yaml`; its SHA-256 is `{plan.digest()}`.",
    ]


def _share(local: LocalTraining) -> str:
    """Of its rows, what a step saw."""
    if local.sampling == "shuffled":
        return f"one of {local.epoch} equal parts, in an order drawn anew for every pass over them,"
    return f"a random {100 * local.rate:g} %"


def _asked(plan: Plan, of: dict[str, Any] | None) -> str:
    """Who worked in a round."""
    many = {} if of is None else of
    if plan.buffer is None:
        who = f"some {many['cohort']} of {many['clients']} virtual clients" if many else "every site"
        return f"; in each, {who}"
    answers = many.get("answers") or plan.buffer.answers
    who = f"one of {many['clients']} virtual clients, {many['cohort']} at a time," if many else "a site"
    return (
        f", each closed by {answers} answers or its deadline, some of them to an earlier round's model; for each, {who}"
    )


def _dealt(of: dict[str, Any] | None) -> str:
    return "" if of is None else f" (all sites' training rows were dealt out to the clients: `{of['partition']}`)"


def _transport(result: Result) -> str:
    if result.transport is None:
        return "no network"
    used = result.transport
    words = [("mutual TLS", used.mutual_tls), ("TLS", used.tls and not used.mutual_tls)]
    words.append(("authenticated nodes", used.node_auth))
    return " and ".join(word for word, there in words if there) or "**unprotected connections**"


def _metrics(result: Result, no_plot: str) -> list[str]:
    lines = [
        "On each site's held-out rows. *Alone* is the same recipe and number of steps on that site's own rows only, "
        "without privacy; *federated* is the model of this card. The mean is weighted by training rows, over the sites "
        "where a metric could be estimated.",
        "",
    ]
    kinds: dict[Kind, str] = {"local_only": "alone", "federated": "federated"}
    if "personal" in result.metrics:
        kinds["personal"] = "own"
        lines[0] += (
            " *Own* is each site's own model, of which at least a part has never left it. Parameters that the strategy "
            "leaves to the sites are in the file of this card as they began, untrained: it is then no model to predict "
            "with, and *federated* is measured with them."
        )
    lines += [f"| site | metric | {' | '.join(kinds.values())} |", f"|---|---|{'---:|' * len(kinds)}"]
    for name, site in sorted(result.sites.items()):
        lines += _rows(name, [site.metrics.get(kind, EMPTY) for kind in kinds])
    lines += _rows("**mean**", [result.metrics.get(kind, EMPTY) for kind in kinds])
    if pooled := result.metrics.get("pooled"):
        lines += ["", "Trained on all rows in one place, for comparison: "]
        lines[-1] += ", ".join(f"{name} {number(value)}" for name, value in pooled.items()) + "."
    lines += ["", f"There is no picture of the rounds: {no_plot}." if no_plot else "![each site's rounds](rounds.png)"]
    return lines


def _rows(name: str, measured: list[Metrics]) -> list[str]:
    names = dict.fromkeys(m for metrics in reversed(measured) for m in metrics)
    return [f"| {name} | {m} | {' | '.join(_cell(metrics, m) for metrics in measured)} |" for m in names]


def _cell(metrics: Metrics, name: str) -> str:
    return number(metrics[name]) if name in metrics else "not measured"


def _privacy(result: Result) -> list[str]:
    stated = result.privacy
    if stated is None:
        return ["**No differential privacy.** Nothing bounds what the model reveals of the rows it was trained on."]
    if result.engine == "simulation":
        return [
            "**This file is not private and must not be released.** It was simulated: its noise came from a seed that is "
            f"in this card, and can be subtracted. The statement below is {_whose(stated, result)}.",
            "",
            *_statement(stated, result),
        ]
    return _statement(stated, result)


def _whose(stated: PrivacyResult, result: Result) -> str:
    if result.population is None or stated.unit == "record":
        return "what the same study gives in a deployment"
    return (
        "of the simulated clients, each a site of its own; a deployment of this plan has none of them, asks its sites in "
        "every round, and has nothing of what drawing clients in secret saves"
    )


def _statement(stated: PrivacyResult, result: Result) -> list[str]:
    costs = [f"| {name} | {spent(site.epsilon, result)} |" for name, site in sorted(result.sites.items())]
    return [
        f"**({at_most(stated.epsilon_max)}, {stated.delta:g})-differential privacy for one {stated.unit}**, at every site "
        f"listed, over all rounds of this study.",
        "",
        *_unit(stated),
        f"- Accountant: {stated.accountant}. No amplification is claimed against the coordinator.",
        f"- Covered: {stated.covers}.",
        f"- **Not** covered: {stated.not_covered}.",
        *_sums(stated),
        "",
        "| site | ε spent |",
        "|---|---:|",
        *costs,
    ]


def _unit(stated: PrivacyResult) -> list[str]:
    if stated.unit == "site":
        return [
            "- Unit: one site: the guarantee compares the run with one in which this site's contribution is nothing; that it "
            "takes part is public. **A record is not hidden beyond that, and nothing is hidden from the coordinator.**"
        ]
    return [
        "- Unit: one record: the guarantee compares training with it and with a blank in its place; how many rows there "
        "are is public. A person with k records is protected by about k times this ε."
    ]


def _sums(stated: PrivacyResult) -> list[str]:
    if stated.unit == "site":
        return [
            "- A site that takes part in several studies must add up their ε: no ledger does, because it is the "
            "coordinator who adds the noise."
        ]
    return [
        "- Who has records at several sites must add up the ε of those sites; so must whoever takes part in several "
        "studies. Each site's own ledger holds its sum over all studies.",
        "- A site whose reply did not count may have spent more than its last report says, never more than the plan.",
    ]


def _limits(result: Result) -> list[str]:
    lines = [
        "- Held-out parts are small: differences of a few hundredths are within chance. *Not estimable* means too few "
        "held-out rows, or one class only; it does not mean zero.",
        "- Sites differ in whom they see and how they record it; a site that did not take part may differ more. Measure "
        "the model on local data before any use.",
        "- A model trained on personal data is not anonymous by itself. Whoever releases it must assess that.",
    ]
    if result.dropped:
        lost = ", ".join(f"{d['site']} in round {d['round']} ({d['code']})" for d in result.dropped[:20])
        more = f", and {len(result.dropped) - 20} more (see `result.json`)" if len(result.dropped) > 20 else ""
        lines.append(f"- Replies that did not count: {lost}{more}.")
    return lines


def _loading(result: Result) -> list[str]:
    return [
        f"`{result.model.path}`: {result.model.parameters:,} parameters, safetensors (data only, no code), SHA-256",
        f"`{result.model.sha256}`.",
        "",
        "```python",
        "from safetensors.torch import load_file",
        "",
        f'params = load_file("{result.model.path}")  # the state dict of the recipe\'s model, but for what the recipe freezes',
        "```",
        "",
        "Inputs must be prepared as the recipe's data contract says.",
    ]
