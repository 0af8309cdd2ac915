"""One side of benchmarks/simulation.py: federated averaging by pfl-research, run by an interpreter that has it.

    python pfl_peer.py MODEL ROUNDS [BY] [EPOCHS]        prints the seconds of each round as JSON, two of warm-up apart

Seconds are those of its processor, or BY is clock. Several processes, as `torch.distributed.run` starts them, share the
clients.

The shape is that of pfl-research's CIFAR-10 benchmark: 50 clients of 50 points, batches of 10, one epoch, SGD 0.1.
"""

import asyncio
import os
import sys
import time
import types
import warnings

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

CLIENTS, POINTS, BATCH, RATE = 50, 50, 10, 0.1


def main(name: str, rounds: int, by: str = "processor", epochs: str = "1") -> None:
    """Run and print."""
    now = time.perf_counter if by == "clock" else time.process_time
    torch.manual_seed(0)
    np.random.seed(0)
    asyncio.set_event_loop(asyncio.new_event_loop())  # pfl asks for one
    from peer_rounds import COLD, say
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByUser
    from pfl.algorithm import FederatedAveraging, NNAlgorithmParams
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.internal.ops.pytorch_ops import to_tensor
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel
    from simulation_models import MODELS

    rng = np.random.default_rng(0)
    count = CLIENTS * POINTS
    x = to_tensor(rng.standard_normal((count, 3, 32, 32), dtype=np.float32))
    y = to_tensor(rng.integers(0, 2, count)).long()
    users = {u: (x[u * POINTS : (u + 1) * POINTS], y[u * POINTS : (u + 1) * POINTS]) for u in range(CLIENTS)}
    data = FederatedDataset.from_slices(users, get_user_sampler("random", range(CLIENTS)))
    net = MODELS[name]()
    net.loss = types.MethodType(lambda self, inputs, targets, eval=False: cross_entropy(self(inputs), targets), net)
    net.metrics = types.MethodType(lambda self, inputs, targets, eval=True: {}, net)
    marks = []

    class Clock(TrainingProcessCallback):
        def on_train_begin(self, *, model):
            marks.append(now())
            return Metrics()

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            marks.append(now())
            return False, Metrics()

    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds + COLD,
            evaluation_frequency=10**9,
            train_cohort_size=CLIENTS,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByUser()]),
        model=PyTorchModel(
            model=net, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(net.parameters(), 1.0)
        ),
        model_train_params=NNTrainHyperParams(
            local_learning_rate=RATE, local_num_epochs=int(epochs), local_batch_size=BATCH
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=BATCH),
        callbacks=[Clock()],
        send_metrics_to_platform=False,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        say(marks)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
