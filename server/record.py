"""What a run has brought so far, and the result that it makes of it."""

from typing import Any, NamedTuple

from fedtailor.privacy.site_accounting import epsilon_after
from fedtailor.recipe import Metrics
from fedtailor.result import (
    Ending,
    Kind,
    Result,
    SiteResult,
    Timing,
    Transport,
    model_file,
    privacy_result,
    versions,
    weighted,
)
from fedtailor.server.folding import Closed
from fedtailor.study import Plan
from fedtailor.treefile import Model


class Progress(NamedTuple):
    """Everything a run carries from round to round, beside the strategy's state."""

    round: int = 0  # rounds closed
    history: tuple[dict[str, Any], ...] = ()  # per evaluated round: {"round", "sites": {name: metrics}}
    dropped: tuple[dict[str, Any], ...] = ()  # {"round", "site", "code"}
    round_s: tuple[float, ...] = ()
    work_s: tuple[float, ...] = ()  # the slowest site's own work in each round
    wall_s: float = 0.0
    sites: dict[str, dict[str, Any]] = {}  # name -> rows, epsilon, bytes, personal, baseline
    last: Any = None  # of the last rounds, one for each of the plan's turns: fedtailor.server.vouching.Last
    inside: tuple[str, ...] = ()  # sites whose answers are in the model


def noted(progress: Progress, plan: Plan, closed: Closed, round: int, seconds: float | None) -> Progress:
    """Add what a visit brought to the run's record. ``seconds``: of a round that trained."""
    sites = {name: dict(known) for name, known in progress.sites.items()}
    if seconds is None:  # the final visit: what a site measured before was of another model
        for site in sites.values():
            site.pop("personal", None)
    for name, report in closed.reports.items():
        site = sites.setdefault(name, {"bytes_sent": 0, "bytes_received": 0})
        site |= {"rows": report.rows, "train_rows": report.train_rows, "epsilon": report.epsilon}
        site["bytes_sent"] += closed.received[name]
        measured = {"personal": report.personal if report.round == round else None, "baseline": report.baseline}
        site |= {which: metrics for which, metrics in measured.items() if metrics is not None}
    for name, size in closed.sent.items():
        sites.setdefault(name, {"bytes_sent": 0, "bytes_received": 0})["bytes_received"] += size
    reports = sorted(closed.reports.items())
    metrics = {name: one.metrics for name, one in reports if one.metrics is not None and one.round == round}
    history = [*progress.history, {"round": round, "sites": metrics}] if metrics else progress.history
    dropped = [{"round": round, "site": site, "code": code} for site, code in sorted(closed.dropped.items())]
    work = max((report.seconds for report in closed.reports.values()), default=0.0)
    timed = [] if seconds is None else [seconds]
    inside = tuple(sorted({*progress.inside, *(closed.reports if timed else ())}))
    return progress._replace(
        sites=sites,
        inside=inside,
        history=tuple(history),
        dropped=(*progress.dropped, *dropped),
        round_s=(*progress.round_s, *timed),
        work_s=(*progress.work_s, *([work] if timed else [])),
    )


def result_of(
    plan: Plan, progress: Progress, model: Model, *, status: Ending, setup_s: float, transport: dict[str, bool] | None
) -> Result:
    """The result of a run, from its record. A site that never replied is in ``dropped`` only."""
    final: dict[str, Metrics] = progress.history[-1]["sites"] if progress.history else {}
    known = {name: site for name, site in progress.sites.items() if "rows" in site}
    rows = {name: int(site["train_rows"]) for name, site in known.items()}
    alone = {name: site["baseline"] for name, site in known.items() if "baseline" in site}
    personal = {name: site["personal"] for name, site in known.items() if "personal" in site}
    kinds: dict[Kind, dict[str, Metrics]] = {"local_only": alone, "federated": final}
    if personal:
        kinds["personal"] = personal
    sites = {
        name: SiteResult(
            rows=site["rows"],
            metrics={kind: by_site.get(name, {}) for kind, by_site in kinds.items()},
            epsilon=site["epsilon"] if plan.site is None else epsilon_after(plan.site, progress.round),
            bytes_sent=site["bytes_sent"],
            bytes_received=site["bytes_received"],
        )
        for name, site in known.items()
    }
    spent = [site.epsilon for site in sites.values() if site.epsilon is not None]
    return Result(
        study=plan.study,
        strategy=plan.strategy.target.rpartition(".")[2],
        rounds=progress.round,
        sites=sites,
        metrics={kind: weighted(by_site, rows) for kind, by_site in kinds.items()},
        privacy=None if plan.privacy is None else privacy_result(plan.privacy, max(spent, default=0.0)),
        timing=Timing(
            wall_s=progress.wall_s, setup_s=setup_s, round_s=list(progress.round_s), work_s=list(progress.work_s)
        ),
        transport=None if transport is None else Transport(**transport),
        engine="flower",
        seed=plan.seed,
        model=model_file(model),
        versions=versions(),
        status=status,
        dropped=list(progress.dropped),
        history=[
            {"round": h["round"], "sites": h["sites"], "metrics": weighted(h["sites"], rows)} for h in progress.history
        ],
    )
