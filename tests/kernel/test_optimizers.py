"""Local optimizers are torch.optim's by the same names, anew in every round, and said in a plan."""

import json

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from fedtailor import strategies, tree
from fedtailor.card import _by
from fedtailor.config import load, readable
from fedtailor.errors import ConfigError
from fedtailor.optimizers import SGD, descended, optimizer_of
from fedtailor.privacy.planning import resolve, strategy_of
from fedtailor.study import LocalTraining, Plan
from fedtailor.training import local_train, plain

RULES = {
    "sgd": (torch.optim.SGD, {}),
    "weight decay": (torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {}),
    "adam with decay": (torch.optim.Adam, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {}),
    "adamw with decay": (torch.optim.AdamW, {"betas": (0.0, 0.9), "weight_decay": 0.3}),
}


def local(rule, **others):
    torchs, settings = RULES[rule]
    named = {"name": torchs.__name__.lower()} | settings
    return LocalTraining(**({"steps": 4, "rate": 0.5, "lr": 0.1} | others), optimizer=named)


@pytest.mark.parametrize("rule", RULES)
def test_it_is_torchs(rule):
    torchs, settings = RULES[rule]
    rng = torch.Generator().manual_seed(1)
    params = {"w": torch.randn(3, 2, generator=rng).double(), "b": torch.randn(2, generator=rng).double()}
    theirs = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer, kept = torchs(theirs.values(), lr=0.1, **settings), {}
    for step in range(6):
        grads = {name: torch.randn(p.shape, generator=rng).double() for name, p in params.items()}
        params, kept = descended(
            optimizer_of(local(rule)), params, grads, kept, torch.tensor(0.1, dtype=torch.double), step
        )
        for name, p in theirs.items():
            p.grad = grads[name]
        optimizer.step()
        for name, p in params.items():
            torch.testing.assert_close(p, theirs[name].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_clients_beside_each_other_are_each_by_itself(rule):
    rng, rule = torch.Generator().manual_seed(2), optimizer_of(local(rule))
    many = {"w": torch.randn(3, 4, 2, generator=rng)}
    each, kept, keeps = [tree.at(many, k) for k in range(3)], {}, [{}, {}, {}]
    for step in range(3):
        grads = {"w": torch.randn(3, 4, 2, generator=rng)}
        rate = torch.tensor([0.1, 0.1, 0.1 if step < 1 else 0.0])
        many, kept = descended(rule, many, grads, kept, rate, step)
        for k in range(3):
            each[k], keeps[k] = descended(rule, each[k], tree.at(grads, k), keeps[k], rate[k], step)
            torch.testing.assert_close(many["w"][k], each[k]["w"])
        if step == 1:
            stood = many["w"][2]
    assert torch.equal(many["w"][2], stood), "a step that is padding moved somebody"


@pytest.mark.parametrize("rule", RULES)
def test_a_clients_round_is_a_plain_loop_with_torchs_optimizer(rule):
    torchs, settings = RULES[rule]
    rng = torch.Generator().manual_seed(3)
    module = torch.nn.Linear(5, 3).double()
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    batches = {"x": torch.randn(4, 6, 5, generator=rng).double(), "y": torch.randint(3, (4, 6), generator=rng),
               "live": torch.ones(4, 6), "scale": torch.full((4,), 1 / 6, dtype=torch.double)}  # fmt: skip

    def losses(params, x, y):
        return cross_entropy(torch.func.functional_call(module, params, (x,)), y, reduction="none")

    train = local_train(plain(losses), strategies.fedavg(), 0.1, losses, optimizer=optimizer_of(local(rule)))
    for _ in range(2):  # a second round begins anew
        summand, _ = train({"params": start}, {}, batches, torch.ones(4).double(), torch.tensor(1.0))
    optimizer = torchs(module.parameters(), lr=0.1, **settings)
    for step in range(4):
        optimizer.zero_grad()
        cross_entropy(module(batches["x"][step]), batches["y"][step]).backward()
        optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(summand["delta"][name], p.detach() - start[name], rtol=1e-10, atol=1e-12)


def test_plain_sgd_leaves_a_plans_text_as_it_was():
    """So a study that began before there was a choice has the digest that its sites approved."""
    plan = load(["study=heart", "privacy=none"]).plan
    assert "optimizer" not in json.loads(plan.canonical())["local"] and optimizer_of(plan.local) is not None
    other = load(["study=heart", "privacy=none", "local.optimizer=adamw"]).plan
    said = {"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-08, "weight_decay": 0.01}
    assert json.loads(other.canonical())["local"]["optimizer"] == said
    assert Plan.parse(other.canonical()) == other and Plan.parse(plan.canonical()) == plan
    assert plan.digest() != other.digest()


def test_settings_come_as_a_mapping():
    words = "local.optimizer={name: sgd, momentum: 0.9, nesterov: true}"
    optimizer = load(["study=heart", "privacy=none", words]).plan.local.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.nesterov) == ("sgd", 0.9, True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("adamx", "optimizer: name is none of sgd, adam and adamw (got {'name': 'adamx'})"),
        ({"momentum": 0.9}, "optimizer: name is none of sgd, adam and adamw (got {'momentum': 0.9})"),
        (3, "optimizer: name is none of sgd, adam and adamw (got 3)"),
        ({"name": "sgd", "momentum": 1}, "optimizer.momentum: Input should be less than 1 (got 1)"),
        ({"name": "sgd", "betas": [0.9, 0.9]}, "optimizer.betas: Extra inputs are not permitted"),
        ({"name": "sgd", "nesterov": True}, "nesterov: true, but momentum is 0; give it one, 0.9 say"),
        ({"name": "adam", "betas": [0.9, 1.0]}, "optimizer.betas.1: Input should be less than 1 (got 1.0)"),
        ({"name": "adamw", "eps": 0}, "optimizer.eps: Input should be greater than 0 (got 0)"),
        ({"name": "adamw", "weight_decay": -1}, "optimizer.weight_decay: Input should be greater than or equal to 0"),
    ],
)
def test_what_is_no_optimizer_is_refused_by_its_field(given, said):
    with pytest.raises(ValidationError) as caught:
        LocalTraining(steps=1, rate=0.5, lr=0.1, optimizer=given)
    assert said in readable(caught.value)


STRICT = {
    "scaffold": {"population": 4},
    "fednova": {},
    "qfedavg": {},
    "fedprox": {"of": {"name": "fednova"}, "mu": 0.1},
}


@pytest.mark.parametrize("name", STRICT)
def test_a_strategy_that_reads_a_change_as_gradients_is_refused_another(name):
    plan = load(["study=heart", "privacy=none"]).plan
    spec = {"_target_": f"fedtailor.strategies.{name}"} | STRICT[name]

    def asked(optimizer):
        dumped = plan.model_dump(by_alias=True)
        return Plan.model_validate(dumped | {"strategy": spec, "local": dumped["local"] | {"optimizer": optimizer}})

    for optimizer in ("adam", "adamw", {"name": "sgd", "momentum": 0.5}):
        for make in (resolve, strategy_of):
            with pytest.raises(ConfigError, match="local.optimizer: .* learning rate times the sum of its gradients"):
                make(asked(optimizer))
    assert strategy_of(asked("sgd")).plain_sgd and SGD.plain
    assert not strategy_of(load(["study=heart", "privacy=none", "local.optimizer=adam"]).plan).plain_sgd


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("sgd", ""),
        ("nesterov", " by SGD with momentum 0.9, nesterov True, weight decay 0.1, which began anew in each round"),
        ("adam", " by Adam, which began anew in each round"),
    ],
)
def test_a_card_says_what_sites_stepped_by(rule, said):
    assert _by(local(rule)) == said
