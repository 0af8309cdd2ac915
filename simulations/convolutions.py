"""Convolutions with weights of their own for every client, ``[K * B, C, ...]`` to ``[K * B, P, ...]``.

On a CPU a loop over clients is at least as fast as one grouped convolution; elsewhere one grouped call saves launches.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fedtailor.simulations.layers import Kind
from fedtailor.tree import Params


def _forward(layer: nn.Conv2d, weights: Params, x: Tensor, clients: int) -> tuple[Tensor, Tensor]:
    weight, bias = weights["weight"], weights.get("bias")
    if len(weight) == 1:
        return _convolve(layer, x, weight[0], None if bias is None else bias[0], 1), x.detach()
    batch = len(x) // clients
    if looped(x):
        biases = [None] * clients if bias is None else bias.unbind()
        each = zip(torch.split(x, batch), weight.unbind(), biases, strict=True)
        return torch.cat([_convolve(layer, part, w, b, 1) for part, w, b in each]), x.detach()
    z = _convolve(layer, _beside(x, clients), weight.flatten(0, 1), None if bias is None else bias.flatten(), clients)
    return z.view(batch, clients, -1, *z.shape[2:]).transpose(0, 1).flatten(0, 1), x.detach()


def looped(x: Tensor) -> bool:
    """Whether clients are convolved one after another."""
    return x.device.type == "cpu"


def _convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, clients: int) -> Tensor:
    none = [0] * len(layer.kernel_size)
    return torch.convolution(
        x, weight, bias, layer.stride, _padding(layer), layer.dilation, False, none, clients * layer.groups
    )


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if not isinstance(layer.padding, str):
        return layer.padding
    return tuple(
        d * (k - 1) // 2 * (layer.padding == "same") for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
    )


def _beside(x: Tensor, clients: int) -> Tensor:
    """``[K * B, C, ...]`` to ``[B, K * C, ...]``: a grouped convolution tells the clients apart by channel."""
    return x.reshape(clients, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)


def _gradient(layer: nn.Conv2d, x: Tensor, delta: Tensor, clients: int) -> Params:
    batch, one_by_one = len(x) // clients, looped(x)
    times = 1 if one_by_one else clients
    groups, shape = times * layer.groups, (times * layer.out_channels, *layer.weight.shape[1:])
    like, none = (
        x.new_empty(1).expand(shape),
        [0] * len(layer.kernel_size),
    )  # of the weight, only its shape is asked for
    how = like, None, layer.stride, _padding(layer), layer.dilation, False, none, groups, [False, True, False]
    backward = torch.ops.aten.convolution_backward
    if one_by_one:
        each = zip(torch.split(x, batch), torch.split(delta, batch), strict=True)
        weight = torch.stack([backward(below, part, *how)[1] for part, below in each])
    else:
        weight = backward(_beside(delta, clients), _beside(x, clients), *how)[1]
    found = {"weight": weight.view(clients, *layer.weight.shape)}
    if layer.bias is not None:
        found["bias"] = delta.reshape(clients, batch, layer.out_channels, -1).sum((1, 3))
    return found


def unfit(layer: Any) -> str | None:
    """Why a convolution's settings are beyond this file; None where they are not."""
    if layer.padding_mode != "zeros":
        return f" with padding_mode={layer.padding_mode!r}"
    uneven = any(d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return " with padding='same' and an even kernel" if layer.padding == "same" and uneven else None


CONVOLUTION = Kind(_forward, _gradient)
