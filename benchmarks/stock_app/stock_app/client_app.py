"""A site: a few steps of local SGD on its own patients, or, for a model by size, an update that costs no time."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from stock_app.model import heart
from torch import Tensor

from fedtailor import recipe as recipes
from fedtailor.batches import draw, pack
from fedtailor.datasets import heart_disease
from fedtailor.recipe import Dataset
from fedtailor.study import LocalTraining
from fedtailor.training import plain

LOCAL = LocalTraining(steps=2, rate=0.3, lr=0.5)  # as configs/study/heart.yaml
app = ClientApp()


def load(context: Context) -> tuple[str, Dataset]:
    """This site's name and its prepared patients."""
    name, source = list(heart_disease().items())[int(context.node_config["partition-id"])]
    return name, heart().prepare(source.table())


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training."""
    params: dict[str, Tensor] = dict(message.content["arrays"].to_torch_state_dict())
    rows = 1
    if context.run_config["parameters"]:
        step = 1e-3 * (1 + int(context.node_config["partition-id"]))  # differs by site: nothing is stored only once
        params = {name: value + step for name, value in params.items()}
    else:
        name, data = load(context)
        gradient = plain(recipes.losses(heart()))
        mask = draw(LOCAL, len(data.train.y), 0, int(message.content["config"]["server-round"]), name)
        batches = pack(data.train, mask, LOCAL.rate)
        for step in range(LOCAL.steps):
            grads = gradient(params, {key: leaf[step] for key, leaf in batches.items()})
            params = {key: value - LOCAL.lr * grads[key] for key, value in params.items()}
        rows = len(data.train.y)
    content = RecordDict({"arrays": ArrayRecord(params), "metrics": MetricRecord({"num-examples": rows})})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Metrics on the held-out patients."""
    metrics: dict[str, float] = {"num-examples": 1}
    if not context.run_config["parameters"]:
        _, data = load(context)
        params = dict(message.content["arrays"].to_torch_state_dict())
        with torch.no_grad():
            found = recipes.evaluate(heart(), params, data.test)
        metrics = {"num-examples": len(data.test.y), "accuracy": found["accuracy"] or 0.0}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
