"""What stands in a model for its parts gives what they give, bit for bit."""

import pytest
import torch
from torch import nn

from fedtailor.recipe import Recipe
from fedtailor.simulations.folded import folded
from fedtailor.simulations.stands import Pool, Sequence


def made(*parts):
    """The module as the block engine runs it."""
    return folded(Recipe("r", None, lambda: nn.Sequential(*parts), None, None)).module


def images(*shape):
    """With ties, zeros of both signs, and windows in which nothing is positive."""
    x = torch.randint(-3, 3, shape).float()
    x[0, 0, :2, :2], x[0, 0, 2:4, 2:4], x[1, :, :4] = -1.0, -0.0, 0.0
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, ceil_mode=True)])
@pytest.mark.parametrize("odd", [None, float("nan"), float("inf"), -float("inf")])
def test_pooling_comes_first_and_changes_nothing(pool, odd):
    x = images(3, 4, 8, 8)
    if odd is not None:
        x[2, 1, 4, 4] = odd
    plain, ours = nn.Sequential(nn.ReLU(), pool, nn.ReLU(), pool, nn.Flatten()), made(nn.ReLU(), pool, nn.ReLU(), pool, nn.Flatten())  # fmt: skip
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = plain(one), ours(two)
    assert torch.equal(expected.isnan(), found.isnan())
    assert torch.equal(expected.nan_to_num(7), found.nan_to_num(7))
    delta = torch.randn(expected.shape)
    for a, b in zip(torch.autograd.grad(expected, one, delta), torch.autograd.grad(found, two, delta), strict=True):
        assert torch.equal(a, b)


def test_the_rectifier_sees_the_smaller_image():
    seen = []
    ours = made(nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(2))
    assert isinstance(ours, Sequence) and type(ours[0]) is nn.ReLU and isinstance(ours[1], Pool)
    ours[0].register_forward_hook(lambda module, given, found: seen.append(tuple(found.shape)))
    ours(images(2, 4, 8, 8))
    assert seen == [(2, 4, 2, 2)]


def test_a_part_of_a_sequence_is_what_it_was():
    x = images(2, 4, 8, 8)
    assert torch.equal(made(nn.ReLU(), nn.MaxPool2d(2))[:1](x), x.relu())


def test_other_activations_and_poolings_keep_their_order():
    x = torch.randn(2, 4, 8, 8)
    for parts in ([nn.GELU(), nn.MaxPool2d(2)], [nn.ReLU(), nn.AvgPool2d(2)], [nn.MaxPool2d(2), nn.ReLU()]):
        assert torch.equal(made(*parts)(x), nn.Sequential(*parts)(x))
    values, indices = made(nn.MaxPool2d(2, return_indices=True))(x)
    assert torch.equal(values, nn.MaxPool2d(2)(x)) and indices.shape == values.shape


def test_a_pooling_gets_its_gradient_as_its_images_lie():
    seen = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone(memory_format=torch.preserve_format)

        @staticmethod
        def backward(ctx, delta):
            seen.append(delta.is_contiguous(memory_format=torch.channels_last))
            return delta

    class Look(nn.Module):
        def forward(self, x):
            return Looks.apply(x)

    x = images(2, 4, 8, 8).requires_grad_()
    for pooling in (Look(), Pool(Look())):
        nn.Flatten()(pooling(x)).square().sum().backward()
    assert seen == [False, True]
