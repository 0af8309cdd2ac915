"""One side of benchmarks/simulation.py: federated averaging by BlazeFL, run by an interpreter that has it.

    python blaze_peer.py MODEL ROUNDS WORKERS        prints the seconds of each round by the clock as JSON, two of warm-up apart

The shape is that of pfl-research's CIFAR-10 benchmark: 50 clients of 50 points, batches of 10, one epoch, SGD 0.1. WORKERS
are threads or processes, one a core, or none: one client after another. All is BlazeFL's own FedAvg, without evaluation.
"""

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ["TQDM_DISABLE"] = "1"

import torch  # noqa: E402
from blazefl.contrib.fedavg import (  # noqa: E402
    FedAvgBaseClientTrainer,
    FedAvgBaseServerHandler,
    FedAvgProcessPoolClientTrainer,
    FedAvgThreadPoolClientTrainer,
)
from blazefl.core import IPCMode  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

sys.path.insert(0, os.path.dirname(__file__))
from peer_rounds import COLD, say  # noqa: E402

CLIENTS, POINTS, BATCH, RATE, SEED = 50, 50, 10, 0.1, 0


class Models:
    """What names a model."""

    def select_model(self, model_name):
        """A new one."""
        from simulation_models import MODELS

        return MODELS[model_name]()


class Clients:
    """Each client's rows."""

    def __init__(self):
        rng = torch.Generator().manual_seed(SEED)
        x = torch.randn(CLIENTS * POINTS, 3, 32, 32, generator=rng)
        y = torch.randint(2, (CLIENTS * POINTS,), generator=rng)
        self.parts = [TensorDataset(*part) for part in zip(x.split(POINTS), y.split(POINTS), strict=True)]

    def get_dataset(self, type_, cid):
        """Those of one."""
        return self.parts[cid]

    def set_dataset(self, type_, cid, dataset):
        """They stay what they are."""

    def get_dataloader(self, type_, cid, batch_size=None, generator=None):
        """Those of one in batches, in an order of their own."""
        return DataLoader(self.parts[cid], batch_size=batch_size, shuffle=True, generator=generator)


def main(name, rounds, workers, folder):
    """Run and print."""
    torch.set_num_threads(1)
    clients, models, cores = Clients(), Models(), os.cpu_count() or 1
    server = FedAvgBaseServerHandler(
        models, name, clients, global_round=rounds + COLD, num_clients=CLIENTS, sample_ratio=1.0, device="cpu",
        batch_size=BATCH, seed=SEED,
    )  # fmt: skip
    common = {
        "model_selector": models, "model_name": name, "dataset": clients, "device": "cpu", "num_clients": CLIENTS,
        "epochs": 1, "batch_size": BATCH, "lr": RATE, "seed": SEED,
    }  # fmt: skip
    if workers == "none":
        trainer = FedAvgBaseClientTrainer(**common)
    elif workers == "threads":
        trainer = FedAvgThreadPoolClientTrainer(**common, num_parallels=cores)
    else:
        folders = {"share_dir": folder / "share", "state_dir": folder / "state"}
        trainer = FedAvgProcessPoolClientTrainer(
            **common, **folders, num_parallels=cores, ipc_mode=IPCMode.SHARED_MEMORY
        )
    marks = [time.perf_counter()]
    while not server.if_stop():
        trainer.local_process(server.downlink_package(), server.sample_clients())
        for package in trainer.uplink_package():
            server.load(package)
        marks.append(time.perf_counter())
    say(marks)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(own))
