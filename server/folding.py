"""What a round comes to: each answer checked whole and folded as it arrives, then the next state."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from fedtailor import packing, tree
from fedtailor.errors import ConfigError, WireError
from fedtailor.leaving import Leaving, Spec
from fedtailor.privacy.site_level import within_bound
from fedtailor.server.payload import Payload, fold, whole
from fedtailor.server.rounds import Answer
from fedtailor.strategy import Strategy
from fedtailor.study import Buffer, Plan
from fedtailor.tree import Tree
from fedtailor.wire import Report, Visit


class Closed(NamedTuple):
    """A round that is over."""

    acc: Tree | None  # folded summands; None when nobody replied
    reports: dict[str, Report]
    dropped: dict[str, str]  # site -> code word
    received: dict[str, int]  # bytes by site
    sent: dict[str, int]


def close_round(
    strategy: Strategy,
    visit: Visit,
    leaves: Leaving,
    stream: Iterator[Answer],
    on_answer: Callable[[Answer], None],
    vouched: Callable[[str, Report, Visit], None] = lambda site, report, visit: None,
    buffer: Buffer | None = None,
    clip: float | None = None,
) -> Closed:
    """Fold ``stream`` one reply at a time: constant memory where the reduction is a sum.

    A reply is checked whole before any of it is folded; a bad one is dropped by name and changes nothing.

    Args:
        vouched: raises WireError where a report lacks what its site must sign.
        buffer: how much an answer to an earlier round counts.
        clip: of this round, where privacy is of a whole site: an answer beyond it does not count.
    """
    closed = Closed(None, {}, {}, {}, {})
    acc: Tree | None = None
    for answer in stream:
        code = answer.code
        if answer.report is not None and answer.path is not None:
            try:
                asked = answer.visit or visit
                vouched(answer.site, answer.report, asked)
                summand = open_summand(answer, asked, leaves)
                if visit.train and clip is not None and not within_bound(summand, clip):
                    raise WireError("a summand that is not clipped as this round asks", code="norm")
                if answer.visit is not None:
                    summand = discounted(summand, buffer, visit.round - asked.round)
                if visit.train:
                    acc = fold(strategy.reduce, acc, summand)
                del summand  # what was packed is whole in memory
                closed.reports[answer.site] = _listed(answer.report, leaves)
                closed.received[answer.site] = answer.size
            except WireError as error:
                code = error.code
            answer.path.unlink(missing_ok=True)
        if code is not None:
            closed.dropped[answer.site] = code
        on_answer(answer._replace(code=code))
    return closed._replace(acc=whole(strategy.reduce, acc))


def _listed(report: Report, leaves: Leaving) -> Report:
    """A report without the metrics of a model of the site's own, where the strategy gives it none."""
    return report if leaves.models == 2 else report.model_copy(update={"personal": None})


def discounted(summand: Mapping[str, Tensor], buffer: Buffer | None, late: int) -> dict[str, Tensor]:
    """A summand that comes ``late`` rounds after its own, by its weight; its weight within it shrinks as much.

    Raises:
        WireError: code ``stale``, if it is too old to count.
    """
    if buffer is None or late > buffer.oldest:
        raise WireError(f"an answer that comes {late} rounds late", code="stale")
    return {path: x * buffer.weight(late) for path, x in summand.items()}


def advance(plan: Plan, strategy: Strategy, load: Callable[[], Tree], closed: Closed, round: int, like: Tree) -> Tree:
    """Apply a round that is over to the state that ``load`` brings: the next state. ``closed.acc`` is used up.

    Raises:
        ConfigError: code ``quorum``, naming each site that is missing and why; code ``diverged``, if the next state is
            not finite.
    """
    fresh = sum(report.round == round for report in closed.reports.values())
    if closed.acc is None or fresh < plan.quorum:
        missing = ", ".join(f"{site}: {code}" for site, code in sorted(closed.dropped.items()))
        came = f"{fresh} of {len(plan.sites)} sites replied, the quorum is {plan.quorum}"
        raise ConfigError(f"round {round}: {came} ({missing})", code="quorum")
    total = strategy.reduce.done(closed.acc)
    if strategy.sensitivity is None:  # from float64 to the summand's own dtypes: half the memory while it is applied
        total = tree.lowered(total, like)  # else noise is added first: what is rounded before it has no such bound
    after = strategy.apply(load(), total, round)
    if not all(tree.finite(leaf) for leaf in tree.leaves(after)):
        raise ConfigError(
            f"round {round}: the model is no longer finite; lower local.lr, or look at the sites' updates for one that "
            "is out of proportion. The checkpoint of the round before is kept",
            code="diverged",
        )
    return after


def open_summand(answer: Answer, visit: Visit, leaves: Leaving) -> Mapping[str, Tensor]:
    """Check a received payload against what was agreed; tensors that are not packed stay on disk.

    Raises:
        WireError: naming what is wrong.
    """
    report, path = answer.report, answer.path
    assert report is not None and path is not None
    if (report.run, report.round) != (visit.run, visit.round):
        raise WireError("a reply to another round", code="round")
    if answer.digest != report.summand_sha256:
        raise WireError("a payload that is not the one its report names", code="digest")
    try:
        summand = _unpacked(path, leaves.spec() if visit.train else {}) if leaves.packed else Payload(path)
    except (SafetensorError, OSError) as error:
        raise WireError("a payload that is not safetensors", code="format") from error
    leaves.check(summand, train=visit.train)
    return summand


def _unpacked(path: Path, spec: Spec) -> Mapping[str, Tensor]:
    with path.open("rb") as file:
        return packing.unpack(file, spec)
