"""Convolutions with weights of their own for every client, ``[K * B, C, ...]`` to ``[K * B, P, ...]``.

On a CPU a loop over clients is at least as fast as one grouped convolution; elsewhere one grouped call saves launches.
Images lie there with their channels innermost, where the model bears it: convolutions and poolings then read whole vectors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtailor.simulations.layers import Kind
from fedtailor.simulations.products import multiply, shiftable, shifted
from fedtailor.tree import Params

CACHED = 1 << 19  # numbers of images' patches that are made at once: what a processor's cache holds


def _forward(layer: nn.Conv2d, weights: Params, x: Tensor, clients: int) -> tuple[Tensor, Tensor]:
    weight, bias = weights["weight"], weights.get("bias")
    if len(weight) == 1:  # all clients', or frozen, and then the bias may still be each one's own
        if bias is None or len(bias) == 1:
            return _convolve(layer, x, weight[0], None if bias is None else bias[0], 1), x.detach()
        z = _convolve(layer, x, weight[0], None, 1)
        return z + _of_images(bias, z), x.detach()
    batch, bias = len(x) // clients, None if bias is None else bias.expand(clients, -1)
    if looped(x):
        biases = [None] * clients if bias is None else bias.unbind()
        each = zip(torch.split(x, batch), weight.unbind(), biases, strict=True)
        return torch.cat([_convolve(layer, part, w, b, 1) for part, w, b in each]), x.detach()
    z = _convolve(layer, _beside(x, clients), weight.flatten(0, 1), None if bias is None else bias.flatten(), clients)
    return z.view(batch, clients, -1, *z.shape[2:]).transpose(0, 1).flatten(0, 1), x.detach()


def _of_images(bias: Tensor, like: Tensor) -> Tensor:
    """Each client's bias ``[K, P]`` for its images' channels, ``[K * B, P, 1, ...]``."""
    return bias.repeat_interleave(len(like) // len(bias), 0).view(*like.shape[:2], *[1] * (like.dim() - 2))


def arranged(x: Tensor) -> Tensor:
    """Images with their channels innermost on a CPU; whatever else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and looped(x) else x


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
    if batch == 1 and one_by_one and innermost(x) and layer.groups == 1:
        weight = _of_each_image(layer, x, delta)
    elif one_by_one:
        each = zip(torch.split(x, batch), torch.split(delta, batch), strict=True)
        weight = torch.stack([backward(below, part, *how)[1] for part, below in each])
    else:
        weight = backward(_beside(delta, clients), _beside(x, clients), *how)[1].view(clients, *layer.weight.shape)
    found = {"weight": weight}
    if layer.bias is not None:
        found["bias"] = delta.view(clients, batch, *delta.shape[1:]).sum((1, *range(3, delta.dim() + 1)))
    return found


def innermost(x: Tensor) -> bool:
    """Whether images' channels are innermost, and images are larger than a point."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _of_each_image(layer: nn.Conv2d, x: Tensor, delta: Tensor) -> Tensor:
    """Every image's gradient of the weight: products of what its pixels were and of what they made, or of patches."""
    if tuple(layer.stride) == (1, 1) and shiftable(x):
        return _by_shifts(layer, x, delta)
    (up, left), (down, right) = _padding(layer), layer.dilation
    images = F.pad(x.contiguous(), (left, left, up, up))
    of_image, of_channel, of_row, of_column = images.stride()
    count, outputs, rows, columns = delta.shape
    across = of_row * layer.stride[0], of_column * layer.stride[1]
    patches = images.as_strided(
        (count, *layer.weight.shape[1:], rows, columns),
        (of_image, of_channel, of_row * down, of_column * right, *across),
    )
    deltas = delta.permute(0, 2, 3, 1).reshape(count, -1, outputs)
    at_once = min(max(1, CACHED // patches[0].numel()), count)
    found, some = x.new_empty(count, layer.weight[0].numel(), outputs), x.new_empty(at_once, *patches.shape[1:])
    for first in range(0, count, at_once):
        part = slice(first, first + at_once)
        here = some[: len(deltas[part])].copy_(patches[part])
        multiply(here.view(len(here), found.shape[1], -1), deltas[part], found[part])
    return found.mT.view(count, *layer.weight.shape)


def _by_shifts(layer: nn.Conv2d, x: Tensor, delta: Tensor) -> Tensor:
    (up, left), (down, right), (tall, wide) = _padding(layer), layer.dilation, layer.kernel_size
    images = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, up, up))
    width, short = images.shape[2], images.shape[2] - delta.shape[3]
    deltas = F.pad(delta.permute(0, 2, 3, 1), (0, 0, 0, short)).flatten(1, 2)
    deltas = deltas[:, : deltas.shape[1] - short]
    offsets = [row * down * width + column * right for row in range(tall) for column in range(wide)]
    made = shifted(images.flatten(1, 2), deltas, offsets)
    return made.view(len(x), tall, wide, *made.shape[2:]).permute(0, 4, 3, 1, 2)


def unfit(layer: Any) -> str | None:
    """Why a convolution's settings are beyond this file; None where they are not."""
    if layer.padding_mode != "zeros":
        return f" with padding_mode={layer.padding_mode!r}"
    uneven = any(d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return " with padding='same' and an even kernel" if layer.padding == "same" and uneven else None


CONVOLUTION = Kind(_forward, _gradient)
