"""What every strategy keeps, shipped or of an installed plug-in, and its private form: a YAML file inherits it all."""

from pydoc import locate
from typing import get_type_hints

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import torch as files
from seven import K, World, losses
from shipped import PRIVATE, SHIPPED, SPECS, assert_close, copied, fold

from fedtailor import STACK, Strategy, tree
from fedtailor.config import build, load
from fedtailor.errors import ConfigError
from fedtailor.privacy import private
from fedtailor.privacy.planning import resolve
from fedtailor.simulations.engine import simulate_round, vmapped
from fedtailor.strategy import Local, model_in
from fedtailor.study import Spec
from fedtailor.training import local_train, plain
from fedtailor.tree import Tree

FACTORIES = {name: locate(spec.target) for name, spec in SPECS.items()}
ALL = SHIPPED | PRIVATE


def ended(cast: Tree, memory: Tree, params: Tree) -> Local:
    """A client of 9 rows whose 5 steps ended at ``params``."""
    rows, steps, seed, loss = torch.tensor(9.0), torch.tensor(5.0), torch.tensor(7), torch.tensor(0.8)
    return Local(cast, memory, params, rows, steps, 0.05, seed, loss)


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("name", ALL)
def test_folding_replies_one_by_one_is_the_simulation(name: str, block: int) -> None:
    strategy, world = ALL[name], World()
    train = local_train(plain(losses), strategy, 0.05, losses)
    deployed, memories = world.start(strategy)
    simulated, stacked = copied(deployed), tree.stack(memories)
    for round in range(3):
        cast, replies = strategy.broadcast(deployed), {}
        for k in world.order:  # replies arrive in any order
            replies[k], memories[k] = world.reply(strategy, cast, memories[k], k)
        deployed = strategy.apply(deployed, fold(strategy, replies.values()), round)
        simulated, stacked = simulate_round(
            strategy, vmapped(train), simulated, stacked, world.batches, world.live, world.counts, round, block=block
        )
    assert_close(deployed, simulated)
    assert_close(tree.stack(memories), stacked)


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_arrival_does_not_show(name: str) -> None:
    strategy, world = ALL[name], World()
    state, memories = world.start(strategy)
    cast = strategy.broadcast(state)
    replies = [world.reply(strategy, cast, memory, k)[0] for k, memory in enumerate(memories)]
    ends = [
        strategy.apply(copied(state), fold(strategy, [replies[k] for k in order]), 0)
        for order in (range(K), reversed(range(K)), world.order)
    ]
    assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)
    assert_close(ends[0], ends[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_saved_state_gives_the_same_next_round(name: str) -> None:
    strategy, world = ALL[name], World()
    state, memories = world.start(strategy)

    def next_round(state: Tree, round: int) -> Tree:
        cast = strategy.broadcast(state)
        replies = [world.reply(strategy, cast, memory, k)[0] for k, memory in enumerate(memories)]
        return strategy.apply(state, fold(strategy, replies), round)

    state = next_round(state, 0)
    saved = files.save(tree.flatten(copied(state)))
    expected = next_round(state, 1)
    loaded = tree.unflatten(dict(sorted(files.load(saved).items())))  # a file does not keep the order of keys
    assert_close(next_round(loaded, 1), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_functions_are_pure_and_keep_dtypes_and_shapes(name: str) -> None:
    strategy, world = ALL[name], World()
    state, memories = world.start(strategy)
    before, kept, given = copied(state), copied(memories[0]), copied(world.params)
    cast = strategy.broadcast(state)
    summand, memory = world.reply(strategy, cast, memories[0], 0)
    after = strategy.apply(state, fold(strategy, [summand]), 0)
    assert_close(state, before, rtol=0, atol=0)
    assert_close(memories[0], kept, rtol=0, atol=0)
    assert_close(world.params, given, rtol=0, atol=0)
    for old, new in ((before, after), (kept, memory)):
        one, other = tree.flatten(old), tree.flatten(new)
        assert {k: (v.dtype, v.shape) for k, v in one.items()} == {k: (v.dtype, v.shape) for k, v in other.items()}


@pytest.mark.parametrize("name", ALL)
def test_a_cast_holds_the_model(name: str) -> None:
    strategy, world = ALL[name], World()
    assert_close(model_in(strategy.broadcast(strategy.init(world.params))), world.params, rtol=0, atol=0)


@pytest.mark.parametrize("name", SHIPPED)
def test_clients_that_stand_still_leave_the_model_where_it_is(name: str) -> None:
    strategy, world = SHIPPED[name], World()
    state, memories = world.start(strategy)
    cast = strategy.broadcast(state)
    summand, _ = strategy.report(ended(cast, memories[0], strategy.start(cast, memories[0])))
    assert_close(model_in(strategy.broadcast(strategy.apply(state, fold(strategy, [summand] * 3), 0))), world.params)


@pytest.mark.parametrize("name", SHIPPED)
def test_equal_clients_count_as_one(name: str) -> None:
    """The model does not move further because more clients say the same."""
    strategy, world = SHIPPED[name], World()
    state, memories = world.start(strategy)
    summand, _ = world.reply(strategy, strategy.broadcast(state), memories[0], 0)
    one, many = (strategy.apply(copied(state), fold(strategy, [summand] * n), 0)["params"] for n in (1, 5))
    assert_close(one, many)


@pytest.mark.parametrize("name", PRIVATE)
def test_one_client_moves_a_private_sum_by_at_most_the_clip(name: str) -> None:
    strategy, world = PRIVATE[name], World()
    state, memories = world.start(strategy)
    cast = strategy.broadcast(state)
    far = tree.map(lambda p: p + 1e6, strategy.start(cast, memories[0]))
    summand, _ = strategy.report(ended(cast, memories[0], far))
    weight, within = summand.pop("weight"), summand.pop("within", torch.tensor(-0.5))
    assert weight == 1  # a client counts once, whatever it holds
    assert within == -0.5  # it was clipped, and says so in a bit that is centred
    assert 1 - 1e-5 < tree.norm(summand) <= 1


SEE_ALL = [name for name, strategy in SHIPPED.items() if strategy.reduce is STACK]
# Flower's own code weights by what each client says, and runs as it is; tests/strategies/test_flower.py shows both ways.
EQUAL = [name for name in SEE_ALL if (SPECS[name].model_extra or {}).get("weighting") != "examples"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SEE_ALL)
def test_a_reply_that_is_not_finite_does_not_count(name: str, bad: float) -> None:
    """What sees replies one by one must know how to leave one out, wherever it stands."""
    strategy, world = SHIPPED[name], World()
    state, memories = world.start(strategy)
    cast = strategy.broadcast(state)
    replies = [world.reply(strategy, cast, memory, k)[0] for k, memory in enumerate(memories)]
    lie = copied(replies[0])
    lie["delta"]["w"][1] = bad
    expected = strategy.apply(copied(state), fold(strategy, replies), 0)
    for place in (0, 3):
        lied = strategy.apply(copied(state), fold(strategy, [*replies[:place], lie, *replies[place:]]), 0)
        assert_close(lied, expected)
    with pytest.raises(ConfigError, match="none of the round's 2 replies is finite"):
        strategy.apply(state, fold(strategy, [lie, lie]), 0)


@pytest.mark.parametrize("name", EQUAL)
def test_what_a_client_says_of_its_own_weight_does_not_count(name: str) -> None:
    strategy, world = SHIPPED[name], World()
    state, memories = world.start(strategy)
    cast = strategy.broadcast(state)
    replies = [world.reply(strategy, cast, memory, k)[0] for k, memory in enumerate(memories)]
    world.counts[2] *= 1000
    claimed = [world.reply(strategy, cast, memory, k)[0] for k, memory in enumerate(memories)]
    for k, weight in enumerate([0.0, -1.0, 1e9]):
        claimed[k] |= {"weight": torch.tensor(weight)}
    ends = [strategy.apply(copied(state), fold(strategy, some), 0) for some in (replies, claimed)]
    assert_close(ends[0], ends[1])


@pytest.mark.parametrize("name", [name for name in SHIPPED if not SHIPPED[name].reduce.is_sum])
def test_what_is_not_a_sum_cannot_be_made_private(name: str) -> None:
    with pytest.raises(ConfigError, match="only a strategy that sums"):
        private(SHIPPED[name], clip=1.0, noise_multiplier=1.0, cohort=7)


def bad_values() -> list[tuple[str, str, object]]:
    """For each number that a strategy takes: a word, and a value just outside of each bound; a lower one it must have."""
    found: list[tuple[str, str, object]] = []
    for name in SHIPPED:
        for argument, annotation in get_type_hints(FACTORIES[name], include_extras=True).items():
            schema = {} if argument in ("of", "return") else TypeAdapter(annotation).json_schema()
            for kind in schema.get("anyOf", [schema]):
                if kind.get("type") in ("number", "integer"):
                    least = kind["minimum"] - 1 if "minimum" in kind else kind["exclusiveMinimum"]
                    most = [kind["maximum"] + 1] if "maximum" in kind else []
                    found += [(name, argument, value) for value in ("fast", least, *most)]
    return found


def with_arguments(name: str, **arguments: object) -> Spec:
    return Spec.model_validate(SPECS[name].model_dump(by_alias=True) | arguments)


@pytest.mark.parametrize(("name", "argument", "value"), bad_values())
def test_a_bad_argument_is_named(name: str, argument: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: {argument}\b.*{value}"):
        build(with_arguments(name, **{argument: value}), Strategy)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_yaml_file_lists_every_argument(name: str) -> None:
    """So that each can be set without a plus sign, and be read there."""
    listed = (SPECS[name].model_extra or {}).keys()
    assert listed == get_type_hints(FACTORIES[name]).keys() - {"return"}


WRAPPERS = [name for name in SHIPPED if "of" in get_type_hints(FACTORIES[name])]


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_bad_argument_inside_a_wrapper_is_named(name: str) -> None:
    spec = with_arguments(name, of={"name": "fedavg", "server_lr": -1})
    with pytest.raises(ConfigError, match=rf"{name}: of: .*fedavg: server_lr: .*-1"):
        build(spec, Strategy)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_private_strategy_cannot_be_wrapped(name: str) -> None:
    """What a wrapper does to the summand of a private strategy would void the bound that its noise is made for."""
    inside = private(SHIPPED["fedavg"], clip=1.0, noise_multiplier=1.0, cohort=7)
    more = {"mu": 0.1} if name == "fedprox" else {}
    with pytest.raises(ValidationError, match="private already"):
        FACTORIES[name](of=inside, **more)


@pytest.mark.parametrize("name", [name for name in SHIPPED if SHIPPED[name].needs_loss])
def test_a_loss_does_not_leave_under_record_level_privacy(name: str) -> None:
    with pytest.raises(ConfigError, match="does not cover"):
        resolve(load([f"strategy={name}", "privacy=record"]).plan)
    with pytest.raises(ConfigError, match="does not cover"):
        local_train(plain(losses), SHIPPED[name], lr=0.05)


@pytest.mark.parametrize("name", SHIPPED)
def test_an_unknown_argument_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: momentun"):
        build(with_arguments(name, momentun=0.9), Strategy)
