"""The block engine: nothing but the number of clients at once may change, and it may not show."""

import pytest
import torch

from fedtailor import strategies, tree
from fedtailor.simulations.engine import simulate_round, vmapped
from fedtailor.training import clipped, local_train, plain

K, S, B, D = 9, 3, 4, 5


def losses(params, x, y):
    return (torch.tanh(x @ params["w"]) - y).square()


@pytest.fixture
def world():
    rng = torch.Generator().manual_seed(0)
    batches = {
        "x": torch.randn(K, S, B, D, generator=rng),
        "y": torch.randn(K, S, B, generator=rng),
        "live": (torch.rand(K, S, B, generator=rng) < 0.6).float(),
        "scale": torch.rand(K, S, generator=rng),
        "noise": {"w": torch.randn(K, S, D, generator=rng)},
    }
    live = (torch.arange(S) < torch.randint(1, S + 1, (K, 1), generator=rng)).float()
    return {"w": torch.randn(D, generator=rng)}, batches, live, torch.arange(1.0, K + 1)


def rounds(world, strategy, gradient, block, rounds=2):
    params, batches, live, counts = world
    train = local_train(gradient, strategy, lr=0.1)
    state, memory = strategy.init(params), tree.stack([strategy.remember(params)] * K)
    for round in range(rounds):
        state, memory = simulate_round(
            strategy, vmapped(train), state, memory, batches, live, counts, round, block=block
        )
    return state, memory


@pytest.mark.parametrize("gradient", [plain(losses), clipped(losses, 0.3)], ids=["plain", "clipped"])
@pytest.mark.parametrize("block", [1, 2, 4, 9, 1000])
def test_the_block_does_not_show(world, gradient, block):
    expected = rounds(world, strategies.scaffold(population=K), gradient, block=3)
    found = rounds(world, strategies.scaffold(population=K), gradient, block)
    for a, b in zip(expected, found, strict=True):
        for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_it_is_a_loop_over_clients(world):
    params, batches, live, counts = world
    strategy = strategies.fedavg()
    train = local_train(plain(losses), strategy, lr=0.1)
    total = sum(
        train({"params": params}, {}, tree.at(batches, k), live[k], counts[k])[0]["delta"]["w"].double()
        for k in range(K)
    )
    state, _ = rounds(world, strategy, plain(losses), block=4, rounds=1)
    torch.testing.assert_close(state["params"]["w"], params["w"] + (total / counts.sum()).float())


def test_memories_stay_with_their_clients(world):
    params, batches, live, counts = world
    strategy = strategies.scaffold(population=K)
    _, memory = rounds(world, strategy, plain(losses), block=2)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    shuffled = (params, tree.map(lambda x: x[order], batches), live[order], counts[order])
    _, other = rounds(shuffled, strategy, plain(losses), block=2)
    torch.testing.assert_close(other["control"]["w"], memory["control"]["w"][order])


def test_a_client_without_steps_says_nothing_new(world):
    """Its change is zero, and it counts with its weight."""
    params, batches, live, counts = world
    live = live.clone()
    live[0] = 0
    found, _ = rounds((params, batches, live, counts), strategies.fedavg(), plain(losses), block=4, rounds=1)
    rest = (params, tree.at(batches, slice(1, None)), live[1:], counts[1:])
    train = local_train(plain(losses), strategies.fedavg(), lr=0.1)
    other, _ = simulate_round(strategies.fedavg(), vmapped(train), {"params": params}, {}, *rest[1:], 0)
    moved, without = found["params"]["w"] - params["w"], other["params"]["w"] - params["w"]
    torch.testing.assert_close(moved * counts.sum(), without * counts[1:].sum())


def test_a_round_without_clients_is_refused(world):
    params, batches, live, counts = world
    none = (params, tree.at(batches, slice(0, 0)), live[:0], counts[:0])
    strategy = strategies.fedavg()
    with pytest.raises(ValueError, match="at least one"):
        simulate_round(
            strategy, vmapped(local_train(plain(losses), strategy, 0.1)), {"params": params}, {}, *none[1:], 0
        )


FULL = ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9"]  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [*map(RuntimeError, FULL), MemoryError(), torch.OutOfMemoryError("of a GPU")],
    ids=[*FULL, "MemoryError", "of a GPU"],
)
def test_a_block_that_does_not_fit_is_halved_and_so_are_the_next(world, error):
    params, batches, live, counts = world
    strategy = strategies.scaffold(population=K)
    inner, sizes, told = vmapped(local_train(plain(losses), strategy, lr=0.1)), [], []

    def many(cast, memory, batches, live, counts):
        sizes.append(len(live))
        if len(live) > 2:
            raise error
        return inner(cast, memory, batches, live, counts)

    state, memory = strategy.init(params), tree.stack([strategy.remember(params)] * K)
    found = simulate_round(strategy, many, state, memory, batches, live, counts, 0, 1000, smaller=told.append)
    assert sizes == [9, 4, 2, 2, 2, 2, 1] and told == [4, 2]
    for x, y in zip(
        map(tree.flatten, found), map(tree.flatten, rounds(world, strategy, plain(losses), 3, 1)), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "error,block", [(ValueError("no"), 4), (RuntimeError("shape mismatch"), 4), (MemoryError(), 1)]
)
def test_any_other_error_is_told_and_one_client_must_fit(world, error, block):
    def many(*given):
        raise error

    params, batches, live, counts = world
    with pytest.raises(type(error)):
        simulate_round(strategies.fedavg(), many, {"params": params}, {}, batches, live, counts, 0, block)
