"""Layers with weights of their own for every client: what each makes of a block's examples, and what it learns of each.

Activations keep their clients folded into the batch axis, ``[K * B, ...]``: only a layer with weights tells them apart.
Its gradients come from what it was given and from the gradient of what it made (book-keeping, Bu et al. 2023,
https://arxiv.org/abs/2210.00038), and the length of an example's gradient often costs no such gradient (ghost norm,
Goodfellow 2015, https://arxiv.org/abs/1510.01799; for sequences Li et al. 2022, https://arxiv.org/abs/2110.05679).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtailor.simulations.products import few_and_long, inner, product
from fedtailor.tree import Params


class Kind(NamedTuple):
    """What can be done with one kind of layer.

    ``layer`` is the module as its author made it, asked for its settings only. ``weights`` are its parameters by their
    own names, leaves ``[K, ...]``, or ``[1, ...]`` where all clients share them. ``delta`` is the gradient of its output.
    """

    forward: Callable[[Any, Params, Tensor, int], tuple[Tensor, Tensor]]
    # layer, weights, input [K * B, ...], K -> output [K * B, ...], what its gradients need of the input
    gradient: Callable[[Any, Tensor, Tensor, int], Params]
    # layer, given, delta, K -> leaves [K, ...]: the sum over each client's examples; with K = K * B, each example's
    squares: Callable[[Any, Tensor, Tensor], Tensor | None] = lambda layer, given, delta: None
    # layer, given, delta -> squared length of every example's gradient [K * B]; None where making them is cheaper


def beside(scale: Tensor, like: Tensor) -> Tensor:
    """``[K]`` as ``[K, 1, ...]``, to multiply ``like``."""
    return scale.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def squared(x: Tensor) -> Tensor:
    """The squared length of each row."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return length.square_()


class Thin(NamedTuple):
    """Weights ``[K, P, D]`` of clients that have taken few steps from one start: ``start - deltas.mT @ inputs``.

    Local SGD moves a linear layer by the product of what it was given and its output's gradient, already scaled by the
    learning rate: of a rank no more than the rows seen. The weights themselves are never made.
    """

    start: Tensor  # [P, D]
    inputs: Tensor  # [K, N, D]
    deltas: Tensor  # [K, N, P]


class Known(NamedTuple):
    """Such weights, by what they make of the next rows: ``made - products @ deltas``."""

    made: Tensor  # [K, B, P]: by what all clients began with
    products: Tensor | None = None  # [K, B, N]: of these rows with all that were seen; None before the first step
    deltas: Tensor | None = None  # [K, N, P]


def positions(x: Tensor, clients: int) -> Tensor:
    """``[K * B, ..., D]`` to ``[K, B * ..., D]``."""
    return x.reshape(clients, -1, x.shape[-1])


def _linear(layer: nn.Linear, weights: Params, x: Tensor, clients: int) -> tuple[Tensor, Tensor]:
    weight, bias = weights["weight"], weights.get("bias")
    if isinstance(weight, Thin | Known):
        z = (_by_rows(weight, x, clients) if isinstance(weight, Thin) else _by_products(weight)).view(*x.shape[:-1], -1)
        return z if bias is None else (z.view(len(bias), -1, z.shape[-1]) + bias[:, None]).view(z.shape), x.detach()
    if len(weight) == 1:
        if bias is None or len(bias) == 1:
            return F.linear(x, weight[0], None if bias is None else bias[0]), x.detach()
        z = F.linear(x, weight[0])
        return (positions(z, clients) + bias[:, None]).view(z.shape), x.detach()
    rows = positions(x, clients)
    if few_and_long(rows, weight):
        z = inner(rows, weight)
        return (z if bias is None else z.add_(bias[:, None])).view(*x.shape[:-1], -1), x.detach()
    z = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
    return z.view(*x.shape[:-1], -1), x.detach()


def _by_rows(weight: Thin, x: Tensor, clients: int) -> Tensor:
    moved = torch.bmm(inner(positions(x, clients), weight.inputs), weight.deltas)
    return product(x.flatten(0, -2), weight.start.mT).view(moved.shape) - moved


def _by_products(weight: Known) -> Tensor:
    if weight.products is None:
        return weight.made.clone()
    assert weight.deltas is not None
    return torch.baddbmm(weight.made, weight.products, weight.deltas, alpha=-1)


def _linear_gradient(layer: nn.Linear, x: Tensor, delta: Tensor, clients: int) -> Params:
    rows = positions(delta, clients)
    return {"weight": torch.bmm(rows.mT, positions(x, clients))} | linear_bias(layer, delta, clients)


def linear_bias(layer: nn.Linear, delta: Tensor, clients: int) -> Params:
    """The gradient of a linear layer's bias, if it has one."""
    return {} if layer.bias is None else {"bias": positions(delta, clients).sum(1)}


def _linear_squares(layer: nn.Linear, x: Tensor, delta: Tensor) -> Tensor | None:
    bias = 0.0 if layer.bias is None else 1.0
    if x.numel() == len(x) * x.shape[-1]:  # one position each
        return squared(x.flatten(0, -2)).add_(bias).mul_(squared(delta.flatten(0, -2)))
    rows, deltas = positions(x, len(x)), positions(delta, len(x))
    number = rows.shape[1]
    if 2 * number**2 >= layer.in_features * layer.out_features:
        return None
    return ((torch.bmm(rows, rows.mT) + bias) * torch.bmm(deltas, deltas.mT)).sum((1, 2)).clamp_(min=0)


def _embedding(layer: nn.Embedding, weights: Params, x: Tensor, clients: int) -> tuple[Tensor, Tensor]:
    table = weights["weight"]
    if len(table) == 1:
        return F.embedding(x, table[0]), x
    return F.embedding(_in_own_table(layer, x, clients), table.flatten(0, 1)), x


def _in_own_table(layer: nn.Embedding, x: Tensor, clients: int) -> Tensor:
    """Numbers in the clients' tables put one after another."""
    first = torch.arange(clients, device=x.device)[:, None] * layer.num_embeddings
    return (x.reshape(clients, -1) + first).view(x.shape)


def _embedding_gradient(layer: nn.Embedding, x: Tensor, delta: Tensor, clients: int) -> Params:
    total = delta.new_zeros(clients * layer.num_embeddings, layer.embedding_dim)
    rows = _learnt(layer, x, delta).reshape(-1, layer.embedding_dim)
    total.index_add_(0, _in_own_table(layer, x, clients).view(-1), rows)
    return {"weight": total.view(clients, layer.num_embeddings, layer.embedding_dim)}


def _embedding_squares(layer: nn.Embedding, x: Tensor, delta: Tensor) -> Tensor:
    words, rows = x.reshape(len(x), -1), positions(_learnt(layer, x, delta), len(x))
    return (torch.bmm(rows, rows.mT) * (words[:, :, None] == words[:, None])).sum((1, 2)).clamp_(min=0)


def _learnt(layer: nn.Embedding, x: Tensor, delta: Tensor) -> Tensor:
    """A padding word learns nothing."""
    return delta if layer.padding_idx is None else delta.masked_fill((x == layer.padding_idx)[..., None], 0.0)


def _normaliser(plain: Callable[[Any, Tensor], Tensor], own: Callable[[Any], tuple[int, ...]], last: bool) -> Kind:
    """A normalisation of each example by itself, whose scale and shift are learnt.

    Args:
        plain: the normalisation without them.
        own: their shape.
        last: whether they lie along an example's last axes, as LayerNorm's do, or along its first.
    """

    def arranged(layer: Any, x: Tensor, clients: int) -> Tensor:
        """``[K, N, *own, M]``: what shares a scale lies along the second axis and the last."""
        shape = own(layer)
        return x.reshape(clients, -1, *shape, 1) if last else x.reshape(clients, len(x) // clients, *shape, -1)

    def forward(layer: Any, weights: Params, x: Tensor, clients: int) -> tuple[Tensor, Tensor]:
        given = plain(layer, x)
        z = arranged(layer, given, clients) * weights["weight"][:, None, ..., None]
        z = z + weights["bias"][:, None, ..., None] if "bias" in weights else z
        return z.view(x.shape), given.detach()

    def gradient(layer: Any, given: Tensor, delta: Tensor, clients: int) -> Params:
        def total(x: Tensor) -> Tensor:
            return arranged(layer, x, clients).sum((1, -1))

        found = {"weight": total(delta * given)}
        return found if getattr(layer, "bias", None) is None else found | {"bias": total(delta)}

    return Kind(forward, gradient)


LINEAR = Kind(_linear, _linear_gradient, _linear_squares)
EMBEDDING = Kind(_embedding, _embedding_gradient, _embedding_squares)
LAYER_NORM = _normaliser(
    lambda layer, x: F.layer_norm(x, layer.normalized_shape, eps=layer.eps), lambda layer: layer.normalized_shape, True
)
RMS_NORM = _normaliser(
    lambda layer, x: F.rms_norm(x, layer.normalized_shape, eps=layer.eps), lambda layer: layer.normalized_shape, True
)
GROUP_NORM = _normaliser(
    lambda layer, x: F.group_norm(x, layer.num_groups, eps=layer.eps), lambda layer: (layer.num_channels,), False
)
