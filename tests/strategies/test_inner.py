"""How strategies name the strategy inside: by value, by name, by name and arguments; never code."""

import pytest
import torch
from pydantic import ValidationError

from fedtailor.config import build
from fedtailor.errors import ConfigError
from fedtailor.strategies import fedavg, krum, median
from fedtailor.strategy import Strategy
from fedtailor.study import Spec


def made(of):
    return build(Spec.model_validate({"_target_": "fedtailor.strategies.median", "of": of}), Strategy)


@pytest.mark.parametrize("of", ["fedavg", {"name": "fedavg"}, {"name": "fedavg", "server_lr": 1.0}])
def test_a_name_and_a_value_make_the_same(of, step, start, around):
    replies = around(start, 3)
    by_value, by_name = (step(s, s.init(start), replies)["params"] for s in (median(fedavg()), made(of)))
    torch.testing.assert_close(by_value, by_name, rtol=0, atol=0)


def test_arguments_reach_the_strategy_inside(end):
    assert end(made({"name": "fedavg", "server_lr": 0.5}), [[2.0]]) == [1]
    assert end(made({"name": "norm_bound", "bound": 1.0, "of": {"name": "fedavg", "server_lr": 0.5}}), [[2.0]]) == [0.5]


@pytest.mark.parametrize(
    ("of", "says"),
    [
        ("fedavgg", "did you mean 'fedavg'"),
        ("os.system", "outside the trusted modules"),
        ({"name": "fedavg", "server_lr": "fast"}, "server_lr"),
        ({"server_lr": 1.0}, "a strategy is named as in"),
        (7, "a strategy is named as in"),
        ({"name": "fedavg", "_target_": "os.system"}, "'_target_' is not an argument"),
        ({"name": "fedavg", "target": "os.system"}, "."),
    ],
)
def test_anything_else_is_refused(of, says):
    with pytest.raises(ConfigError, match=says):
        made(of)


def test_nesting_has_an_end():
    of: object = "fedavg"
    for _ in range(2000):
        of = {"name": "median", "of": of}
    with pytest.raises(ValidationError, match="at most 8"):
        krum(of=of)
