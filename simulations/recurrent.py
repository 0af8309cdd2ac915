"""Recurrent layers by cell: a linear layer of all positions at once, and one of what was remembered, position by position."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedtailor.simulations.layers import LINEAR
from fedtailor.simulations.stands import Dropout, Layer, NotBatchable, Stand, Tape, layer_of

State = tuple[Tensor, ...]  # [K * B, H] each: what is remembered, and what is shown, which comes first
Cell = Callable[[Tensor, Tensor, State], State]
"""What the input makes and what the memory makes, ``[K * B, gates * H]`` both, and the state before; to the state after."""


def _rnn(squash: Callable[[Tensor], Tensor]) -> Cell:
    return lambda given, kept, state: (squash(given + kept),)


def _gru(given: Tensor, kept: Tensor, state: State) -> State:
    (r, z, n), (kept_r, kept_z, kept_n) = given.chunk(3, -1), kept.chunk(3, -1)
    stays = torch.sigmoid(z + kept_z)
    new = torch.tanh(n + torch.sigmoid(r + kept_r) * kept_n)
    return ((1 - stays) * new + stays * state[0],)


def _lstm(given: Tensor, kept: Tensor, state: State) -> State:
    i, f, g, o = (given + kept).chunk(4, -1)
    carried = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(carried), carried


CELLS: dict[type[nn.Module], Callable[[Any], Cell]] = {
    nn.RNN: lambda layer: _rnn(torch.tanh if layer.nonlinearity == "tanh" else torch.relu),
    nn.GRU: lambda layer: _gru,
    nn.LSTM: lambda layer: _lstm,
}


SETTINGS = (
    "mode",
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
)


class Recurrent(nn.Module):
    """Stands for ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``, gives what it gives and has its settings."""

    batch_first: bool
    bidirectional: bool
    hidden_size: int
    mode: str
    num_layers: int

    def __init__(self, module: Any, pairs: list[tuple[Layer, Layer]], tape: Tape) -> None:
        super().__init__()
        for name in SETTINGS:
            setattr(self, name, getattr(module, name))
        self.layers = [layer for pair in pairs for layer in pair]
        self.pairs = [(Stand(given, tape), Stand(kept, tape)) for given, kept in pairs]
        self.cell, self.states = CELLS[type(module)](module), 2 if isinstance(module, nn.LSTM) else 1
        self.between = Dropout(module.dropout, tape)

    def forward(self, x: Tensor, begin: Any = None) -> tuple[Tensor, Any]:
        """As the module's own; batches of sequences only."""
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise NotBatchable(f"{self.mode}: not a batch of sequences of one length")
        x = x if self.batch_first else x.transpose(0, 1)
        ways, ends = 2 if self.bidirectional else 1, []
        states = self._begin(x, begin)
        for number in range(self.num_layers):
            made = []
            for way in range(ways):
                shown, state = self._along(x, self.pairs[number * ways + way], next(states), bool(way))
                made.append(shown)
                ends.append(state)
            x = torch.cat(made, -1) if ways == 2 else made[0]
            if number < self.num_layers - 1:
                x = self.between(x)
        end = tuple(torch.stack(each) for each in zip(*ends, strict=True))
        return x if self.batch_first else x.transpose(0, 1), end if len(end) == 2 else end[0]

    def _begin(self, x: Tensor, begin: Any) -> Iterator[State]:
        if begin is None:
            zero = x.new_zeros(len(x), self.hidden_size)
            return iter([(zero,) * self.states] * len(self.pairs))
        each: State = tuple(begin) if self.states == 2 else (begin,)
        return zip(*(one.unbind() for one in each), strict=True)

    def _along(self, x: Tensor, pair: tuple[Stand, Stand], state: State, back: bool) -> tuple[Tensor, State]:
        given, shown = pair[0](x).unbind(1), []
        for one in reversed(given) if back else given:
            state = self.cell(one, pair[1](state[0]), state)
            shown.append(state[0])
        return torch.stack(shown[::-1] if back else shown, 1), state


def stand(name: str, module: Any, tape: Tape, trains: Callable[[str], bool]) -> Recurrent:
    """A recurrent layer as pairs of linear layers, one pair for each layer and direction."""
    ways = ("", "_reverse") if module.bidirectional else ("",)
    places = [f"l{number}{way}" for number in range(module.num_layers) for way in ways]
    pairs = [(_linear(name, module, f"ih_{at}", trains), _linear(name, module, f"hh_{at}", trains)) for at in places]
    return Recurrent(module, pairs, tape)


def _linear(name: str, module: Any, which: str, trains: Callable[[str], bool]) -> Layer:
    outputs, inputs = getattr(module, f"weight_{which}").shape
    own = ("weight", "bias") if module.bias else ("weight",)
    place = f"{name}." if name else ""
    named = {each: (f"{place}{each}_{which}", getattr(module, f"{each}_{which}")) for each in own}
    return layer_of(f"{place}{which}", nn.Linear(inputs, outputs, module.bias, device="meta"), LINEAR, named, trains)
