"""Models of every kind of layer, and clients of different sizes to train them, for the batched engine's tests."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedtailor import recipe as recipes
from fedtailor import tree
from fedtailor.adapters import adapted
from fedtailor.optimizers import SGD
from fedtailor.recipe import Recipe
from fedtailor.training import clipped, local_train, plain

K, S, B, CLIP = 5, 3, 4, 0.4
WORDS = 7


class Text(nn.Module):
    """Tokens [B, 6] through an embedding, attention of its own, a low-rank adapter and norms, to [B, 3]."""

    def __init__(self, padding=0):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8, padding_idx=padding)
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.down, self.up, self.last = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False), nn.RMSNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.mT / 8**0.5, -1) @ v)
        return self.head(self.last(x + self.up(self.down(x))).mean(1))


class Twice(nn.Module):
    """A layer used twice, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.inner, self.head, self.idle = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Wide(nn.Module):
    """Large linear layers, one of them used twice, and a bias that only one has."""

    def __init__(self):
        super().__init__()
        self.wide, self.outer, self.head = nn.Linear(300, 200), nn.Linear(200, 300, bias=False), nn.Linear(200, 3)

    def forward(self, x):
        x = torch.tanh(self.wide(x))
        return self.head(torch.tanh(self.wide(torch.tanh(self.outer(x)))))


def conv1d():
    return nn.Sequential(nn.Conv1d(2, 4, 3, stride=2, bias=False), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3))


def conv2d():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same"), nn.GroupNorm(2, 4), nn.GELU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2, padding=1, dilation=2, groups=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


def patches():
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 1, bias=False), nn.Flatten(), nn.Linear(30, 3),
    )  # fmt: skip


class Viewed(nn.Module):
    """Its view bears no image whose channels lie innermost."""

    def __init__(self):
        super().__init__()
        self.convolution, self.dropout, self.linear = nn.Conv2d(2, 4, 3), nn.Dropout(0.0), nn.Linear(64, 3)

    def forward(self, x):
        return self.linear(self.dropout(self.convolution(x).relu()).view(len(x), -1))


class Sequences(nn.Module):
    """A recurrent layer between two linear ones, one of which says where it begins."""

    def __init__(self, kind, **settings):
        super().__init__()
        self.begin, self.layer = nn.Linear(3, 4), kind(3, 4, **settings)
        self.head = nn.Linear(4 * (1 + self.layer.bidirectional), 3)

    def forward(self, x):
        number = self.layer.num_layers * (1 + self.layer.bidirectional)
        first = self.begin(x[:, 0]).expand(number, -1, -1)
        begin = (first, first.tanh()) if self.layer.mode == "LSTM" else first
        shown, end = self.layer(x if self.layer.batch_first else x.transpose(0, 1), begin)
        end = end[0] + end[1] if isinstance(end, tuple) else end
        last = shown[:, -1] if self.layer.batch_first else shown[-1]
        return self.head(last) + end.sum(0) @ torch.eye(4, 3, dtype=x.dtype)


class Encoded(nn.Module):
    """Torch's own transformer layer, which drops, on [B, 5, 8] of which the last is padding for some."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 6, 0.3, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        padding = (x[..., 0] > 0) & (torch.arange(5, device=x.device) > 3)
        return self.head(self.layer(x, src_key_padding_mask=padding).mean(1))


def numbers(*shape):
    return lambda rng, *leading: torch.randn(*leading, *shape, generator=rng, dtype=torch.double)


def tokens(rng, *leading):
    return torch.randint(WORDS, (*leading, 6), generator=rng)


WIDE = lambda: nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 3))  # noqa: E731
DROPS = lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.4), nn.Dropout(0.4), nn.Linear(5, 3))  # noqa: E731

MODELS = {
    "linear": (lambda: nn.Linear(6, 3), numbers(6)),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3, bias=False)),
        numbers(6),
    ),
    "sequence": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3)), numbers(2, 6)),
    "long sequence": (lambda: nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Flatten(), nn.Linear(14, 3)), numbers(7, 6)),
    "text": (Text, tokens),
    "twice": (Twice, numbers(6)),
    "conv1d": (conv1d, numbers(2, 6)),
    "conv2d": (conv2d, numbers(2, 6, 6)),
    "patches": (patches, numbers(2, 7, 9)),
    "viewed": (Viewed, numbers(2, 6, 6)),
}


MODELS |= {
    "rnn": (lambda: Sequences(nn.RNN, nonlinearity="relu"), numbers(3, 3)),
    "gru": (lambda: Sequences(nn.GRU, num_layers=2), numbers(3, 3)),
    "lstm": (lambda: Sequences(nn.LSTM, batch_first=True, bidirectional=True, num_layers=2), numbers(3, 3)),
}
OTHERS = {"wide": (WIDE, numbers(300)), "wide twice": (Wide, numbers(300)), "dropout": (DROPS, numbers(6)),
          "text unpadded": (lambda: Text(None), tokens), "encoder": (Encoded, numbers(5, 8)),
          "lora": (lambda: adapted(Text(), 2, key="k"), tokens)}  # fmt: skip


def made(name, dtype=torch.double):
    """A recipe of one of these models, or of another's ``(model, inputs)``, and inputs for it."""
    model, inputs = (MODELS | OTHERS)[name] if isinstance(name, str) else name

    def each(outputs, y):
        return cross_entropy(outputs, y, reduction="none")

    return Recipe(str(name), None, lambda: model().to(dtype), each, None), inputs


def world(recipe, inputs, clip, strategy=None, seed=0):
    """K clients of different size: padded examples, padded steps, and one that has nothing at all."""
    rng = torch.Generator().manual_seed(seed)
    params = recipes.initial(recipe, seed)
    live = (torch.arange(S) < torch.tensor([S, 1, S, 2, S])[:, None]).double()
    batches = {
        "x": inputs(rng, K, S, B),
        "y": torch.randint(3, (K, S, B), generator=rng),
        "live": (torch.rand(K, S, B, generator=rng) < 0.7).double(),
        "scale": torch.rand(K, S, generator=rng, dtype=torch.double),
        "seed": torch.arange(K)[:, None].expand(K, S),
    }
    batches["live"][2] = 0
    if clip is not None:
        like = params if strategy is None else strategy.start({"params": params}, strategy.remember(params))
        batches["noise"] = tree.map(lambda p: torch.randn(K, S, *p.shape, generator=rng, dtype=p.dtype), like)
    return params, batches, live, torch.arange(1.0, K + 1, dtype=torch.double)


def reference(recipe, strategy, clip, lr=0.3, optimizer=SGD):
    losses = recipes.losses(recipe)
    gradient = plain(losses) if clip is None else clipped(losses, clip)
    return local_train(gradient, strategy, lr, losses if clip is None else None, optimizer=optimizer)


def one_by_one(train, cast, memory, batches, live, counts):
    found = [train(cast, tree.at(memory, k), tree.at(batches, k), live[k], counts[k]) for k in range(len(live))]
    return tree.stack([a for a, _ in found]), tree.stack([b for _, b in found])


def assert_close(a, b, atol=1e-10):
    """Of summands and memories."""
    one, other = (tree.flatten(dict(zip(("summand", "memory"), each, strict=True))) for each in (a, b))
    assert one.keys() == other.keys()
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], rtol=atol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def started(strategy, params):
    """A cast and memories that are not all zero."""
    rng = torch.Generator().manual_seed(5)
    cast = strategy.broadcast(strategy.init(params))
    cast |= {k: tree.map(lambda x: x + 0.01, v) for k, v in cast.items() if k != "params"}
    memory = tree.stack([strategy.remember(params)] * K)
    return cast, tree.map(lambda x: x + 0.1 * torch.randn(x.shape, generator=rng, dtype=x.dtype), memory)
