"""The model card: what a hospital and a regulator must know of a released model."""

from fedtailor.recipe import Metrics
from fedtailor.result import Result
from fedtailor.study import Plan

SHOWN = ("auroc", "auprc", "accuracy", "f1", "precision", "recall", "loss")


def number(value: float | None) -> str:
    """A metric for people; what was not estimable says so."""
    return "not estimable" if value is None else f"{value:.3f}"


def model_card(result: Result, plan: Plan, plot: bool) -> str:
    """Markdown. Everything in it comes from the result and the plan."""
    return "\n".join(
        [
            f"# Model card: {result.study}",
            "",
            f"A model tailored together by {len(result.sites)} sites in {result.rounds} rounds "
            f"({result.status}), strategy `{result.strategy}`, engine `{result.engine}`, seed {result.seed}.",
            "",
            "## What it is",
            f"- Recipe: `{_call(plan)}`; {result.model.parameters} parameters.",
            f"- File: `{result.model.path}` (safetensors), SHA-256 `{result.model.sha256}`.",
            "- Load it with `safetensors.torch.load_file`; inputs are prepared by the recipe's data contract.",
            f"- Plan: SHA-256 `{plan.digest()}`; the whole of it is in `config.yaml`.",
            "",
            "## Data",
            "Rows stayed at their sites. A fixed share of each site's subjects was held out for the metrics below.",
            "",
            "| site | rows |",
            "|---|---|",
            *(f"| {name} | {site.rows} |" for name, site in sorted(result.sites.items())),
            "",
            "## Metrics on each site's held-out part",
            "*alone* is the same model and number of steps on that site's own data only.",
            "",
            *_metrics(result),
            "",
            *(["![metrics over the rounds](rounds.png)", ""] if plot else []),
            "## Privacy",
            *_privacy(result),
            "",
            "## Limits",
            "- The held-out parts are small; a difference of a few hundredths between columns is within chance.",
            "- Sites differ in how they record data (see each site's missing values); a site that did not take part may differ more.",
            "- A model trained on personal data is not anonymous by itself: who releases it must document why extraction is negligibly likely.",
            "- It is not a medical device and decides nothing by itself.",
            *_dropped(result),
            "",
            "## Made with",
            ", ".join(f"{name} {version}" for name, version in sorted(result.versions.items())),
            "",
        ]
    )


def _call(plan: Plan) -> str:
    spec = plan.recipe.model_dump(by_alias=True)
    target = spec.pop("_target_")
    return f"{target}({', '.join(f'{key}={value!r}' for key, value in spec.items())})"


def _metrics(result: Result) -> list[str]:
    def row(name: str, alone: Metrics, federated: Metrics) -> list[str]:
        names = [metric for metric in SHOWN if metric in federated or metric in alone]
        return [
            f"| {name} | {metric} | {number(alone.get(metric))} | {number(federated.get(metric))} |" for metric in names
        ]

    lines = ["| site | metric | alone | federated |", "|---|---|---|---|"]
    for name, site in sorted(result.sites.items()):
        lines += row(name, site.metrics.get("local_only", {}), site.metrics.get("federated", {}))
    return lines + row(
        "all (weighted by rows)", result.metrics.get("local_only", {}), result.metrics.get("federated", {})
    )


def _privacy(result: Result) -> list[str]:
    if result.privacy is None:
        return [
            "**No differential privacy.** Nothing here bounds what the model reveals of a record it was trained on."
        ]
    stated, lines = result.privacy, []
    if result.engine == "simulation":
        lines.append(
            "**Simulated noise.** It was seeded, so this file must not be released; the figures are what a deployment would give."
        )
    return [
        *lines,
        f"- Unit: one **{stated.unit}**; ε ≤ **{stated.epsilon_max:.3f}** at δ = {stated.delta:g} at every site.",
        f"- Accountant: {stated.accountant}; no amplification is claimed against the coordinator.",
        f"- Covered: {stated.covers}.",
        f"- **Not** covered: {stated.not_covered}.",
        "- If the same person is at several sites, the ε of those sites add up for that person.",
    ]


def _dropped(result: Result) -> list[str]:
    if not result.dropped:
        return []
    lost = ", ".join(f"{d['site']} in round {d['round']} ({d['code']})" for d in result.dropped[:20])
    return [f"- Replies that did not count: {lost}."]
