"""Our ServerApp and ClientApp under Flower's own runtime: the same study, the same parameters."""

import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Context, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file

from fedtailor.client.app import app as client
from fedtailor.config import Experiment, build, load
from fedtailor.errors import ConfigError
from fedtailor.server.app import run
from fedtailor.simulations.run import simulate
from fedtailor.tree import norm

DESCRIPTOR = Path(__file__).parents[2] / "app" / "pyproject.toml"


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """What Flower's runtime sets before it calls an app."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class LocalGrid:
    """A Flower Grid whose nodes run the ClientApp where they stand, each with a Context of its own."""

    def __init__(self, nodes):
        self.contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in range(1, nodes + 1)}
        self.replies = {}

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            node, ids = message.metadata.dst_node_id, [*ids, f"m{len(self.replies)}"]
            asked = Metadata(1, ids[-1], 1, node, "", "", 0.0, 3600.0, "train")
            reply = client(make_message(asked, message.content), self.contexts[node])
            self.replies[ids[-1]] = SimpleNamespace(
                content=reply.content,
                has_error=reply.has_error,
                metadata=SimpleNamespace(reply_to_message_id=ids[-1]),
            )
        return ids

    def pull_messages(self, ids):
        return [self.replies[i] for i in ids]


def test_the_descriptor_names_apps_that_are_there_and_nothing_to_install():
    flower = tomllib.loads(DESCRIPTOR.read_text())
    components = flower["tool"]["flwr"]["app"]["components"]
    for name, kind in (("serverapp", ServerApp), ("clientapp", ClientApp)):
        module, _, attribute = components[name].partition(":")
        assert isinstance(getattr(import_module(module), attribute), kind)
    assert [d.partition(">")[0] for d in flower["project"]["dependencies"]] == ["flwr"], "more would be installed"
    assert [path.name for path in DESCRIPTOR.parent.iterdir() if path.name != "__pycache__"] == ["pyproject.toml"]


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "quantise"])
def test_flowers_runtime_gives_the_simulators_parameters(tmp_path, strategy):
    experiment = load(["study=heart", "privacy=none", "rounds=3", f"strategy={strategy}"])
    result = run(LocalGrid(4), experiment, tmp_path)
    simulated, params = simulate(experiment.plan, build(experiment.simulation.data, dict))
    deployed = load_file(tmp_path / "model.safetensors")
    assert norm({name: deployed[name] - params[name] for name in params}) < 1e-5
    assert result.metrics["federated"] == pytest.approx(simulated.metrics["federated"], rel=1e-4)
    assert result.transport is None and result.engine == "flwr run" and result.privacy is None


SITE = {"unit": "site", "epsilon": 8.0, "delta": 1e-5, "clip": 0.05}
UNITS = {
    "fixed": SITE | {"noise_multiplier": 1e-6},
    "adaptive": SITE | {"noise_multiplier": 1e-6, "adaptive": {"lr": 1.0, "count_noise": 1e-6}},
    "in turns": SITE | {"noise_multiplier": 1e-6, "correlated": {"separation": 2, "window": 2}},
}


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
@pytest.mark.parametrize("unit", UNITS)
def test_flowers_runtime_gives_the_simulators_parameters_where_a_site_is_private(tmp_path, unit, strategy):
    """With next to no noise, which is secret here and seeded there; clips, divisors and turns are the same."""
    plan, simulation = load(["study=heart", "privacy=none", "rounds=3", "quorum=2", f"strategy={strategy}"])
    plan = plan.model_validate(plan.model_dump(by_alias=True) | {"privacy": UNITS[unit]})
    result = run(LocalGrid(4), Experiment(plan, simulation), tmp_path)
    simulated, params = simulate(plan, build(simulation.data, dict))
    deployed = load_file(tmp_path / "model.safetensors")
    assert norm({name: deployed[name] - params[name] for name in params}) < 1e-5
    assert norm(params) > 0.01
    assert result.metrics["federated"] == pytest.approx(simulated.metrics["federated"], rel=1e-4)
    assert result.privacy == simulated.privacy and result.privacy.unit == "site"
    assert {len(h["sites"]) for h in result.history[:-1]} == ({2} if unit == "in turns" else {4})
    assert [set(h["sites"]) for h in result.history] == [set(h["sites"]) for h in simulated.history]


def test_a_private_study_states_its_cost(tmp_path):
    result = run(LocalGrid(4), load(["study=heart", "rounds=2"]), tmp_path)
    assert 2.5 < result.privacy.epsilon_max <= 3


def test_sites_that_fail_end_the_run(tmp_path):
    experiment = load(["study=heart", "privacy=none", "rounds=1", "quorum=4"])
    grid = LocalGrid(4)
    grid.pull_messages = lambda ids: [
        SimpleNamespace(
            has_error=lambda: True,
            error=SimpleNamespace(reason="no data"),
            metadata=SimpleNamespace(reply_to_message_id=i),
        )
        for i in ids
    ]
    with pytest.raises(ConfigError, match="quorum"):
        run(grid, experiment, tmp_path)


def test_rounds_that_do_not_wait_for_all_are_refused_before_anything_is_asked(tmp_path):
    experiment = load(["study=heart", "privacy=none", "quorum=2", "buffer={answers: 2}"])
    with pytest.raises(ConfigError, match="buffer=null, or a deployment"):
        run(None, experiment, tmp_path)
    assert list(tmp_path.iterdir()) == []
