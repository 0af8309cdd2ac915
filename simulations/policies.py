"""The sites' rules in a simulation: the same engine, arithmetic and list of what leaves as a daemon's, without its files.

What is decided here is decided alike there: tests/client/test_predictions.py holds the two together.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from fedtailor import plugins, seeds, tree
from fedtailor.config import readable
from fedtailor.errors import ConfigError, RefusedError, WireError
from fedtailor.leaving import METRIC_DIGITS, Leaving, agreed
from fedtailor.policy import Case, Policy, Rule, verdict
from fedtailor.recipe import Metrics
from fedtailor.study import Plan
from fedtailor.tree import Tree


def read(path: Path, sites: tuple[str, ...]) -> dict[str, Policy]:
    """Policies from a YAML file: one for all sites, or one by each site's name.

    Raises:
        ConfigError: naming what is wrong in the file.
    """
    try:
        raw: Any = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"simulation.policy: {path} cannot be read: {error}") from error
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"simulation.policy: {path} holds no policy; no policy means refuse")
    by_site = raw if raw.keys() <= set(sites) else dict.fromkeys(sites, raw.get("policy", raw))
    try:
        return {site: Policy.model_validate(one) for site, one in by_site.items()}
    except ValidationError as error:
        raise ConfigError(f"simulation.policy: {path}: {readable(error)}") from error


def judge(plan: Plan, policies: Mapping[str, Policy]) -> dict[str, list[Rule]]:
    """Each site's verdict on a plan. A site without a policy refuses everything, and so has no verdict here."""
    leaves, codes = agreed(plan.canonical()), [plugin.code() for plugin in plugins.of(plan)]
    known = [site for site in plan.sites if site in policies]
    return {site: verdict(policies[site], plan, Case(site, [], leaves.bytes, leaves.models, codes)) for site in known}


class Gate(NamedTuple):
    """The sites that take part, why others do not, and the airlock of those that do."""

    plan: Plan  # with the sites that take part
    policies: Mapping[str, Policy]
    dropped: list[dict[str, Any]]  # {"round", "site", "code"}; grows as answers are dropped
    leaves: Leaving

    def keep(self, summands: Tree, first: int, round: int) -> Tensor | None:
        """Which rows of a block of answers leave; None where all do. A site whose answer is dropped is out for good."""
        out = {entry["site"] for entry in self.dropped}
        kept = []
        for row in range(len(tree.leaves(summands)[0])):
            site = self.plan.sites[first + row]
            try:
                if site not in out:
                    self.leaves.check(tree.flatten(tree.at(summands, row)), train=True)
                    kept.append(row)
            except WireError as error:
                self.dropped.append({"round": round, "site": site, "code": f"airlock-{error.code}"})
        return None if len(kept) == len(tree.leaves(summands)[0]) else torch.tensor(kept, dtype=torch.long)

    def metrics(self, site: str, measured: Metrics, test_rows: int, which: int) -> Metrics | None:
        """What leaves of a site's metrics; ``which`` names the release, for its seeded noise."""
        policy = self.policies[site]
        if not policy.metrics or test_rows < policy.minimum_count:
            return None
        rounded = self.leaves.rounded(measured)
        if policy.metric_noise is None:
            return rounded
        if (exact := rounded.get("accuracy")) is None:
            return None
        rng = seeds.generator(self.plan.seed, "metric", site, which)
        drawn = float(torch.randn((), generator=rng)) * policy.metric_noise / test_rows
        return {"accuracy": min(max(round(exact + drawn, METRIC_DIGITS), 0.0), 1.0)}


def admit(plan: Plan, policies: Mapping[str, Policy]) -> Gate:
    """Ask every site.

    Raises:
        RefusedError: code ``quorum``, if too few agree, naming each site's reason.
    """
    verdicts = judge(plan, policies)
    codes = {site: next((rule.code for rule in verdicts.get(site, []) if not rule.ok), None) for site in plan.sites}
    codes |= {site: "policy" for site in plan.sites if site not in policies}
    refused = {site: code for site, code in codes.items() if code is not None}
    sites = tuple(site for site in plan.sites if site not in refused)
    if len(sites) < plan.quorum:
        why = ", ".join(f"{site}: {code}" for site, code in sorted(refused.items()))
        raise RefusedError(
            f"{len(sites)} of {len(plan.sites)} sites agree to the plan, the quorum is {plan.quorum} ({why})",
            code="quorum",
        )
    dropped = [{"round": 0, "site": site, "code": code} for site, code in sorted(refused.items())]
    return Gate(plan.model_copy(update={"sites": sites}), policies, dropped, agreed(plan.canonical()))
