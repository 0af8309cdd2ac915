"""FLoRA: stacked adapters that start anew. Wang et al. 2024, https://arxiv.org/abs/2409.05976."""

from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, NonNegativeInt, PositiveInt, validate_call
from torch import Tensor

from fedtailor import Local, Strategy, seeds
from fedtailor.adapters import LORA_A, LORA_B, SHIFT, is_part, layers
from fedtailor.strategies.fedex_lora import fedex_lora
from fedtailor.tree import Tree


def _from_zero(ranks: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    rows = [row for row, _ in ranks]
    if rows != sorted(set(rows)) or rows[:1] != [0]:
        raise ValueError("it must begin with 0 rows and go up, as in [[0, 2], [500, 4]]")
    return ranks


Ranks = Annotated[tuple[tuple[NonNegativeInt, PositiveInt], ...], AfterValidator(_from_zero)]


@validate_call
def flora(
    weighting: Literal["examples", "equal"] = "examples", ranks: Ranks | None = None, seed: NonNegativeInt = 0
) -> Strategy:
    """Add the mean product of the clients' adapters to the frozen weight, and start new adapters: ranks may differ.

    Each round's adapters begin as a fresh draw and zero, so a rank that a client does not train adds nothing there.
    Without adapters it is FedAvg.

    Args:
        weighting: ``examples`` weights a client by its rows; ``equal`` counts every client once.
        ranks: ``[[0, 2], [500, 4]]``: a client of at least 500 training rows trains rank 4, others rank 2. A client keeps
            its rank in its memory, so that the first round goes at the first one. Null: all train the recipe's rank.
        seed: of the fresh draws, which are public.
    """
    exact = fedex_lora(weighting=weighting)

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        params: Tree = exact.apply(state, total, round)["params"]
        for layer in layers(params):
            a, b, shift = (params[layer + part] for part in (LORA_A, LORA_B, SHIFT))
            rng = seeds.generator(seed, "flora", round, layer)
            fresh = (2 * torch.rand(a.shape, generator=rng) - 1) * a.shape[1] ** -0.5  # as a linear layer is drawn
            restarted = {LORA_A: fresh.to(a), LORA_B: torch.zeros_like(b), SHIFT: shift + b @ a}
            params |= {layer + part: x for part, x in restarted.items()}
        return {"params": params}

    if ranks is None:
        return exact._replace(apply=apply)

    def own(rows: Tensor) -> Tensor:
        rank = torch.full_like(rows, ranks[0][1])
        for least, more in ranks[1:]:
            rank = torch.where(rows >= least, torch.full_like(rows, more), rank)
        return rank

    def correct(grads: Tree, params: Tree, cast: Tree, memory: Tree) -> Tree:
        return {name: _first(memory["rank"], name, g) for name, g in grads.items()}

    def report(local: Local) -> tuple[Tree, Tree]:
        return exact.report(local)[0], {"rank": own(local.num_examples)}

    return exact._replace(
        apply=apply, correct=correct, report=report, remember=lambda params: {"rank": own(torch.zeros(()))}
    )


def _first(rank: Tensor, name: str, grad: Tensor) -> Tensor:
    """A gradient, without the ranks of an adapter that are beyond ``rank``."""
    if is_part(name, LORA_A):
        return grad * (torch.arange(len(grad), device=grad.device) < rank)[:, None]
    if is_part(name, LORA_B):
        return grad * (torch.arange(grad.shape[1], device=grad.device) < rank)
    return grad
