"""Folding a round: good answers are summed, one at a time; a bad one is dropped by name and changes nothing."""

import hashlib
import secrets
from functools import partial

import pytest
import torch
from safetensors.torch import save

from fedtailor import packing, strategies, tree, treefile, wire
from fedtailor.config import load
from fedtailor.errors import ConfigError
from fedtailor.leaving import Leaving, Tensor
from fedtailor.server import slicewise
from fedtailor.server.folding import advance, close_round, counted
from fedtailor.server.record import Progress
from fedtailor.server.rounds import Answer
from fedtailor.server.runs import Run
from fedtailor.treefile import TreeFile
from fedtailor.wire import Report, Visit

VISIT = Visit(run="r", round=3, train=True, evaluate=True, baseline=False, plan="{}", cast_sha256="0" * 64)
SUMMAND = {"delta/w": torch.tensor([1.0, 2.0]), "weight": torch.tensor(10.0)}
TENSORS = [Tensor(name="delta/w", dtype="float32", shape=(2,)), Tensor(name="weight", dtype="float32", shape=())]
LEAVES = Leaving(tensors=TENSORS, metrics=("loss",), norm=100.0, bytes=10_000)


def report(**changed):
    salt, digest = secrets.token_hex(32), "0" * 64
    fields = {"run": "r", "round": 3, "rows": 20, "train_rows": 10, "summand_sha256": digest, "salt": salt}
    return Report(**fields | changed)


def stream(tmp_path, *given):
    """Answers as :func:`answers` yields them, each from (site, tensors or bytes, what the report says)."""
    for site, flat, changed in given:
        payload, path = flat if isinstance(flat, bytes) else save(flat), tmp_path / f"{site}.safetensors"
        said = report(**{"summand_sha256": hashlib.sha256(payload).hexdigest()} | changed)
        path.write_bytes(payload)
        yield Answer(site, said, path, None, 100, hashlib.sha256(payload).hexdigest())


def folded(tmp_path, *given, strategy=None, visit=VISIT, leaves=LEAVES):
    told = []
    closed = close_round(strategy or strategies.fedavg(), visit, leaves, stream(tmp_path, *given), told.append)
    assert [a.site for a in told] == [site for site, _, _ in given] and not list(tmp_path.iterdir())
    assert {a.site: a.code for a in told if a.code} == closed.dropped
    return closed._replace(acc=closed.acc.tree()) if isinstance(closed.acc, TreeFile) else closed


TWICE = {name: 2 * x for name, x in SUMMAND.items()}


def test_good_answers_are_summed(tmp_path):
    closed = folded(tmp_path, ("a", SUMMAND, {"rows": 7}), ("b", TWICE, {}))
    assert {k: x.tolist() for k, x in tree.flatten(closed.acc).items()} == {"delta/w": [3.0, 6.0], "weight": 30.0}
    assert closed.reports["a"].rows == 7 and closed.received == {"a": 100, "b": 100} and closed.dropped == {}


BAD = {
    "round": (SUMMAND, {"round": 2}),
    "run": (SUMMAND, {"run": "other"}),
    "format": (b"\x80\x04pickle", {}),
    "salt": (wire.salted("1" * 64)(save(SUMMAND)), {}),
    "digest": (SUMMAND, {"summand_sha256": "1" * 64}),
    "keys": (SUMMAND | {"more": torch.ones(1)}, {}),
    "dtype": (SUMMAND | {"weight": torch.tensor(1)}, {}),
    "shape": (SUMMAND | {"delta/w": torch.ones(1, 2)}, {}),
    "nonfinite": (SUMMAND | {"delta/w": torch.tensor([1.0, float("nan")])}, {}),
    "norm": (SUMMAND | {"delta/w": torch.tensor([1.0, 100.0])}, {}),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_answer_is_dropped_by_its_code_and_changes_nothing(tmp_path, what):
    good = [("a", SUMMAND, {}), ("c", TWICE, {})]
    alone = folded(tmp_path, *good)
    closed = folded(tmp_path, good[0], ("bad", *BAD[what]), good[1])
    code = {"run": "round", "salt": "format"}.get(what, what)
    assert closed.dropped == {"bad": code} and set(closed.reports) == set(closed.received) == {"a", "c"}
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(closed.acc), tree.leaves(alone.acc), strict=True))
    assert folded(tmp_path, ("bad", *BAD[what])).acc is None


def test_a_header_that_is_longer_than_agreed_tensors_need_is_not_parsed(tmp_path, monkeypatch):
    """Millions of names in it would take a coordinator's memory before one is compared."""
    names = {f"{n:04}": torch.zeros(0) for n in range(200)}
    monkeypatch.setattr("fedtailor.treefile.safe_open", lambda *_, **__: pytest.fail("it was parsed"))
    assert folded(tmp_path, ("bad", save(SUMMAND | names), {})).dropped == {"bad": "format"}


PACKED = LEAVES.model_copy(update={"packed": True})


def short(flat):
    return b"".join(packing.pack(flat))


@pytest.mark.parametrize("what", ["nonfinite", "norm"])
def test_packed_answers_are_unpacked_checked_and_summed_as_others_are(tmp_path, what):
    plain = folded(tmp_path, ("a", SUMMAND, {}), ("b", TWICE, {}))
    given = [("a", short(SUMMAND), {}), ("b", short(TWICE), {}), ("bad", short(BAD[what][0]), {})]
    closed = folded(tmp_path, *given, leaves=PACKED)
    assert closed.dropped == {"bad": what} and set(closed.reports) == {"a", "b"}
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(closed.acc), tree.leaves(plain.acc), strict=True))
    visit = VISIT.model_copy(update={"train": False})
    closed = folded(tmp_path, ("a", short({}), {}), ("b", short(SUMMAND), {}), visit=visit, leaves=PACKED)
    assert closed.acc is None and set(closed.reports) == {"a"} and closed.dropped == {"b": "packing"}


def test_an_answer_is_packed_where_that_was_agreed_and_nowhere_else(tmp_path):
    assert folded(tmp_path, ("a", SUMMAND, {}), leaves=PACKED).dropped == {"a": "packing"}
    assert folded(tmp_path, ("a", short(SUMMAND), {})).dropped == {"a": "format"}
    longer = short(SUMMAND | {"delta/x": torch.ones(1)})
    assert folded(tmp_path, ("a", longer, {}), leaves=PACKED).dropped == {"a": "packing"}


def test_a_visit_that_does_not_train_takes_reports_and_no_tensors(tmp_path):
    visit = VISIT.model_copy(update={"train": False})
    closed = folded(tmp_path, ("a", {}, {"metrics": {"loss": 0.5}}), ("b", SUMMAND, {}), visit=visit)
    assert closed.acc is None and closed.reports["a"].metrics == {"loss": 0.5} and closed.dropped == {"b": "keys"}


def test_a_sum_is_in_memory_a_slice_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(treefile, "SLICE", 3)
    seen = []
    strategy = strategies.fedavg()

    def add(acc, block):
        (x,) = tree.leaves(block)  # a reply's other tensors need not be in memory
        seen.append(x.numel())
        return strategy.reduce.add(acc, block)

    watched = strategy._replace(reduce=strategy.reduce._replace(add=add))
    large = {"delta/w": torch.arange(10.0).view(2, 5), "weight": torch.tensor(10.0)}
    tensors = [TENSORS[0].model_copy(update={"shape": (2, 5)}), TENSORS[1]]
    leaves = LEAVES.model_copy(update={"tensors": tensors})
    closed = folded(tmp_path, *[(f"s{i}", large, {}) for i in range(9)], strategy=watched, leaves=leaves)
    assert seen == 9 * [3, 3, 3, 1, 1]
    assert float(closed.acc["weight"]) == 90.0 and torch.equal(
        closed.acc["delta"]["w"], 9.0 * large["delta/w"].double()
    )


def test_what_is_not_a_sum_sees_every_answer_whole(tmp_path):
    closed = folded(tmp_path, ("a", SUMMAND, {}), ("b", TWICE, {}), ("c", SUMMAND, {}), strategy=strategies.median())
    assert {k: x.tolist() for k, x in tree.flatten(closed.acc).items()} == {
        "delta/w": [[1.0, 2.0], [2.0, 4.0], [1.0, 2.0]],
        "weight": [10.0, 20.0, 10.0],
    }


PLAN = load(["study=heart", "sites=[a,b]", "quorum=2"]).plan
START = {"w": torch.tensor([1.0, 1.0])}


def advanced(closed):
    strategy = strategies.fedavg()
    like = tree.unflatten({"delta/w": torch.zeros(2), "weight": torch.zeros(())})
    return advance(strategy, lambda: strategy.init(START), counted(PLAN, closed, 3), 3, like)


def test_a_round_with_its_quorum_advances_the_model(tmp_path):
    state = advanced(folded(tmp_path, ("a", SUMMAND, {}), ("b", TWICE, {})))
    torch.testing.assert_close(state["params"]["w"], torch.tensor([1 + 3 / 30, 1 + 6 / 30]))


def test_a_round_without_its_quorum_names_who_is_missing_and_why(tmp_path):
    with pytest.raises(ConfigError, match=r"round 3: 1 of 2 sites replied, the quorum is 2 \(b: shape\)") as caught:
        advanced(folded(tmp_path, ("a", SUMMAND, {}), ("b", BAD["shape"][0], {})))
    assert caught.value.code == "quorum"


def test_weights_that_cancel_do_not_reach_the_checkpoint(tmp_path):
    hostile = SUMMAND | {"weight": torch.tensor(-10.0)}
    with pytest.raises(ConfigError, match="no longer finite") as caught:
        advanced(folded(tmp_path, ("a", SUMMAND, {}), ("b", hostile, {})))
    assert caught.value.code == "diverged"


def test_what_is_private_is_noised_before_it_is_rounded(tmp_path):
    """A sum in float32 hides a small summand under a large one: a site could so undo another's bound."""
    seen = []

    def apply(state, total, round):
        seen.append({path: leaf.dtype for path, leaf in tree.flatten(total).items()})
        return state

    plan = load(["study=heart", "sites=[a,b]", "quorum=1", "privacy=none"]).plan
    for bound, dtype in ((None, torch.float32), (1.0, torch.float64)):
        strategy = strategies.fedavg()._replace(apply=apply, sensitivity=bound)
        closed = folded(tmp_path, ("a", SUMMAND, {}), ("b", TWICE, {}), strategy=strategy)
        acc, like = counted(plan, closed, VISIT.round), tree.unflatten(SUMMAND)
        advance(strategy, lambda: {"params": {"w": torch.zeros(2)}}, acc, VISIT.round, like)
        assert set(seen[-1].values()) == {dtype}


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({}, None),
        ({"delta/w": torch.tensor([0.6, 0.9])}, "norm"),
        ({"weight": torch.tensor(2.0)}, "norm"),
        ({"within": torch.tensor(-900.0)}, "norm"),
    ],
)
def test_a_private_answer_beyond_the_rounds_clip_does_not_count(tmp_path, changed, code):
    """One site could else move the next clip, and with it the noise, by as much as it likes."""
    good = {"delta/w": torch.tensor([0.6, 0.8]), "weight": torch.tensor(1.0), "within": torch.tensor(0.5)}
    tensors = tuple(Tensor(name=n, dtype="float32", shape=tuple(x.shape)) for n, x in good.items())
    leaves = Leaving(tensors=tensors, metrics=(), norm=1000.0, bytes=10_000)
    told = []
    close_round(strategies.fedavg(), VISIT, leaves, stream(tmp_path, ("a", good | changed, {})), told.append, clip=1.0)
    fixed = {name: x for name, x in (good | changed).items() if name != "within"}
    bare = leaves.model_copy(update={"tensors": tensors[:2]})
    close_round(strategies.fedavg(), VISIT, bare, stream(tmp_path, ("b", fixed, {})), told.append, clip=1.0)
    assert [answer.code for answer in told] == [code, None if "within" in changed else code]


def test_what_is_not_finite_in_slices_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    """Found in the last slice, when all others are in the draft."""
    monkeypatch.setattr(treefile, "SLICE", 2)
    (tmp_path / "in").mkdir()
    run, fedavg = Run.create(tmp_path / "studies", PLAN, "", str), strategies.fedavg()
    run.save(fedavg.init({"w": torch.ones(5)}), Progress(), PLAN.digest())
    before = (run.folder / "checkpoint.safetensors").read_bytes()
    delta = torch.tensor([1.0, 1.0, 1.0, 1.0, float("inf")])
    for last, code in ((delta, "diverged"), (torch.ones(5), None)):
        summand = {"delta/w": last, "weight": torch.tensor(2.0)}
        acc = slicewise.add(fedavg.reduce, None, summand, 1.0, tmp_path / "in")

        write = partial(slicewise.advance, fedavg, acc, round=3, like=tree.unflatten(summand))
        if code is None:
            run.step(write, Progress(round=1), PLAN.digest())
            continue
        with pytest.raises(ConfigError, match="round 3: the model is no longer finite") as caught:
            run.step(write, Progress(round=1), PLAN.digest())
        assert caught.value.code == code and (run.folder / "checkpoint.safetensors").read_bytes() == before
        assert not [path for path in run.folder.iterdir() if path.name.startswith(".")]
    state, progress = run.load(PLAN.digest())
    assert progress.round == 1 and torch.equal(state["params"]["w"], torch.full((5,), 1.5))
