"""The mean of products of adapters, without sending a product: what the exact strategies share.

With the clients' changes ``dA, dB`` of an adapter, ``mean(B A) = mean(B) mean(A) + mean(dB dA) - mean(dB) mean(dA)``. The
products ``dB dA`` are made where replies are folded, one reply at a time: a client sends ``rank * (in + out)`` numbers, and
the coordinator keeps one matrix ``[out, in]`` a layer, however many clients there are. It is not a sum of what they
send, so it has no sensitivity and cannot be summed in secret.
"""

from torch import Tensor

from fedtailor import SUM, Reduce
from fedtailor.adapters import LORA_A, LORA_B, layers
from fedtailor.tree import Tree


def _add(acc: Tree | None, block: Tree) -> Tree:
    sums = SUM.add(None if acc is None else {k: v for k, v in acc.items() if k != "products"}, block)
    known: Tree = {} if acc is None else acc["products"]
    delta, weight = (
        block["delta"],
        block["weight"].double().clamp(min=1),
    )  # a small weight must not make a large product
    for layer in layers(delta):
        a, b = (
            delta[layer + LORA_A].double(),
            delta[layer + LORA_B].double(),
        )  # weight * change: [K, r, in], [K, out, r]
        tall = (b / weight[:, None, None]).transpose(0, 1).flatten(1)
        wide = a.flatten(0, 1)  # side by side and on top of each other, their product is the sum of the products
        known[layer] = known[layer].addmm_(tall, wide) if layer in known else tall @ wide
    return sums | {"products": known}


PRODUCTS = Reduce(_add)  # of summands {delta: weight * change, weight}; the total has their sums, and products by layer


def residual(total: Tree, layer: str) -> Tensor:
    """What the mean of the products has beyond the product of the means: ``[out, in]``, float64."""
    weight, delta = total["weight"].double(), total["delta"]
    a, b = delta[layer + LORA_A].double() / weight, delta[layer + LORA_B].double() / weight
    exact: Tensor = total["products"][layer] / weight - b @ a
    return exact
