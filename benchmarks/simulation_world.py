"""The clients of benchmarks/simulation.py, and a round of them: by the simulator, by plain PyTorch and by Opacus."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.simulation_models import MODELS
from benchmarks.turns import Run
from fedtailor import recipe as recipes
from fedtailor import strategies, tree
from fedtailor.config import Steps
from fedtailor.recipe import Dataset, Part, Recipe
from fedtailor.simulations.clients import Fed, sites
from fedtailor.simulations.compiled import replay_of
from fedtailor.simulations.engine import simulate_round
from fedtailor.simulations.feed import Feed
from fedtailor.simulations.noise import seeded
from fedtailor.simulations.paths import Round, Task, choose
from fedtailor.simulations.setting import turn
from fedtailor.simulations.spanned import SMALL
from fedtailor.simulations.traffic import counting
from fedtailor.study import LocalTraining, Plan, RecordPrivacy, Spec
from fedtailor.tree import Params

BATCH, LR = 10, 0.1
ORDERS = 8  # of a client's rows, one after another
SHAPES = {"tabular": (30,), "lora": (32, 64)}  # of an example; else an image


class World:
    """Clients with data of their own, as a simulation has them.

    Args:
        clients: of a round.
        steps: of a local epoch.
        times: how many of these clients there are to a round's place; with more than one, every round has others.
    """

    def __init__(self, model: str, clients: int, steps: int, epochs: int = 1, times: int = 1) -> None:
        torch.manual_seed(0)
        self.make, self.clients, self.steps = MODELS[model], clients, steps * epochs
        mine = steps * BATCH
        count = times * clients * mine
        self.data = Part(torch.randn(count, *SHAPES.get(model, (3, 32, 32))), torch.randint(2, (count,)))
        self.recipe = Recipe(model, None, self._model, _losses, None)  # type: ignore[arg-type]
        self.start = recipes.initial(self.recipe, 0)
        own = torch.arange(count).view(times, clients, mine)  # as a simulation packs them
        self.rounds = [_shuffled(own[round % times], epochs).view(clients, -1, BATCH) for round in range(ORDERS)]
        self.rows = self.rounds[0]

    def _model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # so that what is frozen is the same in every copy
            return self.make()

    def ours(
        self, clip: float | None = None, noise: float | None = None, path: str = "auto", steps: Steps = "plain"
    ) -> Run:
        """A round by the simulator, of batches that are there already; each round's have an order of their own."""
        batches = {
            "live": torch.ones(self.rows.shape),
            "scale": torch.full((self.clients, self.steps), 1 / BATCH),
        }
        if noise is not None:
            batches["noise_seed"] = torch.randint(2**62, (self.clients,))
        live, counts = torch.ones(self.clients, self.steps), torch.full((self.clients,), float(self.steps * BATCH))

        def fed(round: int) -> Fed:
            return Fed({"rows": self.rounds[round % ORDERS], **batches}, live, counts)

        return self._simulated(fed, clip, noise, path, steps)

    def whole(self, clip: float, noise: float) -> Run:
        """A round by the simulator from the plan on: each client's Poisson samples, training, what leaves, next model.

        Clients are a study's sites, whose rows the recipe has prepared.
        """
        plan, mine = self._plan(clip, noise), self.steps * BATCH
        parts = zip(self.data.x.chunk(self.clients), self.data.y.chunk(self.clients), strict=True)
        nothing = Part(self.data.x[:0], self.data.y[:0])
        data = {name: Dataset(Part(*one), nothing, "", mine) for name, one in zip(plan.sites, parts, strict=True)}
        now = partial(turn, plan, plan)
        there = sites(plan, now, data, torch.ones(self.clients, self.steps))
        keep, _ = counting(plan, strategies.fedavg(), self.start, None, lambda round: now(round).sites)
        return self._simulated(lambda round: there.fed(round, there.asked(round)), clip, noise, keep=keep)

    def _plan(self, clip: float, noise: float) -> Plan:
        return Plan(
            study="benchmark",
            rounds=1,
            sites=tuple(f"client-{k}" for k in range(self.clients)),
            quorum=1,
            deadline_s=1,
            local=LocalTraining(steps=self.steps, rate=1 / self.steps, lr=LR),
            strategy=Spec(_target_="fedtailor.strategies.fedavg"),
            recipe=Spec(_target_="benchmarks"),  # this one's, which is no plug-in
            privacy=RecordPrivacy(epsilon=1, delta=1e-5, clip=clip, noise_multiplier=noise / clip),
        )

    def _simulated(
        self,
        fed: Callable[[int], Fed],
        clip: float | None,
        noise: float | None,
        path: str = "auto",
        steps: Steps = "plain",
        **how: Any,
    ) -> Run:
        """Rounds 0, 1, 2 and so on of what ``fed`` says, each from the same model, trained as a simulation trains."""
        strategy = strategies.fedavg()
        feed = Feed(self.data, None if noise is None else seeded(self.start, noise), self.start)
        state, rounds = strategy.init(self.start), itertools.count()
        replay = replay_of(steps, torch.device("cpu"), feed, print)
        together = self.clients * sum(p.numel() for p in self.start.values()) >= SMALL
        task = Task(self.recipe, strategy, LR, clip, feed, 64, together, replay=replay)
        way = choose(path, task, Round(strategy.broadcast(state), {}, *fed(0)))  # type: ignore[arg-type]

        def run() -> None:
            round = next(rounds)
            simulate_round(strategy, way.many, state, {}, *fed(round), round, way.block, **how)

        return run

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

    def opacus(self, clip: float, noise: float, anew: bool, draws: bool = False) -> Run:
        """A round of Opacus, one client after another: each with a module of its own, or all with the same.

        Args:
            draws: whether each client draws Poisson samples of its rows, by Opacus's own sampler; its rows are then taken
                by their numbers, which costs less than a DataLoader does.
        """
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
                for rows in _sampled(client) if draws else client:
                    optimizer.zero_grad()
                    cross_entropy(module(self.data.x[rows]), self.data.y[rows]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                _add(total, module._module, self.start)

        return run


def _shuffled(rows: Tensor, times: int) -> Tensor:
    """Each client's ``rows [K, N]`` so many times, in an order of its own each time: ``[K, times * N]``."""
    return torch.cat([rows.gather(1, torch.rand(rows.shape).argsort(1)) for _ in range(times)], 1)


def _losses(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs, y, reduction="none")


def _sampled(client: Tensor) -> Iterator[Tensor]:
    """A client's batches ``[S, B]``, each drawn anew of all its rows."""
    rows, steps = client.flatten(), len(client)
    for some in UniformWithReplacementSampler(num_samples=len(rows), sample_rate=1 / steps, steps=steps):
        yield rows[some]


def _load(module: nn.Module, params: Params) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(params[name])


def _add(total: Params, module: nn.Module, start: Params) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            total[name] += p - start[name]
