"""A site: a few steps of local SGD on its own patients, or, for a model by size, an update that costs no time."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear

STEPS, RATE, LR = 2, 0.3, 0.5  # as configs/study/heart.yaml
app = ClientApp()


def load(context: Context) -> dict[str, Tensor]:
    """This site's prepared patients: ``train_x [N, D]``, ``train_y [N]``, ``test_x``, ``test_y``."""
    return load_file(Path(str(context.run_config["data"])) / f"site{context.node_config['partition-id']}.safetensors")


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training."""
    params = dict(message.content["arrays"].to_torch_state_dict())
    rows = 1
    if context.run_config["parameters"]:
        shift = 1e-3 * (1 + int(context.node_config["partition-id"]))  # differs by site: nothing is stored only once
        params = {name: value + shift for name, value in params.items()}
    else:
        data = load(context)
        rows = len(data["train_y"])
        params = {name: value.requires_grad_() for name, value in params.items()}
        for _ in range(STEPS):
            drawn = torch.rand(rows) < RATE
            outputs = linear(data["train_x"][drawn], params["weight"], params["bias"])[:, 0]
            loss = binary_cross_entropy_with_logits(outputs, data["train_y"][drawn], reduction="sum") / (RATE * rows)
            grads = torch.autograd.grad(loss, list(params.values()))
            with torch.no_grad():
                for value, grad in zip(params.values(), grads, strict=True):
                    value -= LR * grad
        params = {name: value.detach() for name, value in params.items()}
    content = RecordDict({"arrays": ArrayRecord(params), "metrics": MetricRecord({"num-examples": rows})})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Accuracy on the held-out patients; for a model by size the arrays are read and nothing is computed."""
    params = message.content["arrays"].to_torch_state_dict()
    metrics: dict[str, float] = {"num-examples": 1}
    if not context.run_config["parameters"]:
        data = load(context)
        outputs = linear(data["test_x"], params["weight"], params["bias"])[:, 0]
        right = ((outputs > 0) == (data["test_y"] > 0)).float().mean()
        metrics = {"num-examples": len(data["test_y"]), "accuracy": float(right)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
