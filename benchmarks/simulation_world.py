"""The clients of benchmarks/simulation.py, and a round of them: by the simulator, by plain PyTorch and by Opacus."""

from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.simulation_models import MODELS
from fedtailor import recipe as recipes
from fedtailor import strategies, tree
from fedtailor.config import Steps
from fedtailor.recipe import Part, Recipe
from fedtailor.simulations.compiled import replay_of
from fedtailor.simulations.engine import simulate_round
from fedtailor.simulations.feed import Feed
from fedtailor.simulations.noise import seeded
from fedtailor.simulations.paths import Round, Task, choose
from fedtailor.tree import Params

BATCH, LR = 10, 0.1
SHAPES = {"tabular": (30,), "lora": (32, 64)}  # of an example; else an image
Run = Callable[[], None]


class World:
    """Clients with data of their own, as a simulation has them."""

    def __init__(self, model: str, clients: int, steps: int) -> None:
        torch.manual_seed(0)
        self.make, self.clients, self.steps = MODELS[model], clients, steps
        count = clients * steps * BATCH
        self.data = Part(torch.randn(count, *SHAPES.get(model, (3, 32, 32))), torch.randint(2, (count,)))
        self.recipe = Recipe(model, None, self._model, _losses, None)  # type: ignore[arg-type]
        self.start = recipes.initial(self.recipe, 0)
        self.rows = torch.randperm(count).view(clients, steps, BATCH)

    def _model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # so that what is frozen is the same in every copy
            return self.make()

    def ours(
        self, clip: float | None = None, noise: float | None = None, path: str = "auto", steps: Steps = "plain"
    ) -> Run:
        """A round by the simulator."""
        strategy = strategies.fedavg()
        feed = Feed(self.data, None if noise is None else seeded(self.start, noise), self.start)
        batches = {
            "rows": self.rows,
            "live": torch.ones(self.rows.shape),
            "scale": torch.full((self.clients, self.steps), 1 / BATCH),
        }
        if noise is not None:
            batches["noise_seed"] = torch.randint(2**62, (self.clients,))
        live, counts = torch.ones(self.clients, self.steps), torch.full((self.clients,), float(self.steps * BATCH))
        state = strategy.init(self.start)
        replay = replay_of(steps, torch.device("cpu"), feed, print)
        task = Task(self.recipe, strategy, LR, clip, feed, 64, together=True, replay=replay)
        way = choose(path, task, Round(strategy.broadcast(state), {}, batches, live, counts))  # type: ignore[arg-type]
        return lambda: _none(simulate_round(strategy, way.many, state, {}, batches, live, counts, 0, block=way.block))

    def loop(self) -> Run:
        """A round of plain PyTorch: one module, one client after another."""

        def run() -> None:
            module, total = self._model(), tree.map(torch.zeros_like, self.start)
            for client in self.rows:
                _load(module, self.start)
                optimizer = torch.optim.SGD(module.parameters(), LR)
                for rows in client:
                    optimizer.zero_grad()
                    cross_entropy(module(self.data.x[rows]), self.data.y[rows]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                _add(total, module, self.start)

        return run

    def opacus(self, clip: float, noise: float, anew: bool) -> Run:
        """A round of Opacus, one client after another: each with a module of its own, or all with the same."""
        kept = GradSampleModule(self._model())

        def run() -> None:
            total = tree.map(torch.zeros_like, self.start)
            for client in self.rows:
                module = GradSampleModule(self._model()) if anew else kept
                _load(module._module, self.start)
                optimizer = DPOptimizer(
                    torch.optim.SGD(module.parameters(), LR),
                    noise_multiplier=noise / clip,
                    max_grad_norm=clip,
                    expected_batch_size=BATCH,
                )
                for rows in client:
                    optimizer.zero_grad()
                    cross_entropy(module(self.data.x[rows]), self.data.y[rows]).backward()
                    optimizer.step()
                _add(total, module._module, self.start)

        return run


def _losses(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs, y, reduction="none")


def _none(value: object) -> None:
    return None


def _load(module: nn.Module, params: Params) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(params[name])


def _add(total: Params, module: nn.Module, start: Params) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            total[name] += p - start[name]
