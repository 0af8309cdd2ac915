"""Somebody else's Flower strategies that our rounds refuse, and why: nothing is lost or passed over in silence."""

import random
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as theirs
from own_flower import Own

from fedtailor.errors import ConfigError
from fedtailor.strategies.flower_adapter import from_flower


def forgetting(**attributes: Any) -> Any:
    """A strategy that sets attributes while it aggregates, from a function of what they were."""

    class Forgets(Own):
        def change(self, mean):
            for name, make in attributes.items():
                setattr(self, name, make(getattr(self, name, None)))
            return mean

    return Forgets()


class Slotted(Own):
    __slots__ = ("hidden",)

    def change(self, mean):
        self.hidden = 1
        return mean


class Deletes(Own):
    def change(self, mean):
        del self.fraction_evaluate
        return mean


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (forgetting(phase=lambda _: "late"), "phase changes and cannot be carried .*: it is a str"),
        (forgetting(seen=lambda _: {7: 1.0}), "seen changes .*: a key that is 7"),
        (forgetting(seen=lambda _: {"a/b": 1.0}), "seen changes .*: a key that is 'a/b'"),
        (forgetting(seen=lambda _: OrderedDict(a=1)), "seen changes .*: it is a OrderedDict"),
        (forgetting(many=lambda _: [np.array(["x"])]), "many changes"),
        (forgetting(big=lambda _: 2**70), "big changes .*: .*64 bits"),
        (forgetting(rule=lambda _: lambda x: x), "rule changes .*: it is a function"),
        (forgetting(source=lambda _: np.random.default_rng(0)), "source changes .*: it is a Generator"),
        (Deletes(), "fraction_evaluate was deleted"),
        (Slotted(), "Slotted keeps something outside its attributes"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_what_cannot_be_carried_is_refused_and_never_lost(strategy, words, step):
    with pytest.raises(ConfigError, match=words):
        step(from_flower(strategy), {"params": {"w": torch.zeros(1)}}, [({"w": torch.ones(1)}, 1)])


def test_a_generator_of_its_own_is_refused_before_a_round_is_spent():
    strategy = Own()
    strategy.source = random.Random(1)
    with pytest.raises(ConfigError, match="Flower's Own: source changes .*: it is a Random"):
        from_flower(strategy)


def asking(change: Any) -> Any:
    """FedAvg whose messages ``change`` alters."""

    class Asks(Own):
        def configure_train(self, server_round, arrays, config, grid):
            return change(list(super().configure_train(server_round, arrays, config, grid)))

    return Asks()


def told(messages, **settings):
    for message in messages:
        for key, value in settings.items():
            message.content["config"][key.replace("_", "-")] = value
    return messages


def each_another(messages):
    return [
        Message(RecordDict({"a": ArrayRecord([np.full(1, float(k))])}), dst_node_id=k + 1, message_type="train")
        for k in range(len(messages))
    ]


def with_metrics(messages):
    messages[0].content["extra"] = MetricRecord({"x": 1.0})
    return messages


def with_type(messages):
    messages[0].metadata.message_type = "train.special"
    return messages


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (asking(lambda messages: told(messages, local_epochs=3)), "tells clients local-epochs = 3, which ours cannot"),
        (asking(lambda messages: told(messages, proximal_mu=0.3)), "tells clients proximal-mu = 0.3"),
        (asking(lambda messages: messages[:1]), "asks 1 of 2 sites"),
        (asking(lambda messages: []), "asks 0 of 2 sites"),
        (theirs.FedAvg(fraction_train=0.5, min_train_nodes=1), "asks 1 of 2 sites"),
        (asking(each_another), "sends each client other arrays"),
        (asking(with_metrics), "something else than one ArrayRecord"),
        (asking(with_type), "asks for 'train.special'"),
    ],
)
def test_what_our_clients_cannot_do_is_refused_by_name(strategy, words, step):
    with pytest.raises(ConfigError, match=words):
        step(from_flower(strategy), {"params": {"w": torch.zeros(1)}}, [({"w": torch.ones(1)}, 1)] * 2)


def test_one_that_waits_for_more_nodes_is_not_waited_for(step, monkeypatch):
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda _: None)
    with pytest.raises(ConfigError, match="waits for more than the 2 sites.*quorum"):
        step(
            from_flower(theirs.FedAvg(min_available_nodes=3)),
            {"params": {"w": torch.zeros(1)}},
            [({"w": torch.ones(1)}, 1)] * 2,
        )


class Fails(Own):
    def change(self, mean):
        raise RuntimeError("no luck")


class Shortens(Own):
    def change(self, mean):
        return {"w": mean["w"][:1]}


class Renames(Own):
    def change(self, mean):
        return {"v": mean["w"]}


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (Fails(), "Flower's Fails, round 1: RuntimeError: no luck"),
        (Shortens(), "arrays are not the model's: 1 of 1, wrong or missing .*w"),
        (Renames(), "arrays are not the model's: 1 of 1, wrong or missing .*w"),
    ],
)
def test_what_goes_wrong_in_somebody_elses_code_is_named(strategy, words, step):
    with pytest.raises(ConfigError, match=words):
        step(from_flower(strategy), {"params": {"w": torch.zeros(2)}}, [({"w": torch.ones(2)}, 1)])


def test_a_guarantee_that_is_wrapped_is_refused_too():
    noisy = theirs.DifferentialPrivacyServerSideFixedClipping(theirs.FedAvg(), 1.0, 1.0, 2)
    outer = Own()
    outer.inner = noisy
    with pytest.raises(ConfigError, match=r"DifferentialPrivacyServerSideFixedClipping is refused.*private\(\)"):
        from_flower(outer)
    with pytest.raises(ConfigError, match="a int is not a flwr"):
        from_flower(3)
