"""Products that are made aside: the same numbers, for few long rows only, and never behind the back of who writes down."""

import pytest
import torch
from threadpoolctl import ThreadpoolController
from torch import nn

from fedtailor import strategies, tree
from fedtailor.recipe import Recipe
from fedtailor.simulations import convolutions, products
from fedtailor.simulations.blocks import block_train
from fedtailor.simulations.convolutions import CONVOLUTION
from fedtailor.simulations.engine import vmapped
from fedtailor.training import local_train, plain


@pytest.fixture(autouse=True)
def made_aside(monkeypatch):
    """As on a processor where that is quicker; tells how often."""
    library = ThreadpoolController().select(internal_api="openblas")
    if not library.info():
        pytest.skip("numpy's library is not OpenBLAS")
    monkeypatch.setattr(products, "_openblas", lambda: library)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    seen, aside = [], products._aside
    monkeypatch.setattr(products, "_aside", lambda a, *rest: seen.append(tuple(a.shape)) or aside(a, *rest))
    return seen


@pytest.mark.parametrize("dtype,rtol", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rows,others,length", [(10, 10, 3072), (2, 3, 1024), (10, 128, 2000), (100, 7, 1025)])
def test_inner_products_are_those_of_torch(made_aside, rows, others, length, dtype, rtol):
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, n, length, generator=rng, dtype=dtype) for n in (rows, others))
    wide = torch.randn(5, others + 3, length, generator=rng, dtype=dtype)
    for given in (b, b[:1].expand(5, -1, -1), wide[:, 2 : others + 2]):  # shared by all, and a part of what lies wider
        torch.testing.assert_close(products.inner(a, given), torch.bmm(a, given.mT), rtol=rtol, atol=1e3 * rtol)
    assert len(made_aside) == 3


def test_what_is_not_quicker_so_is_left_to_torch(made_aside, monkeypatch):
    long, short, one = torch.zeros(2, 4, 1024), torch.zeros(2, 4, 1023), torch.zeros(2, 1, 1024)
    many = torch.zeros(1, 1000, 1024)
    for a, b in ((short, short), (one, long), (long, one), (many, many), (long.half(), long.half())):
        assert not products.few_and_long(a, b)
    assert not products.few_and_long(long.clone().requires_grad_(), long) and products.few_and_long(long, long)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # two share these out
    assert not products.few_and_long(long, long)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(products, "_openblas", lambda: None)
    assert not products.few_and_long(long, long) and not made_aside


def test_a_large_product_is_that_of_torch(made_aside, monkeypatch):
    a, b = torch.randn(7, 30).mT, torch.randn(7, 20)[:, 3:]
    for threads, aside in ((1, 1), (2, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        torch.testing.assert_close(products.product(a, b), a @ b, rtol=1e-5, atol=1e-5)
        assert len(made_aside) == aside
        made_aside.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    learnt = b.clone().requires_grad_()
    found = torch.autograd.grad(products.product(a, learnt).sum(), learnt)[0]
    torch.testing.assert_close(found, a.sum(0)[:, None].expand_as(b))
    assert not made_aside


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(7, 30, 20), (20, 30, 7), (7, 30, 21)])
def test_a_wide_product_is_made_in_halves_by_two_threads(monkeypatch, threads, shape):
    rows, length, columns = shape
    a, b = torch.randn(length, rows, dtype=torch.double).mT, torch.randn(length, columns + 3, dtype=torch.double)[:, 3:]
    expected, halves, bmm = a @ b, [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *given: halves.append(1) or bmm(*given))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.testing.assert_close(products.product(a, b), expected, rtol=1e-12, atol=1e-12)
    assert len(halves) == (threads == 2 and shape == (7, 30, 20))


def test_who_writes_operations_down_sees_them():
    from torch.fx.experimental.proxy_tensor import make_fx

    a, b, other = torch.randn(2, 3, 1024), torch.randn(2, 4, 1024), torch.randn(2, 3, 1024)
    written = make_fx(products.inner)(a, b)
    torch.testing.assert_close(written(other, b), torch.bmm(other, b.mT), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "channels,size,kernel,padding,dilation",
    [(4, (6, 5), 3, 1, 1), (5, (7, 9), (3, 2), (1, 0), (1, 2)), (4, (8, 8), 5, 0, 1), (8, (4, 4), 3, 2, 2), (4, (3, 6), 1, 0, 1)],
)  # fmt: skip
def test_a_convolutions_gradients_by_shifts_are_autograds(monkeypatch, channels, size, kernel, padding, dilation):
    layer = nn.Conv2d(channels, 6, kernel, padding=padding, dilation=dilation).double()
    x = torch.randn(7, channels, *size, dtype=torch.double).contiguous(memory_format=torch.channels_last)
    delta = torch.randn_like(layer(x)).contiguous(memory_format=torch.channels_last)
    apart = [torch.autograd.grad(layer(x[i : i + 1]), layer.weight, delta[i : i + 1])[0] for i in range(7)]
    seen, by_shifts = [], convolutions.shifted
    monkeypatch.setattr(convolutions, "shifted", lambda *given: seen.append(1) or by_shifts(*given))
    monkeypatch.setattr(products, "NEAR", 500)  # so that images come in several parts
    found = CONVOLUTION.gradient(layer, x, delta, 7)["weight"]
    torch.testing.assert_close(found, torch.stack(apart), rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(products, "CHANNELS", channels + 1)
    torch.testing.assert_close(CONVOLUTION.gradient(layer, x, delta, 7)["weight"], found, rtol=1e-12, atol=1e-12)
    assert seen == [1]


def test_a_convolution_with_strides_is_left_to_patches(made_aside, monkeypatch):
    monkeypatch.setattr(convolutions, "shifted", None)
    layer = nn.Conv2d(4, 3, 3, stride=2)
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    CONVOLUTION.gradient(layer, x, torch.randn_like(layer(x)), 2)
    assert made_aside


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("hidden,threads,steps", [(2, 1, 3), (2, 2, 3), (40, 1, 3), (40, 2, 3), (40, 1, 1)])
def test_a_block_with_long_rows_learns_what_one_client_after_another_does(
    made_aside, monkeypatch, hidden, threads, steps, bias, together
):
    """With 40 hidden units and a sum in one go, the clients' own weights are never made; nor is any product twice."""
    clients, batch, length = 7, 4, 1100
    rng = torch.Generator().manual_seed(1)
    model = lambda: nn.Sequential(nn.Linear(length, hidden, bias=bias), nn.Tanh(), nn.Linear(hidden, 3)).double()  # noqa: E731
    losses = lambda out, y: nn.functional.cross_entropy(out, y, reduction="none")  # noqa: E731
    recipe = Recipe("long", None, model, losses, None)
    params = {name: torch.randn(p.shape, generator=rng, dtype=p.dtype) / 30 for name, p in model().named_parameters()}
    batches = {
        "x": torch.randn(clients, steps, batch, length, generator=rng, dtype=torch.double),
        "y": torch.randint(3, (clients, steps, batch), generator=rng),
        "live": torch.ones(clients, steps, batch),
        "scale": torch.full((clients, steps), 1 / batch),
    }
    module, fed = model(), strategies.fedavg()
    each = lambda p, x, y: losses(torch.func.functional_call(module, p, (x,)), y)  # noqa: E731
    given = {"params": params}, {}, batches, torch.ones(clients, steps), torch.full((clients,), 12.0)
    alone = vmapped(local_train(plain(each), fed, 0.3))(*given)[0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = block_train(recipe, fed, 0.3, together=together)(*given)[0]
    for name, expected in tree.flatten(alone).items():
        total, mine = expected.sum(0), tree.flatten(found)[name].sum(0)
        torch.testing.assert_close(mine, total, rtol=1e-10, atol=1e-12)
    thin = hidden == 40 and together
    rows, each_other = clients * steps * batch, [(clients, steps * batch, length)] * (steps > 1)
    large = [*each_other, (1, rows, length), (1, hidden, rows)]  # by what all began with; added up
    small = [(clients, batch, length)] * (steps - 1)  # at first all share weights
    assert made_aside == ([] if threads > 1 else large if thin else small)
