"""Metrics with noise: only the accuracy leaves, its noise is what the ledger is charged for, and repeats with its key."""

import secrets
from statistics import mean, stdev

import pytest
from answers import FACTS, LEAVES, METRICS, POLICY, VISIT, written

from fedtailor.client import airlock, inbox
from fedtailor.config import load
from fedtailor.policy import Case, Policy, metric_charge, verdict
from fedtailor.privacy.accounting import Charge, epsilon
from fedtailor.privacy.planning import resolve

NOISED = POLICY.model_copy(update={"metric_noise": 20.0})
PLAN = resolve(load(["study=heart", "sites=[a,b]", "quorum=1", "rounds=4"]).plan)
EXACT = METRICS | {"accuracy": 0.75, "f1": 0.5}


def left(tmp_path, policy=NOISED, key=None, rows=500):
    outbox = tmp_path / secrets.token_hex(4)
    outbox.mkdir()
    out = written(tmp_path, metrics=EXACT, baseline=EXACT)
    facts = FACTS._replace(test_rows=rows, metric_key=secrets.token_bytes(32) if key is None else key)
    airlock.admit(out, outbox, VISIT, LEAVES, policy, facts)
    return inbox.stored(outbox, VISIT).report


def test_only_the_accuracy_leaves_and_not_exactly(tmp_path):
    report = left(tmp_path)
    assert report.metrics.keys() == report.baseline.keys() == {"accuracy"}
    assert report.metrics["accuracy"] != 0.75 and report.metrics != report.baseline
    assert left(tmp_path, POLICY).metrics["accuracy"] == 0.75


def test_the_same_key_repeats_the_same_release(tmp_path):
    key = secrets.token_bytes(32)
    assert left(tmp_path, key=key).metrics == left(tmp_path, key=key).metrics
    assert len({left(tmp_path).metrics["accuracy"] for _ in range(5)}) > 1


def test_without_a_key_of_the_ledgers_no_metric_leaves(tmp_path):
    outbox = tmp_path / "outbox"
    outbox.mkdir()
    out = written(tmp_path, metrics=EXACT, baseline=EXACT)
    airlock.admit(out, outbox, VISIT, LEAVES, NOISED, FACTS)
    report = inbox.stored(outbox, VISIT).report
    assert report.metrics is None and report.baseline is None


def test_the_noise_is_what_is_charged_for():
    """A mean of n zeros and ones moves by at most 1/n: multiplier z is a standard deviation of z/n."""
    draws = [
        airlock._noised({"accuracy": 0.5}, 20 / 500, secrets.token_bytes(32), "a")["accuracy"] for _ in range(4000)
    ]
    assert mean(draws) == pytest.approx(0.5, abs=5 * 0.04 / 4000**0.5)
    assert stdev(draws) == pytest.approx(0.04, rel=0.06)
    assert metric_charge(NOISED) == Charge(20.0, 1.0, 1) and metric_charge(POLICY) is None


def test_a_plan_is_judged_with_all_the_metrics_that_it_asks_for():
    policy = Policy(studies=("heart",), epsilon=100.0, delta=1e-4, metric_noise=20.0)
    asked = float(next(r.asked for r in verdict(policy, PLAN, Case("a", [], 1000)) if r.code == "budget"))
    training = Charge(PLAN.privacy.noise_multiplier, PLAN.local.rate, PLAN.local.steps)
    releases = 4 + 1 + 1  # each round, at the end, and of the model trained alone
    assert asked == pytest.approx(epsilon([training] * 4 + [Charge(20.0, 1.0, 1)] * releases, 1e-4), rel=1e-4)
    bare = PLAN.model_copy(update={"privacy": None})
    rules = verdict(policy.model_copy(update={"without_privacy": True, "epsilon": 0.1}), bare, Case("a", [], 1000))
    assert [rule.code for rule in rules if not rule.ok] == ["budget"]


def test_neighbours_differ_by_no_more_than_the_sensitivity():
    """Zeroing one record changes the share of rightly decided rows by at most 1/n."""
    import itertools

    n = 6
    for decided in itertools.product((0, 1), repeat=n):
        for i in range(n):
            other = [*decided[:i], 0, *decided[i + 1 :]]
            assert abs(mean(decided) - mean(other)) <= 1 / n + 1e-12
