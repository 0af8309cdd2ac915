"""A Flower strategy object as one of ours: Flower's own code aggregates, in our round loop. Imports flwr.

Flower's object is asked what it is asked in ``flwr run``: ``configure_train`` before a round's replies and
``aggregate_train`` with them, both when the round is over, on a copy that is given what it remembered and that is thrown
away. Its evaluation is not asked for: what sites measure is the plan's. Every name that is imported from flwr outside
``flwr.app`` and ``flwr.serverapp`` is internal to it; tests/strategies/test_flower.py fails when a new flwr moves one.
"""

import copy
import logging
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as theirs
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedtailor import STACK, Local, Strategy, seeds, tree
from fedtailor.errors import ConfigError, FedtailorError
from fedtailor.strategies.carried import array, changed, restore, tensor
from fedtailor.strategies.fedprox import fedprox
from fedtailor.strategies.stacked import alive
from fedtailor.tree import Tree

PRIVATE = "; privacy of whole sites is private() here, that of records privacy=record"
NO_GUARANTEE = (
    "what it makes would be taken for private. Its noise would come from generators that are seeded, so that "
    "a round can be repeated, and is made for a plain mean of a fixed number of clients, which nothing enforces"
    + PRIVATE
)
NO_MOD = (
    "it has each client clip by a mod of Flower's ClientApp, which our sites do not run: nothing is clipped" + PRIVATE
)
BOOSTER = "what it sends is an XGBoost booster; our recipes train tensors"
BUILT_IN: dict[str, type] = {
    name: kind for name in theirs.__all__ if issubclass(kind := getattr(theirs, name), theirs.Strategy)
}
REFUSED = {
    "DifferentialPrivacyServerSideFixedClipping": NO_GUARANTEE,
    "DifferentialPrivacyServerSideAdaptiveClipping": NO_GUARANTEE,
    "DifferentialPrivacyClientSideFixedClipping": NO_MOD,
    "DifferentialPrivacyClientSideAdaptiveClipping": NO_MOD,
    "FedXgbBagging": BOOSTER,
    "FedXgbCyclic": BOOSTER,
}
PATIENCE = 6  # times that a strategy may ask who is there; one that waits for more nodes would ask for ever
_ALONE = threading.Lock()  # what Flower's code uses is the process's: generators, a log, a task's identity


def from_flower(
    strategy: theirs.Strategy,
    *,
    weighting: Literal["examples", "equal"] = "examples",
    loss_key: str | None = None,
    ahead: bool = False,
) -> Strategy:
    """A Flower strategy object as a strategy of ours; the object itself is never changed.

    It keeps every reply of a round in memory, about three times, and no privacy can be claimed for it. Its attributes
    that change are carried in the state, so that a run resumes; what it keeps elsewhere (in its class, in a file) is not
    seen. It may draw from the generators of ``random``, ``numpy.random`` and ``torch``, which are seeded for each round.

    Args:
        weighting: ``examples`` tells Flower's object the rows that each client says it has; ``equal`` tells it 1.
        loss_key: the metric in which it looks for each client's training loss; None: its own ``train_loss_key``, or none.
        ahead: it sends clients another point than its model, which is then sent beside it.

    Raises:
        ConfigError: if it cannot run here, or what it would seem to guarantee is not so.
    """
    refuse(strategy)
    name, mu = type(strategy).__name__, float(getattr(strategy, "proximal_mu", 0.0))
    loss_key = loss_key or getattr(strategy, "train_loss_key", None)
    weight_key = getattr(strategy, "weighted_by_key", "num-examples")
    with _alone(name, 0):
        made = copy.deepcopy(strategy)
        changed(copy.deepcopy(made), made)  # what can never be carried is refused before a round is spent

    def init(params: Tree) -> Tree:
        return {"params": params} | ({"ahead": tree.map(torch.clone, params)} if ahead else {})

    def broadcast(state: Tree) -> Tree:
        return {"params": state["ahead"], "model": state["params"]} if ahead else {"params": state["params"]}

    def report(local: Local) -> tuple[Tree, Tree]:
        delta = tree.map(lambda end, start: end - start, local.params, local.cast["params"])
        weight = local.num_examples if weighting == "examples" else torch.ones_like(local.num_examples)
        loss = {} if loss_key is None or local.loss is None else {"loss": local.loss}
        return {"delta": delta, "weight": weight, **loss}, local.memory

    def reply(to: Message, cast: Tree, one: Tree) -> Message:
        metrics = MetricRecord({weight_key: float(one["weight"])})
        if loss_key is not None:
            metrics[loss_key] = float(one["loss"])
        arrays = _record(tree.map(lambda w, d: w + d, cast["params"], one["delta"]))
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=to)

    def apply(state: Tree, total: Tree, round: int) -> Tree:
        if weighting == "equal":  # whatever a client says
            total = total | {"weight": torch.ones_like(total["weight"])}
        kept = alive(total) & (0 < total["weight"]) & (total["weight"] < torch.inf)
        if not kept.any():
            raise ConfigError(f"none of the round's {len(kept)} replies has a weight above 0", code="nonfinite")
        replies = tree.at(total, kept)
        cast, nodes = broadcast(state), Nodes(len(replies["weight"]))
        flower = copy.deepcopy(made)
        with _alone(name, round + 1):
            restore(flower, state.get("flower", {}))
            asked = _asked(flower, state["params"], round + 1, nodes, mu)
            if any(not torch.equal(x, cast["params"][key]) for key, x in asked[0].items()):
                raise ConfigError("it sends clients other arrays than the model; say so: from_flower(…, ahead=True)")
            messages = [reply(to, cast, tree.at(replies, k)) for k, to in enumerate(asked[1])]
            arrays, _ = flower.aggregate_train(round + 1, messages)
            if arrays is None:
                raise ConfigError(
                    f"it made nothing of {nodes.count} replies; set the plan's quorum to what it needs", code="quorum"
                )
            params = _like(arrays, state["params"])
            carried = changed(flower, made)
        after = {"params": params} | ({"flower": carried} if carried else {})
        if ahead:
            with _alone(name, round + 2):
                after["ahead"] = _asked(flower, params, round + 2, nodes, mu)[0]
        return after

    ours = Strategy(init, apply, report, broadcast, reduce=STACK, needs_loss=loss_key is not None)
    return fedprox(mu, of=ours) if mu else ours


def refuse(strategy: object) -> None:
    """Raise ConfigError for what must not run, however deep it is wrapped."""
    if not isinstance(strategy, theirs.Strategy):
        raise ConfigError(f"a {type(strategy).__name__} is not a flwr.serverapp.strategy.Strategy")
    for name, why in REFUSED.items():
        if isinstance(strategy, BUILT_IN[name]):
            raise ConfigError(f"Flower's {name} is refused: {why}", code="refused")
    for inside in vars(strategy).values():
        if isinstance(inside, theirs.Strategy):
            refuse(inside)


class Nodes:
    """As much of Flower's Grid as a strategy needs to choose whom it asks: the sites that replied, numbered from 1."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, 0

    def get_node_ids(self) -> list[int]:
        """The nodes; ConfigError for a strategy that waits for more."""
        self.asked += 1
        if self.asked > PATIENCE:
            raise ConfigError(
                f"it waits for more than the {self.count} sites that replied; lower its min_available_nodes and "
                "min_train_nodes, and set the plan's quorum to as many",
                code="quorum",
            )
        return list(range(1, self.count + 1))


def _asked(flower: Any, params: Tree, round: int, nodes: Nodes, mu: float) -> tuple[Tree, list[Message]]:
    """What ``flower`` asks of the nodes: the arrays, in the dtypes of ``params``, and its messages by node.

    Raises:
        ConfigError: naming what our clients cannot honour.
    """
    nodes.asked = 0
    messages: list[Message] = list(flower.configure_train(round, _record(params), ConfigRecord(), nodes))
    if (to := sorted(m.metadata.dst_node_id for m in messages)) != nodes.get_node_ids():
        raise ConfigError(f"it asks {len(to)} of {nodes.count} sites; the plan's sites take part in every round")
    first = next(iter(messages[0].content.array_records.values()), None)
    for message in messages:
        content = message.content
        if first is None or len(content.array_records) != 1 or content.metric_records:
            raise ConfigError("it sends clients something else than one ArrayRecord and a configuration")
        if next(iter(content.array_records.values())) != first:
            raise ConfigError("it sends each client other arrays; a round casts one model to all")
        if message.metadata.message_type != "train":
            raise ConfigError(f"it asks for {message.metadata.message_type!r}; our clients know 'train'")
        settings = {key: value for record in content.config_records.values() for key, value in record.items()}
        honoured = {"server-round": round, "proximal-mu": mu}
        for key, value in settings.items():
            if key not in honoured or value != honoured[key]:
                raise ConfigError(f"it tells clients {key} = {value!r:.40}, which ours cannot honour")
    assert first is not None
    return _like(first, params), sorted(messages, key=lambda m: m.metadata.dst_node_id)


def _record(params: Tree) -> ArrayRecord:
    """Parameters in the order of their names: Flower pairs some arrays by place, and a checkpoint does not keep it."""
    return ArrayRecord({name: array(x) for name, x in sorted(tree.flatten(params).items())})


def _like(arrays: ArrayRecord, params: Tree) -> Tree:
    """Flower's arrays as parameters like ``params``: its FedAdam makes float64 of float32."""
    like = tree.flatten(params)
    made = {name: tensor(arrays[name].numpy()) for name in like if name in arrays}
    wrong = [name for name, x in like.items() if name not in made or made[name].shape != x.shape]
    if wrong or len(arrays) != len(like):
        raise ConfigError(f"its arrays are not the model's: {len(arrays)} of {len(like)}, wrong or missing {wrong[:3]}")
    return tree.unflatten({name: made[name].to(like[name]) for name in like})


@contextmanager
def _alone(name: str, round: int) -> Iterator[None]:
    """Run Flower's code so that the same round gives the same again, and that it leaves no trace in the process.

    Raises:
        ConfigError: for whatever it raises, with the strategy's name.
    """
    log, seed = logging.getLogger("flwr"), seeds.number(0, "flower", round)
    where = f"Flower's {name}, round {round}" if round else f"Flower's {name}"
    with _ALONE:
        level, task = log.level, (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
        drawn: tuple[Any, Any, Tensor] = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        try:
            log.setLevel(logging.WARNING)
            TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = 1, 0, 0
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
        except FedtailorError as error:
            raise ConfigError(f"{where}: {error}", code=error.code) from error
        except Exception as error:  # it is somebody else's code
            raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
        finally:
            log.setLevel(level)
            TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = task
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])
            torch.set_rng_state(drawn[2])
