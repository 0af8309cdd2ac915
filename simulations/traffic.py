"""The bytes that a deployment's payloads would have: what each site would send and be sent, without messages' heads."""

from collections.abc import Callable, Iterable

from torch import Tensor

from fedtailor import leaving, packing, store, tree
from fedtailor.strategy import Strategy
from fedtailor.study import Plan
from fedtailor.tree import Params, Tree

Keep = Callable[[Tree, int, int], Tensor | None]  # as simulate_round takes it


def counting(
    plan: Plan,
    strategy: Strategy,
    start: Params,
    keep: Keep | None,
    asked: Callable[[int], tuple[str, ...]] | None = None,
) -> tuple[Keep, dict[str, int]]:
    """``keep`` (None: everything leaves), and the bytes that each site sends: they grow with every block it is shown.

    A packed answer's are counted by packing it; those of one that is not packed are the same in every round. In the end
    each site answers once more, without tensors.

    Args:
        asked: whose summands are in a round's blocks; None: every site's.
    """
    like = tree.flatten(leaving.summand(plan, strategy, start))
    dense = None if strategy.packed else _length(store.safetensors(like))
    last = len(packing.MAGIC) if strategy.packed else _length(store.safetensors({}))
    sent = dict.fromkeys(plan.sites, last)

    def kept(summands: Tree, first: int, round: int) -> Tensor | None:
        rows = None if keep is None else keep(summands, first, round)
        sites = asked(round) if asked else plan.sites
        for row in range(len(tree.leaves(summands)[0])) if rows is None else rows.tolist():
            size = _length(packing.pack(tree.flatten(tree.at(summands, row)))) if dense is None else dense
            sent[sites[first + row]] += size
        return rows

    return kept, sent


def lengths(plan: Plan, strategy: Strategy, start: Params) -> tuple[int, int]:
    """The bytes of one cast, and of one summand that is not packed."""
    cast = strategy.broadcast(strategy.init(start))
    down, up = (tree.flatten(each) for each in (cast, leaving.summand(plan, strategy, start)))
    return _length(store.safetensors(down)), _length(store.safetensors(up))


def received(plan: Plan, strategy: Strategy, state: Tree) -> int:
    """The bytes that a site is sent in all: the cast of the end, and of every round, as if it were asked in each."""
    return (plan.rounds + 1) * _length(store.safetensors(tree.flatten(strategy.broadcast(state))))


def _length(pieces: Iterable[bytes | memoryview]) -> int:
    return sum(len(piece) for piece in pieces)
