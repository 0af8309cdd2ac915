"""A federated algorithm is a value: six pure functions.

The server *inits* a state and *broadcasts* part of it; each client *corrects* its gradients and *reports* one
summand; the wire *reduces* the summands; the server *applies* the total. A variation is ``strategy._replace(...)``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedtailor import adapters, tree
from fedtailor.tree import Tree


class Local(NamedTuple):
    """What a client knows when its local training ends."""

    cast: Tree  # what the server broadcast; cast["params"] is the starting point
    memory: Tree  # what this client kept from its last round
    params: Tree  # where local training ended: a tree like ``start`` made
    num_examples: Tensor  # scalar: the rows of the client's training part, a public number
    num_steps: Tensor  # scalar
    lr: float
    seed: Tensor | None = None  # scalar int64: a public number of this client and round, for random choices
    loss: Tensor | None = None  # scalar: where the strategy needs it, the mean loss of the cast parameters


class Reduce(NamedTuple):
    """A fold over blocks of clients. A block's leaves are ``[K, ...]``; one reply is a block with ``K = 1``.

    ``add`` owns its accumulator and may change it in place, so that folding a reply needs no second copy of it.
    """

    add: Callable[[Tree | None, Tree], Tree]
    done: Callable[[Tree], Tree] = lambda acc: acc
    is_sum: bool = False  # a sum needs O(1) memory, can be secretly aggregated and has a sensitivity


PIECE = 1 << 20  # elements: adding a float32 tensor to a float64 one makes a float64 copy of what is added at once


def _sum(acc: Tree | None, block: Tree) -> Tree:
    if acc is None:  # float64: the order in which replies arrive then does not show in float32 parameters
        return tree.map(lambda x: x[0].double() if len(x) == 1 else x.sum(0, dtype=torch.double), block)
    return tree.map(_add, acc, block)


def _add(acc: Tensor, block: Tensor) -> Tensor:
    if len(block) > 1:
        return acc.add_(block.sum(0, dtype=torch.double))
    if not (acc.is_contiguous() and block.is_contiguous()):
        return acc.add_(block[0])
    for total, piece in zip(torch.split(acc.view(-1), PIECE), torch.split(block.view(-1), PIECE), strict=True):
        total.add_(piece)
    return acc


def _cat(acc: Tree | None, block: Tree) -> Tree:
    return block if acc is None else tree.map(lambda a, b: torch.cat([a, b]), acc, block)


SUM = Reduce(_sum, is_sum=True)
STACK = Reduce(_cat)  # for what must see all replies at once: the total is their stack, leaves [K, ...]


def trained(name: str) -> bool:
    """Whether local training moves a parameter: all but the shift of an adapter, which is the server's to move."""
    return not adapters.is_part(name, adapters.SHIFT)


class Strategy(NamedTuple):
    """One federated algorithm. Every function is pure; the client's two also run under ``torch.func.vmap``.

    ``state["params"]`` is the model. ``cast["params"]`` is where local training starts; a strategy that trains from
    another point than its model (an average of iterates, say) casts the model too, as ``cast["model"]``.

    A strategy that gives each client a model of its own says so by ``personal``, keeps what is the client's in its
    memory, and may start elsewhere: ``start`` makes one set of parameters, or several by name, which are then trained at
    once, each on the same examples. The gradients that ``correct`` is given, and ``local.params``, are trees like it.

    Parameters that ``trains`` refuses by name have no gradient, no share of a clipped norm and no noise at a site;
    ``correct`` gets the gradients of the others only, and the names in them are those to go by.
    """

    init: Callable[[Tree], Tree]  # params -> state
    apply: Callable[[Tree, Tree, int], Tree]  # state, total, round -> state
    report: Callable[[Local], tuple[Tree, Tree]]  # -> summand, memory
    broadcast: Callable[[Tree], Tree] = lambda state: {"params": state["params"]}
    correct: Callable[[Tree, Tree, Tree, Tree], Tree] = lambda grads, params, cast, memory: grads
    remember: Callable[[Tree], Tree] = lambda params: {}  # a new client's memory
    start: Callable[[Tree, Tree], Tree] = lambda cast, memory: cast["params"]  # where local training starts
    personal: Callable[[Tree, Tree], Tree] | None = None  # cast, memory -> the client's own model
    reduce: Reduce = SUM
    needs_loss: bool = False  # whether ``report`` reads ``local.loss``, which DP-SGD's epsilon does not cover
    trains: Callable[[str], bool] = trained  # a parameter's name -> whether local training moves it
    sensitivity: float | None = None  # where one client's summand is bounded for privacy: the bound, in L2 norm
    plain_sgd: bool = False  # whether ``report`` takes a change for ``lr`` times the sum of gradients: plain SGD's only
    packed: bool = False  # whether its summands are sparse or of few values, so that packing them is worth the work


@dataclass(frozen=True)
class WeightedChange:
    """A report of a client's change times a number: ``{"delta": number * (params - cast["params"]), **beside}``.

    The sum of many such summands needs no client's own parameters, which a simulator makes use of.
    """

    weigh: Callable[[Local], tuple[Tensor, Tree]]  # -> the number, what is beside it; does not look at ``params``
    many: bool = (
        False  # whether ``weigh`` works on each number by itself: given those of K clients, [K], it gives theirs
    )

    def __call__(self, local: Local) -> tuple[Tree, Tree]:
        """Report; the memory stays as it is."""
        number, beside = self.weigh(local)
        delta = tree.map(lambda end, start: (end - start) * number, local.params, local.cast["params"])
        return {"delta": delta} | beside, local.memory


@dataclass(frozen=True)
class Elementwise:
    """An ``apply`` that treats every number of the parameters by itself, and a state that goes with it.

    Given slices of the same numbers of every tensor that is named and shaped like a parameter (in the state, in the
    total), flat, and all else whole, it gives those slices of the next state. The strategy's ``broadcast`` picks tensors
    of the state and changes none. A server then never holds the model in memory.
    """

    fn: Callable[[Tree, Tree, int], Tree]

    def __call__(self, state: Tree, total: Tree, round: int) -> Tree:
        """Apply."""
        return self.fn(state, total, round)


def standing(strategy: Strategy, params: Tree, lr: float = 1.0) -> Tree:
    """The summand of a client that did nothing: what every summand of ``strategy`` looks like."""
    one = torch.ones(())
    cast = strategy.broadcast(strategy.init(params))
    memory = strategy.remember(params)
    start, seed = strategy.start(cast, memory), torch.zeros((), dtype=torch.long)
    return strategy.report(Local(cast, memory, start, one, one, lr, seed, loss=one))[0]


def model_in(cast: Tree) -> Tree:
    """The parameters to evaluate in what a server broadcast."""
    found: Tree = cast["model"] if "model" in cast else cast["params"]
    return found
