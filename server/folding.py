"""What a round comes to: each answer checked whole and folded as it arrives, then the next state."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from fedtailor import packing, tree
from fedtailor.errors import ConfigError, WireError
from fedtailor.leaving import Leaving, header_limit
from fedtailor.privacy.site_level import within_bound
from fedtailor.server import slicewise
from fedtailor.server.rounds import Answer
from fedtailor.store import Spec
from fedtailor.strategy import Reduce, Strategy
from fedtailor.study import Buffer, Plan
from fedtailor.tree import Tree
from fedtailor.treefile import Flat, TreeFile, received
from fedtailor.wire import Report, Visit


class Closed(NamedTuple):
    """A round that is over."""

    acc: Tree | TreeFile | None  # folded summands, in a file where they are a sum; None when nobody replied
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
    """Fold ``stream`` one reply at a time, in a file beside the replies where the reduction is a sum.

    A reply is checked whole before any of it is folded; a bad one is dropped by name and changes nothing.

    Args:
        vouched: raises WireError where a report lacks what its site must sign.
        buffer: how much an answer to an earlier round counts.
        clip: of this round, where privacy is of a whole site: an answer beyond it does not count.
    """
    closed = Closed(None, {}, {}, {}, {})
    acc: Tree | TreeFile | None = None
    for answer in stream:
        code = answer.code
        if answer.report is not None and answer.path is not None:
            try:
                asked = answer.visit or visit
                vouched(answer.site, answer.report, asked)
                summand = open_summand(answer, asked, leaves)
                if visit.train and clip is not None and not within_bound(summand, clip):
                    raise WireError("a summand that is not clipped as this round asks", code="norm")
                weight = 1.0 if answer.visit is None else discount(buffer, visit.round - asked.round)
                if visit.train:
                    acc = fold(strategy.reduce, acc, summand, weight, answer.path.parent)
                del summand  # what was packed is whole in memory
                closed.reports[answer.site] = _listed(answer.report, leaves)
                closed.received[answer.site] = answer.size
            except WireError as error:
                code = error.code
            answer.path.unlink(missing_ok=True)
        if code is not None:
            closed.dropped[answer.site] = code
        on_answer(answer._replace(code=code))
    return closed._replace(acc=acc)


def _listed(report: Report, leaves: Leaving) -> Report:
    """A report without the metrics of a model of the site's own, where the strategy gives it none."""
    return report if leaves.models == 2 else report.model_copy(update={"personal": None})


def discount(buffer: Buffer | None, late: int) -> float:
    """How much a summand counts that comes ``late`` rounds after its own; its weight within it shrinks as much.

    Raises:
        WireError: code ``stale``, if it is too old to count.
    """
    if buffer is None or late > buffer.oldest:
        raise WireError(f"an answer that comes {late} rounds late", code="stale")
    return buffer.weight(late)


def fold(reduce: Reduce, acc: Tree | TreeFile | None, summand: Flat, weight: float, folder: Path) -> Tree | TreeFile:
    """``acc`` and ``weight`` times one more reply: a sum is in a file of ``folder``, anything else in memory."""
    if reduce.is_sum:
        assert not isinstance(acc, dict)
        return slicewise.add(reduce, acc, summand, weight, folder)
    assert not isinstance(acc, TreeFile) and weight == 1
    whole = summand.tree() if isinstance(summand, TreeFile) else tree.unflatten(dict(summand))
    return reduce.add(acc, tree.at(whole, None))


def counted(plan: Plan, closed: Closed, round: int) -> Tree | TreeFile:
    """What a round that is over adds up to.

    Raises:
        ConfigError: code ``quorum``, naming each site that is missing and why.
    """
    fresh = sum(report.round == round for report in closed.reports.values())
    if closed.acc is None or fresh < plan.quorum:
        missing = ", ".join(f"{site}: {code}" for site, code in sorted(closed.dropped.items()))
        came = f"{fresh} of {len(plan.sites)} sites replied, the quorum is {plan.quorum}"
        raise ConfigError(f"round {round}: {came} ({missing})", code="quorum")
    return closed.acc


def advance(strategy: Strategy, load: Callable[[], Tree], acc: Tree | TreeFile, round: int, like: Tree) -> Tree:
    """Apply what a round adds up to to the state that ``load`` brings: the next state, in memory. ``acc`` is used up.

    :func:`fedtailor.server.slicewise.advance` does the same in files, for a strategy that allows it.

    Raises:
        ConfigError: code ``diverged``, if the next state is not finite.
    """
    # From float64 to the summand's own dtypes: half the memory while it is applied. Where it is private, noise is added
    # first: what is rounded before it has no such bound.
    rounded = strategy.sensitivity is None
    if isinstance(acc, TreeFile):
        acc = slicewise.read(acc, like if rounded else None)
    total = strategy.reduce.done(acc)
    after = strategy.apply(load(), tree.lowered(total, like) if rounded else total, round)
    if not all(tree.finite(leaf) for leaf in tree.leaves(after)):
        raise ConfigError(slicewise.DIVERGED.format(round=round), code="diverged")
    return after


def open_summand(answer: Answer, visit: Visit, leaves: Leaving) -> Flat:
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
        spec = leaves.spec() if visit.train else {}
        summand: Flat = _unpacked(path, spec) if leaves.packed else received(path, header_limit(spec))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WireError("a payload that is not safetensors", code="format") from error
    leaves.check(summand, train=visit.train)
    return summand


def _unpacked(path: Path, spec: Spec) -> dict[str, Tensor]:
    with path.open("rb") as file:
        return packing.unpack(file, spec)
