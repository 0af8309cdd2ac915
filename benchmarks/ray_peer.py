"""One side of benchmarks/simulation.py: stock Flower's simulation on Ray, run by an interpreter that has it.

    python ray_peer.py MODEL ROUNDS CORES      prints the seconds of each round by the clock as JSON, two of warm-up apart

The shape is that of pfl-research's CIFAR-10 benchmark: 50 clients of 50 points, batches of 10, one epoch, SGD 0.1. A client
takes so many CORES; Flower's own choice, where it is told nothing, is two. As many clients are trained at once as there are
cores for. MODEL nothing: clients that send back what they were sent.
"""

import os
import sys
import time
from collections import OrderedDict

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_DEDUP_LOGS": "0"}

import torch  # noqa: E402
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

sys.path.insert(0, os.path.dirname(__file__))
from peer_rounds import COLD, say  # noqa: E402

CLIENTS, POINTS, BATCH, RATE = 50, 50, 10, 0.1
NAME, ROUNDS, CORES = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
MARKS: list[float] = []


def net() -> nn.Module:
    """The model, or a small one for clients that do nothing."""
    from simulation_models import MODELS

    return nn.Linear(1, 1) if NAME == "nothing" else MODELS[NAME]()


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Five steps of SGD on data of this client's own."""
    torch.set_num_threads(CORES)
    state = message.content["arrays"].to_torch_state_dict()
    if NAME != "nothing":
        rng = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
        x, y = torch.randn(POINTS, 3, 32, 32, generator=rng), torch.randint(2, (POINTS,), generator=rng)
        module = net()
        module.load_state_dict(state)
        optimizer = torch.optim.SGD(module.parameters(), RATE)
        for rows in torch.randperm(POINTS, generator=rng).view(-1, BATCH):
            optimizer.zero_grad()
            cross_entropy(module(x[rows]), y[rows]).backward()
            optimizer.step()
        state = OrderedDict(module.state_dict())
    found = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": POINTS})}
    return Message(RecordDict(found), reply_to=message)


class Clocked(FedAvg):
    """FedAvg that notes when each round's answers are averaged."""

    def aggregate_train(self, server_round, replies):
        """Average, and look at the clock."""
        done = super().aggregate_train(server_round, replies)
        MARKS.append(time.perf_counter())
        return done


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds of all clients, without evaluation."""
    strategy = Clocked(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    MARKS.append(time.perf_counter())
    strategy.start(grid, ArrayRecord(net().state_dict()), num_rounds=ROUNDS + COLD)


if __name__ == "__main__":
    resources = {"client_resources": {"num_cpus": CORES, "num_gpus": 0.0}, "init_args": {"include_dashboard": False}}
    run_simulation(server, client, CLIENTS, backend_config=resources)
    say(MARKS)
