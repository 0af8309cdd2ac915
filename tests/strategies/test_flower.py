"""Flower's own strategies in our rounds: each against ours, what resumes, what is refused and why."""

import inspect
from typing import Any

import pytest
import torch
from flwr.serverapp import strategy as theirs
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from fedtailor import Strategy, tree
from fedtailor import strategies as ours
from fedtailor.config import build, load
from fedtailor.datasets import heart_disease
from fedtailor.errors import ConfigError
from fedtailor.privacy.planning import resolve
from fedtailor.simulations.run import simulate
from fedtailor.strategies.flower import flower
from fedtailor.strategies.flower_adapter import BUILT_IN, from_flower
from fedtailor.tree import Tree

ROWS = [3.0, 10.0, 40.0, 7.0, 5.0, 21.0, 2.0]
LOSSES = [0.5, 1.0, 4.0, 0.1, 2.0, 0.7, 1.1]
KINDS = {name: kind for name, kind in BUILT_IN.items() if not inspect.isabstract(kind)}
NEEDS: dict[str, dict[str, Any]] = {
    "FedAdam": {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.9, "tau": 0.01},
    "FedYogi": {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.9, "tau": 0.01},
    "FedAdagrad": {"eta": 0.1, "tau": 0.01},
    "FedAvgM": {"server_learning_rate": 0.7, "server_momentum": 0.9},
    "FedProx": {"proximal_mu": 0.3},
    "QFedAvg": {"client_learning_rate": 0.1, "q": 0.5},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 2},
    "MultiKrum": {"num_malicious_nodes": 2, "num_nodes_to_select": 4},
    "Bulyan": {"num_malicious_nodes": 1},
}
REFUSED = {
    "DifferentialPrivacyServerSideFixedClipping": r"taken for private.* seeded.*private\(\)",
    "DifferentialPrivacyServerSideAdaptiveClipping": r"taken for private.* seeded.*private\(\)",
    "DifferentialPrivacyClientSideFixedClipping": r"nothing is clipped.*private\(\)",
    "DifferentialPrivacyClientSideAdaptiveClipping": r"nothing is clipped.*private\(\)",
    "FedXgbBagging": "XGBoost booster",
    "FedXgbCyclic": "XGBoost booster",
}
STATEFUL = {"FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "QFedAvg"}


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Flower's QFedAvg and Bulyan collect garbage for every reply, which takes longer than the round."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def run(strategy: Strategy, start: Tree, around: Any, step: Any, rounds: range = range(3), state: Any = None) -> Tree:
    state = strategy.init(start) if state is None else state
    for round in rounds:
        state = step(strategy, state, around(start, 7, round, rows=ROWS), round, losses=LOSSES)
    return state


@pytest.mark.parametrize("name", KINDS)
def test_every_strategy_of_flower_runs_or_is_refused_and_says_why(name, start, around, step):
    if name in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[name]):
            flower(name)
        return
    strategy = flower(name, NEEDS.get(name))
    state = run(strategy, start, around, step)
    assert tree.norm(tree.map(torch.sub, state["params"], start)) > 0.01
    assert all(tree.finite(x) for x in tree.leaves(state))
    assert ("flower" in state) == (name in STATEFUL)
    assert strategy.needs_loss == (name == "QFedAvg")


def test_flower_has_no_strategy_that_is_not_listed():
    """A new one must be tried before it is offered."""
    tried = {"FedAvg", "FedMedian"} | NEEDS.keys() | REFUSED.keys()
    assert KINDS.keys() == tried


def without_tau_squared(strategy: Strategy) -> Strategy:
    """Flower starts the second moment at 0; the paper asks for at least tau^2."""
    return strategy._replace(init=lambda p: strategy.init(p) | {"v": tree.map(torch.zeros_like, p)})


def rate(round: int) -> float:
    """Flower's FedAdam corrects the bias, with an exponent one too high, as if each round were the next."""
    n = round + 2
    return float(0.1 * (1 - 0.9**n) ** 0.5 / (1 - 0.9**n))


def adam() -> Strategy:
    each = [ours.fedadam(rate(round), beta1=0.9, beta2=0.9, tau=0.01) for round in range(3)]
    return each[0]._replace(apply=lambda state, total, round: each[round].apply(state, total, round))


MATES: dict[str, tuple[Strategy, str]] = {
    "FedAvg": (ours.fedavg(), "examples"),
    "FedAvgM": (ours.fedavgm(0.7, 0.9), "examples"),
    "FedAdam": (without_tau_squared(adam()), "examples"),
    "FedYogi": (without_tau_squared(ours.fedyogi(0.1, 0.9, 0.9, 0.01)), "examples"),
    "FedAdagrad": (without_tau_squared(ours.fedadagrad(0.1, 0.0, 0.01)), "examples"),
    "FedProx": (ours.fedavg(), "examples"),  # the pull is the client's: see below
    "FedMedian": (ours.median(), "examples"),
    "FedTrimmedAvg": (ours.trimmed_mean(attackers=1), "examples"),
    "Krum": (ours.krum(attackers=2), "examples"),
    "MultiKrum": (ours.multi_krum(attackers=2, keep=4), "equal"),
    "Bulyan": (ours.bulyan(attackers=1), "examples"),
    "QFedAvg": (ours.qfedavg(q=0.5), "examples"),
}


@pytest.mark.parametrize("name", MATES)
def test_three_rounds_are_those_of_our_own(name, start, around, step):
    mate, weighting = MATES[name]
    made = run(flower(name, NEEDS.get(name), weighting=weighting), start, around, step)["params"]
    torch.testing.assert_close(made, run(mate, start, around, step)["params"], rtol=0, atol=1e-6)


def test_every_built_in_that_runs_has_a_mate():
    assert MATES.keys() | REFUSED.keys() == KINDS.keys()


def saved(state: Tree) -> Tree:
    """A state that went through a file, which does not keep the order of keys."""
    flat = {name: x.clone() for name, x in tree.flatten(state).items()}
    return tree.unflatten(dict(sorted(from_bytes(to_bytes(flat)).items())))


@pytest.mark.parametrize("name", sorted(KINDS.keys() - REFUSED.keys()))
def test_a_run_resumes_from_a_file_with_another_object(name, start, around, step):
    start = start | {f"{i}.w": torch.full((2,), float(i)) for i in range(12)}  # their order is not that of numbers
    strategy = flower(name, NEEDS.get(name))
    middle = run(strategy, start, around, step, range(2))
    through = run(strategy, start, around, step, range(2, 4), middle)
    again = run(flower(name, NEEDS.get(name)), start, around, step, range(2, 4), saved(middle))
    one, other = tree.flatten(through), tree.flatten(again)
    assert one.keys() == other.keys()
    assert all(torch.equal(x, other[path]) for path, x in one.items())


@pytest.mark.parametrize("name", sorted(STATEFUL - {"QFedAvg"}))
def test_a_state_without_what_flower_remembers_is_another(name, start, around, step):
    strategy = flower(name, NEEDS[name])
    middle = run(strategy, start, around, step, range(2))
    forgot = run(strategy, start, around, step, range(2, 3), {"params": middle["params"]})
    assert not torch.allclose(forgot["params"]["w"], run(strategy, start, around, step)["params"]["w"])


def test_one_object_serves_many_runs_and_is_never_changed(start, around, step):
    mine = theirs.FedAvgM(server_momentum=0.9)
    strategy = from_flower(mine)
    ends = [run(strategy, start, around, step)["params"] for _ in range(2)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    assert mine.current_arrays is None and mine.momentum_vector is None
    mine.server_momentum = 0.0  # nor does it hear of changes
    assert torch.equal(run(strategy, start, around, step)["params"]["w"], ends[0]["w"])


def test_the_proximal_term_is_honoured_by_our_clients():
    strategy = flower("FedProx", {"proximal_mu": 0.5})
    grads = strategy.correct({"w": torch.ones(2)}, {"w": torch.full((2,), 3.0)}, {"params": {"w": torch.ones(2)}}, {})
    assert grads["w"].tolist() == [2.0, 2.0]  # 1 + 0.5 * (3 - 1)


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_a_clients_own_count_decides_its_share_unless_all_are_equal(weighting, start, around, step):
    strategy = flower("FedAvg", weighting=weighting)
    total = {"delta": {"w": torch.tensor([[0.0], [1.0]])}, "weight": torch.tensor([1.0, 3.0])}
    state = {"params": {"w": torch.zeros(1)}}
    assert strategy.apply(state, total, 0)["params"]["w"].item() == (0.75 if weighting == "examples" else 0.5)
    for lie in (
        0.0,
        -1.0,
        float("nan"),
        float("inf"),
    ):  # a weight that is none: the reply is left out, or counts as one
        total["weight"] = torch.tensor([1.0, lie])
        assert strategy.apply(state, total, 0)["params"]["w"].item() == (0.0 if weighting == "examples" else 0.5)
    if weighting == "examples":
        total["weight"] = torch.tensor([0.0, -1.0])
        with pytest.raises(ConfigError, match="none of the round's 2 replies has a weight above 0"):
            strategy.apply(state, total, 0)


@pytest.mark.parametrize(
    ("algorithm", "arguments", "words"),
    [
        ("FedAdm", {}, "did you mean 'FedAdam'"),
        ("Strategy", {}, "Flower has no 'Strategy'"),
        ("FedAdam", {"etta": 1}, "did you mean 'eta'"),
        ("FedAdam", {"eta": "fast"}, "FedAdam: eta: .*got 'fast'"),
        ("FedAdam", {"eta": float("nan")}, "FedAdam: eta: .*finite"),
        ("FedAvg", {"eta": 1}, "FedAvg: there is no 'eta'; it takes none"),
        ("FedAvg", {"fraction_train": 0.5}, "fraction_train: the plan's sites and quorum"),
        ("FedAvg", {"train_metrics_aggr_fn": "print"}, "train_metrics_aggr_fn is a function"),
        ("Bulyan", {"selection_rule": "print"}, "selection_rule is a function"),
        ("QFedAvg", {}, "QFedAvg: client_learning_rate must be given"),
        ("FedTrimmedAvg", {"beta": 0.7}, r"FedTrimmedAvg: `beta` must be in the range"),
    ],
)
def test_a_bad_argument_is_named(algorithm, arguments, words):
    with pytest.raises(ConfigError, match=words):
        flower(algorithm, arguments)


def test_what_needs_more_replies_says_so(start, around, step, caplog):
    with pytest.raises(ConfigError, match="Flower's Bulyan, round 1: it made nothing of 7 replies") as caught:
        run(flower("Bulyan", {"num_malicious_nodes": 2}), start, around, step)
    assert caught.value.code == "quorum"


def test_the_training_loss_does_not_leave_under_record_level_privacy():
    plan = ["strategy=flower", "strategy.algorithm=QFedAvg", "strategy.arguments={client_learning_rate: 0.1}"]
    with pytest.raises(ConfigError, match="does not cover"):
        resolve(load([*plan, "privacy=record"]).plan)


def test_a_wrapper_takes_one_by_its_name(start, around, step):
    inside = {"name": "flower", "algorithm": "FedAvgM", "arguments": {"server_momentum": 0.9}}
    plan = load(["strategy=median", f"strategy.of={inside}".replace("'", "")]).plan
    made = run(build(plan.strategy, Strategy), start, around, step)
    mate = run(ours.median(of=ours.fedavgm(momentum=0.9)), start, around, step)
    torch.testing.assert_close(made["params"], mate["params"], rtol=0, atol=1e-6)


def test_a_plan_runs_in_the_simulator_as_our_own_does():
    common = ["study=heart", "privacy=none", "rounds=2", "evaluation.baseline=false"]
    momentum = ["strategy=flower", "strategy.algorithm=FedAvgM", "strategy.arguments={server_momentum: 0.9}"]
    results = [simulate(load([*common, *one]).plan, heart_disease()) for one in (momentum, ["strategy=fedavgm"])]
    (result, params), (_, mate) = results
    assert result.strategy == "flower"
    torch.testing.assert_close(params, mate, rtol=0, atol=1e-5)


def test_records_are_what_flower_promises():
    """What the adapter relies on, and a new flwr must keep."""
    assert {"_run_id", "_node_id", "_task_id"} <= vars(TaskIdentity).keys()
    asked = inspect.signature(theirs.Strategy.configure_train).parameters
    assert list(asked)[1:] == ["server_round", "arrays", "config", "grid"]
    assert list(inspect.signature(theirs.Strategy.aggregate_train).parameters)[1:] == ["server_round", "replies"]
