"""What a recipe freezes, wholly or in part, and what a strategy leaves alone: trained in blocks as one at a time."""

import pytest
import torch
from folk import CLIP, B, K, S, Sequences, assert_close, numbers, one_by_one, reference, started, world
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn.functional import cross_entropy

from fedtailor import strategies, tree
from fedtailor.adapters import SHIFT, adapted, is_part
from fedtailor.client.safe_optimizer import quiet_hooks
from fedtailor.recipe import Recipe, initial
from fedtailor.simulations.blocks import block_train
from fedtailor.simulations.feed import NOTHING
from fedtailor.simulations.folded import folded
from fedtailor.simulations.paths import Round, Task, choose


class Placed(nn.Module):
    """Frozen positions, and a frozen layer of a kind that has no batched form."""

    def __init__(self):
        super().__init__()
        self.places, self.odd = nn.Parameter(torch.randn(6), requires_grad=False), nn.PReLU(6).requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.odd(x + self.places))


def biases(model):
    """BitFit: nothing but biases is trained."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return model


def without(model, *frozen):
    """Freeze parameters by name."""
    found = [p.requires_grad_(False) for name, p in model.named_parameters() if name in frozen]
    assert len(found) == len(frozen)
    return model


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def images():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2),
                         nn.Flatten(), nn.Linear(5, 3))  # fmt: skip


def words():
    return nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(24, 3))


def tokens(rng, *leading):
    return torch.randint(7, (*leading, 6), generator=rng)


FROZEN = {
    "the first layer": (lambda: without(mlp(), "0.weight", "0.bias"), numbers(6)),
    "a layer between": (lambda: without(mlp(), "3.weight", "3.bias"), numbers(6)),
    "all weights": (lambda: biases(mlp()), numbers(6)),
    "a bias": (lambda: without(mlp(), "3.bias", "1.weight"), numbers(6)),
    "a bias of sequences": (
        lambda: nn.Sequential(without(mlp(), "3.bias"), nn.Flatten(), nn.Linear(6, 3)),
        numbers(2, 6),
    ),
    "what has no batched form": (Placed, numbers(6)),
    "a convolution": (lambda: without(images(), "0.weight", "0.bias"), numbers(2, 6, 6)),
    "weights of images": (lambda: biases(images()), numbers(2, 6, 6)),
    "an embedding": (lambda: without(words(), "0.weight"), tokens),
    "a recurrent layer": (
        lambda: without(Sequences(nn.GRU), *(f"layer.{name}" for name, _ in nn.GRU(3, 4).named_parameters())),
        numbers(3, 3),
    ),
    "half of a recurrent layer": (
        lambda: without(Sequences(nn.LSTM), "layer.weight_hh_l0", "layer.bias_ih_l0"),
        numbers(3, 3),
    ),
    "adapters": (lambda: adapted(mlp(), 2, where=("0", "3"), key="k"), numbers(6)),
    "adapters of sequences": (
        lambda: nn.Sequential(adapted(mlp(), 2, where=("0", "3"), key="k"), nn.Flatten(), nn.Linear(6, 3)),
        numbers(2, 6),
    ),
    "adapters with a shift": (lambda: adapted(mlp(), 2, where=("3",), exact=True, key="k"), numbers(6)),
}
STRATEGIES = {
    "fedavg": strategies.fedavg(),
    "scaffold": strategies.scaffold(population=K),
    "ffa_lora": strategies.ffa_lora(),
    "ffa_lora of fedprox": strategies.ffa_lora(of=strategies.fedprox(mu=0.5)),
}


def recipe_of(name):
    model, inputs = FROZEN[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state = model().double().state_dict()  # what is frozen is the same in every module of a recipe

    def again():
        module = model().double()
        module.load_state_dict(state)
        return module

    return Recipe(name, None, again, lambda outputs, y: cross_entropy(outputs, y, reduction="none"), None), inputs


def disturbed(cast):
    """Shifts and low ranks begin as zeros, which would hide what becomes of them."""
    rng = torch.Generator().manual_seed(9)
    return cast | {
        "params": tree.map(lambda p: p + 0.1 * torch.randn(p.shape, generator=rng, dtype=p.dtype), cast["params"])
    }


@pytest.mark.parametrize("clip", [None, CLIP], ids=["plain", "clipped"])
@pytest.mark.parametrize("which", STRATEGIES)
@pytest.mark.parametrize("name", FROZEN)
def test_a_block_is_its_clients_one_at_a_time(name, which, clip):
    recipe, inputs = recipe_of(name)
    strategy = STRATEGIES[which]
    params, batches, live, counts = world(recipe, inputs, clip, strategy)
    cast, memory = started(strategy, params)
    cast = disturbed(cast)
    expected = one_by_one(reference(recipe, strategy, clip), cast, memory, batches, live, counts)
    found = block_train(recipe, strategy, 0.3, clip)(cast, memory, batches, live, counts)
    assert_close(found, expected)
    assert tree.norm(tree.at(found[0]["delta"], 0)) > 1e-3, "this would hold of clients that do nothing"
    if which == "fedavg":
        summed = block_train(recipe, strategy, 0.3, clip, together=True)(cast, memory, batches, live, counts)
        assert_close(summed, (tree.map(lambda x: x.sum(0)[None], expected[0]), memory))


@pytest.mark.parametrize("name", FROZEN)
def test_nobody_falls_back(name):
    recipe, inputs = recipe_of(name)
    params, batches, live, counts = world(recipe, inputs, None)
    task = Task(recipe, strategies.fedavg(), 0.3, None, NOTHING, 64, False)
    way = choose("auto", task, Round({"params": params}, {}, batches, live, counts))
    assert (way.path, way.why) == ("block", "")


def test_what_stays_has_no_gradient_no_share_of_a_length_and_no_noise():
    """A clipped step of one example has exactly the clip's length: of what moves, whatever else there is."""
    recipe, inputs = recipe_of("adapters with a shift")
    params, batches, live, counts = world(recipe, inputs, 1e-3, strategies.fedavg())
    only = torch.zeros(K, S, B, dtype=torch.double)
    only[:, :, 0] = 1
    batches |= {"live": only, "scale": torch.ones(K, S, dtype=torch.double)}
    batches["noise"] = tree.map(torch.zeros_like, batches["noise"])
    one = torch.zeros(K, S, dtype=torch.double)
    one[:, 0] = 1
    cast = disturbed({"params": params})
    delta = block_train(recipe, strategies.fedavg(), 1.0, 1e-3)(cast, {}, batches, one, counts)[0]["delta"]
    assert (delta["3.lora_shift.weight"] == 0).all()
    for k in range(K):
        assert float(tree.norm(tree.at(delta, k)) / counts[k]) == pytest.approx(1e-3)
    noisy = batches | {"noise": tree.map(torch.ones_like, batches["noise"])}
    delta = block_train(recipe, strategies.fedavg(), 1.0, 1e-3)(cast, {}, noisy, one, counts)[0]["delta"]
    assert {name for name, x in delta.items() if (x == 0).all()} == {"3.lora_shift.weight"}


def test_frozen_layers_keep_their_own_weights_and_cost_no_call():
    """They run as they are: no client has a copy, and no gradient is taken of what they make."""
    recipe, inputs = recipe_of("adapters with a shift")
    model = folded(recipe)
    model.run(tree.at(initial(recipe, 0), None), inputs(torch.Generator(), 4), 1)
    assert [call.layer.name for call in model.tape.calls] == ["0", "1", "3.lora_a", "3.lora_b", "5"]
    assert type(model.module[3].base) is nn.Linear
    assert any(is_part(name, SHIFT) for name in initial(recipe, 0))


@pytest.mark.parametrize("name", ["the first layer", "all weights", "weights of images", "adapters of sequences"])
def test_the_sum_of_clipped_gradients_is_opacus(name):
    """Which clips by the length of what is trained, too."""
    recipe, inputs = recipe_of(name)
    params, batches, live, counts = world(recipe, inputs, CLIP, strategies.fedavg())
    batches |= {"live": torch.ones(K, S, B).double(), "scale": torch.ones(K, S).double()}
    batches["noise"] = tree.map(torch.zeros_like, batches["noise"])
    first = tree.map(lambda x: x[:, :1], batches), live[:, :1], counts
    cast = disturbed({"params": params})
    found = block_train(recipe, strategies.fedavg(), 1.0, CLIP)(cast, {}, *first)[0]["delta"]
    for k in range(K):
        module = GradSampleModule(recipe.model(), loss_reduction="sum")
        module._module.load_state_dict(cast["params"], strict=False)
        optimizer = DPOptimizer(torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 1.0), noise_multiplier=0.0,
                                max_grad_norm=CLIP, expected_batch_size=None, loss_reduction="sum")  # fmt: skip
        with quiet_hooks():
            recipe.losses(module(batches["x"][k, 0]), batches["y"][k, 0]).sum().backward()
        optimizer.pre_step()
        theirs = {own: p.grad for own, p in module._module.named_parameters() if p.requires_grad}
        assert theirs.keys() == params.keys()
        for own, gradient in theirs.items():
            torch.testing.assert_close(-found[own][k] / counts[k], gradient, rtol=1e-6, atol=1e-6)
