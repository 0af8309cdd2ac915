"""Attention in a block of clients is that of each client alone: whatever looks at whatever, and however it is masked."""

from copy import deepcopy

import pytest
import torch
from folk import CLIP, K, assert_close, made, numbers, one_by_one, reference, started, world
from torch import nn

from fedtailor import strategies, tree
from fedtailor.adapters import adapted
from fedtailor.recipe import Recipe, parameters
from fedtailor.simulations.attention import Attention
from fedtailor.simulations.blocks import block_train
from fedtailor.simulations.feed import NOTHING
from fedtailor.simulations.folded import folded
from fedtailor.simulations.paths import Round, Task, choose
from fedtailor.simulations.stands import NotBatchable

pytestmark = [  # what torch says of the reference
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]
BOTH = pytest.mark.parametrize("clip", [None, CLIP], ids=["plain", "clipped"])
L, WIDE, HEADS = 5, 8, 2

INPUTS = {
    "self": lambda x: [x] * 3,
    "memory": lambda x: [x[:, :3], memory := x.flip(2), memory],
    "query is key": lambda x: [x, x, x.flip(2)],
    "query is value": lambda x: [x, x.flip(2), x],
    "three": lambda x: [x[:, 1:3], x.flip(2), x.tanh()],
    "dims": lambda x: [x[:, :3], x[..., 2:5], x[..., :6]],
}


class Attends(nn.Module):
    """Attention over [B, L, WIDE], and what is learnt of its weights where they are given."""

    def __init__(self, inputs="self", call=lambda x: {}, times=1, **settings):
        super().__init__()
        self.first, self.head = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 3)
        self.attention = nn.MultiheadAttention(WIDE, HEADS, **{"batch_first": True} | settings)
        self.inputs, self.call, self.times = INPUTS[inputs], call, times

    def forward(self, x):
        call, z, first = self.call(x), self.first(x), self.attention.batch_first
        for _ in range(self.times):
            given = self.inputs(z)
            turned = {id(x): x if first else x.transpose(0, 1) for x in given}  # what is one tensor stays one
            made, weights = self.attention(*(turned[id(x)] for x in given), **call)
            z = z + (made if first else made.transpose(0, 1)).mean(1, keepdim=True)
        z = self.head(z).mean(1)
        return z if weights is None else z + weights.square().flatten(1)[:, 1:4]


def padding(x):
    """The first is never padding."""
    return (x[..., 0] > 0.5) & (torch.arange(L) > 0)


def apart(x):
    """Of each example and head ``[N * H, L, L]``; nobody is without anything to look at."""
    return (x[:, :, None, :HEADS] > x[:, None, :, :HEADS]).movedim(-1, 1).flatten(0, 1)


CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
ADDED = torch.linspace(-2, 2, L * L, dtype=torch.double).view(L, L).sin()
CALLS = {
    "no weights": lambda x: {"need_weights": False},
    "weights of heads": lambda x: {"average_attn_weights": False},
    "causal": lambda x: {"need_weights": False, "attn_mask": CAUSAL, "is_causal": True},
    "causal, with weights": lambda x: {"attn_mask": CAUSAL, "is_causal": True},
    "causal, padded": lambda x: CALLS["causal"](x) | {"key_padding_mask": padding(x)},
    "added": lambda x: {"need_weights": False, "attn_mask": ADDED},
    "padded": lambda x: {"need_weights": False, "key_padding_mask": padding(x)},
    "padded, with weights": lambda x: {"key_padding_mask": padding(x), "attn_mask": CAUSAL},
    "masked apart": lambda x: {"need_weights": False, "attn_mask": apart(x)},
    "nothing to look at": lambda x: {"need_weights": False, "key_padding_mask": x[:, :1, 0].expand(-1, L) > 0},
}
DIMS = {"inputs": "dims", "kdim": 3, "vdim": 6}
SETTINGS = {
    "no bias": {"bias": False},
    "batch second": {"batch_first": False},
    "batch second, memory": {"batch_first": False, "inputs": "memory", "call": CALLS["no weights"]},
    "dims, no bias": DIMS | {"bias": False},
    "dims, batch second": DIMS | {"batch_first": False},
    "twice": {"times": 2, "inputs": "memory"},
    "dims, twice": DIMS | {"times": 2},
    "a few of few": {"inputs": "three", "call": lambda x: {"need_weights": False}},
}


class Encoded(nn.Module):
    """A transformer's part over [B, L, WIDE], or over [L, B, WIDE], and its mean."""

    def __init__(self, part, first=True, **call):
        super().__init__()
        self.part, self.head, self.first, self.call = part, nn.Linear(WIDE, 3), first, call
        self.two = isinstance(part, nn.TransformerDecoderLayer | nn.TransformerDecoder | nn.Transformer)

    def forward(self, x):
        z = [x.tanh(), x[:, :3]] if self.two else [x]
        z = self.part(*(x if self.first else x.transpose(0, 1) for x in z), **{n: c(x) for n, c in self.call.items()})
        return self.head(z.mean(1 if self.first else 0))


def layer(kind=nn.TransformerEncoderLayer, dropout=0.0, **settings):
    return kind(WIDE, HEADS, 6, dropout, **{"batch_first": True} | settings)


def encoder(**settings):
    return nn.TransformerEncoder(layer(**settings), 2, nn.LayerNorm(WIDE))


def decoder(**settings):
    return nn.TransformerDecoder(layer(nn.TransformerDecoderLayer, **settings), 2, nn.LayerNorm(WIDE))


SECOND = {"batch_first": False}
TRANSFORMERS = {
    "layer": lambda: Encoded(layer()),
    "layer, norm first": lambda: Encoded(layer(norm_first=True, activation="gelu", bias=False)),
    "layer, batch second": lambda: Encoded(layer(**SECOND), False),
    "encoder": lambda: Encoded(encoder()),
    "encoder, nested": lambda: Encoded(encoder(), src_key_padding_mask=padding),
    "encoder, causal": lambda: Encoded(encoder(), mask=lambda x: CAUSAL),
    "encoder, batch second": lambda: Encoded(
        encoder(**SECOND), False, src_key_padding_mask=padding, mask=lambda x: CAUSAL
    ),
    "decoder layer": lambda: Encoded(layer(nn.TransformerDecoderLayer)),
    "decoder": lambda: Encoded(decoder(), memory_key_padding_mask=lambda x: padding(x)[:, :3]),
    "decoder, batch second": lambda: Encoded(decoder(**SECOND), False, tgt_mask=lambda x: CAUSAL),
    "both, batch second": lambda: Encoded(nn.Transformer(WIDE, HEADS, 1, 1, 6, 0.0), False),
}


def only(make, *trained):
    """A model of which nothing is trained but parameters that end so; what is frozen is always the same."""

    def again():
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = make()
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith(trained))
        return model

    return again


def low_rank():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return adapted(Encoded(encoder()), 2, where=("*linear1", "*linear2"), key="k")


FROZEN = {
    "what comes out": only(Attends, "out_proj.weight", "out_proj.bias", "first.weight"),
    "what goes in": only(Attends, "in_proj_weight", "head.bias"),
    "a bias": only(lambda: Attends("memory"), "in_proj_bias", "out_proj.bias"),
    "some that go in": only(lambda: Attends(**DIMS), "k_proj_weight", "in_proj_bias", "out_proj.weight"),
    "no bias that goes in": only(lambda: Attends(**DIMS), "q_proj_weight", "v_proj_weight"),
    "attention": only(lambda: Attends(**SECOND), "first.weight", "head.weight"),
    "adapters": low_rank,
    "adapters only": only(low_rank, "lora_a.weight", "lora_b.weight"),
}

ATTENDING = {f"{name} inputs": lambda name=name: Attends(name) for name in INPUTS if name != "dims"}
ATTENDING |= {name: lambda call=call: Attends(call=call) for name, call in CALLS.items()}
ATTENDING |= {name: lambda settings=settings: Attends(**settings) for name, settings in SETTINGS.items()}
ATTENDING |= TRANSFORMERS | {f"{name} trained": model for name, model in FROZEN.items()}
ATTENDING |= {
    "dropout of layers": lambda: Encoded(layer(dropout=0.4)),
    "dropout, batch second": lambda: Encoded(encoder(dropout=0.4, **SECOND), False, src_key_padding_mask=padding),
    "dropout of weights": lambda: Attends(dropout=0.4),
    "dropout of no weights": lambda: Attends(call=CALLS["no weights"], dropout=0.4),
    "dropout, frozen": only(lambda: Attends(dropout=0.4), "head.weight"),
}
ATTENDING = {name: (model, numbers(L, WIDE)) for name, model in ATTENDING.items()}
DROPS = [name for name in ATTENDING if name.startswith("dropout")]


@BOTH
@pytest.mark.parametrize("name", [name for name in ATTENDING if name not in DROPS])
def test_a_block_is_its_clients_one_at_a_time(name, clip):
    recipe, inputs = made(ATTENDING[name])
    strategy = strategies.fedavg()
    params, batches, live, counts = world(recipe, inputs, clip, strategy)
    cast, memory = started(strategy, tree.map(lambda p: p + 0.1 * p.cos(), params))  # biases begin as zeros
    expected = one_by_one(reference(recipe, strategy, clip), cast, memory, batches, live, counts)
    found = block_train(recipe, strategy, 0.3, clip)(cast, memory, batches, live, counts)
    assert_close(found, expected)
    assert all(x.abs().max() > 1e-6 for n, x in found[0]["delta"].items()), "this would hold of what does not move"
    summed = block_train(recipe, strategy, 0.3, clip, together=True)(cast, memory, batches, live, counts)
    assert_close(summed, (tree.map(lambda x: x.sum(0)[None], expected[0]), memory))


@BOTH
@pytest.mark.parametrize("name", DROPS)
def test_the_size_of_a_block_does_not_show(name, clip):
    recipe, inputs = made(ATTENDING[name])
    params, batches, live, counts = world(recipe, inputs, clip)
    many = block_train(recipe, strategies.fedavg(), 0.3, clip)
    whole = many({"params": params}, {}, batches, live, counts)
    cuts = [slice(0, 1), slice(1, 3), slice(3, K)]
    found = [many({"params": params}, {}, tree.at(batches, c), live[c], counts[c])[0] for c in cuts]
    assert_close((tree.map(lambda *xs: torch.cat(xs), *found), {}), whole)
    other = many({"params": params}, {}, batches | {"seed": batches["seed"] + K}, live, counts)
    assert tree.norm(tree.map(torch.sub, other[0], whole[0])) > 1e-3, "this would hold if nothing were dropped"


@pytest.mark.parametrize("padded", [False, True])
def test_weights_are_dropped_as_torch_does(padded):
    """By their number and scale; and where there is nothing to look at, there is nothing to make."""
    own = nn.MultiheadAttention(WIDE, HEADS, dropout=0.25, batch_first=True)
    model = folded(Recipe("drops", None, lambda: deepcopy(own), None, None))
    params = tree.at(parameters(own), None)
    x = torch.randn(200, L, WIDE)
    model.tape.params, model.tape.clients, model.tape.seed = params, 2, torch.arange(2)
    mask = torch.zeros(200, L, dtype=torch.bool)
    mask[7] = padded
    _, weights = model.module(x, x, x, average_attn_weights=False)
    _, kept = own.eval()(x, x, x, average_attn_weights=False)
    gone = weights == 0
    assert gone.double().mean() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(weights[~gone], kept[~gone] / 0.75)
    z, _ = model.module(x, x, x, key_padding_mask=mask, need_weights=False)
    assert z.isfinite().all() and bool((z[7] == params["out_proj.bias"]).all()) == padded


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_nobody_falls_back(name):
    recipe, inputs = made(ATTENDING[name])
    first = Round(*started(strategies.fedavg(), world(recipe, inputs, None)[0]), *world(recipe, inputs, None)[1:])
    way = choose("auto", Task(recipe, strategies.fedavg(), 0.3, None, NOTHING, 64, False), first)
    assert (way.path, way.why) == ("block", "")


def test_what_is_frozen_whole_is_left_as_it_is():
    for name, kind in (("attention trained", nn.MultiheadAttention), ("dropout, frozen", Attention)):
        assert type(folded(made(ATTENDING[name])[0]).module.attention) is kind


class Own(nn.MultiheadAttention):
    pass


def hooked(module):
    module.register_forward_hook(lambda module, given, found: None)
    return module


def reworked(rework, module):
    rework(module.out_proj)
    return module


REWORKED = [nn.utils.parametrizations.orthogonal, nn.utils.spectral_norm]


@pytest.mark.parametrize(
    "module, why",
    [
        (lambda: nn.MultiheadAttention(WIDE, HEADS, add_bias_kv=True), "MultiheadAttention with add_bias_kv"),
        (lambda: nn.MultiheadAttention(WIDE, HEADS, add_zero_attn=True), "MultiheadAttention with add_zero_attn"),
        (lambda: hooked(nn.MultiheadAttention(WIDE, HEADS)), "MultiheadAttention with hooks"),
        (lambda: Own(WIDE, HEADS), "Own, which has no batched form"),
        *(
            (
                lambda rework=rework: reworked(rework, nn.MultiheadAttention(WIDE, HEADS)),
                "MultiheadAttention whose out_proj is no plain linear layer",
            )
            for rework in REWORKED
        ),
    ],  # fmt: skip
)
def test_what_attention_cannot_be_batched_for(module, why):
    with pytest.raises(NotBatchable, match=f"layer.in_proj_weight: a parameter of {why}"):
        folded(Recipe("odd", None, lambda: nn.ModuleDict({"layer": module()}), None, None))


@pytest.mark.parametrize("nested", [False, True])
def test_what_is_no_batch_of_sequences(nested):
    x = torch.ones(L, WIDE)
    x = torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged) if nested else x
    model = folded(Recipe("attends", None, lambda: nn.MultiheadAttention(WIDE, HEADS, batch_first=True), None, None))
    with pytest.raises(NotBatchable, match="MultiheadAttention: not a batch of sequences of one length"):
        model.module(x, x, x)


def test_the_last_layer_is_anothers_too():
    """What somebody else makes of it is of each client's weights, and counts."""

    class Shares(Attends):
        def forward(self, x):
            return super().forward(self.attention.out_proj(x))

    ATTENDING["shares"] = Shares, numbers(L, WIDE)
    test_a_block_is_its_clients_one_at_a_time("shares", CLIP)
