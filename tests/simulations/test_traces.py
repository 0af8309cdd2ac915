"""Traces of devices: how long they take, when they are there, and what that makes of a round."""

import json
import math

import numpy as np
import pytest
from interrupt import interrupted_after

from fedtailor import store, tree
from fedtailor.config import load
from fedtailor.errors import ConfigError
from fedtailor.population import Population
from fedtailor.result import model_bytes
from fedtailor.simulations.buffered import Clock
from fedtailor.simulations.composed import told
from fedtailor.simulations.devices import Fleet, trips
from fedtailor.simulations.draws import there
from fedtailor.simulations.run import simulate
from fedtailor.simulations.setting import prepare
from fedtailor.simulations.traces import capacity, presence, shuffled

FIELDS = {"evaluation": {"baseline": False}, "quorum": 1, "deadline_s": 60}
BYTES = 8000  # of made-up messages: at 64 kbit/s a second
ACTIVE = {
    "period_s": [100, 100, 24, 10, 5],
    "active": [[[0, 20], [50, 90.5]], [[30, 40], [99, 100]], [[0, 6], [6, 8], [20, 24]], [[0, 10]], []],
}


@pytest.fixture
def file(tmp_path):
    """Write a document as JSON; returns its path."""

    def write(document, name="trace.json"):
        (tmp_path / name).write_text(document if isinstance(document, str) else json.dumps(document))
        return str(tmp_path / name)

    return write


def people(clients=12, cohort=4, **more):
    return Population(partition="iid", clients=clients, cohort=cohort, **more)


def ready(plan, sources, of):
    how = {"block": 64, "path": "loop", "policies": None, "step_s": None}
    return prepare(plan, sources, **how, population=of, on_event=lambda event: None)


def test_who_is_there_and_for_how_long(file):
    when = presence(file(ACTIVE))
    assert [np.flatnonzero(when.at(now)).tolist() for now in (0, 20, 30, 99.5, 104, 8)] == [
        [0, 2, 3], [2, 3], [1, 2, 3], [1, 2, 3], [0, 3], [0, 3]
    ]  # fmt: skip
    assert [when.left(0, now) for now in (0, 19, 20, 150, 190.5)] == [20, 1, -1, 40.5, -1]
    assert when.left(2, 1) == 7 and when.left(2, 21) == 11, (
        "intervals without a gap are one, also over the period's end"
    )
    assert when.left(3, 1e6) == math.inf and when.left(4, 0) == -1 and when.left(1, 99) == 1
    assert presence(file({"period_s": [9], "active": [[[3, 4]]]})).wakes(3) == 12
    quiet = when.of(np.array([1, 4]))
    assert [quiet.wakes(now) for now in (0, 30, 99, 131)] == [30, 99, 130, 199]
    assert quiet.at(30).tolist() == [True, False] and quiet.left(0, 35) == 5
    assert when.of(np.array([4])).wakes(0) == math.inf


def test_who_is_there_is_as_by_looking_at_every_interval(file):
    rng, devices = np.random.default_rng(0), 40
    cuts = [
        np.sort(rng.choice(50, 2 * rng.integers(0, 5), replace=False)).reshape(-1, 2).tolist() for _ in range(devices)
    ]
    when = presence(file({"period_s": [50 + d for d in range(devices)], "active": cuts})).of(rng.permutation(devices))
    assert len(when.first) == devices + 1 and when.first[-1] == sum(map(len, cuts))
    by_period = {int(period): d for d, period in enumerate(when.period)}
    for now in np.arange(0, 300, 0.5).tolist():
        at = when.at(now)
        for d, intervals in enumerate(cuts):
            phase = now % (50 + d)
            inside = [high for low, high in intervals if low <= phase < high]
            assert at[by_period[50 + d]] == bool(inside)
            left = when.left(by_period[50 + d], now)
            assert left >= inside[0] - phase > 0 if inside else left < 0


def test_those_of_some_places_are_counted_and_found():
    for clients in (1, 7, 20, 23):
        for places in ([], [0], [1, 4], [0, 1, 2, 3, 4]):
            here = there(clients, np.array(places, np.int64), 5)
            expected = [k for k in range(clients) if k % 5 in places]
            assert here.many == len(expected) and here.of(np.arange(here.many)).tolist() == expected
            if places:
                assert here.ranks(range(clients)).tolist() == list(range(len(expected)))


def test_how_long_a_trip_takes(plan, file):
    """Two steps and a message each way, by hand: 2 x 3 s + 8000 B / 64 kbit/s + 8000 B / 32 kbit/s."""
    made, of = plan(**FIELDS), people(devices="x")
    can = capacity(file({"step_s": [3, 1.5], "down_kbps": [64, 640], "up_kbps": [32, 64]}))
    fleet = Fleet(can, None, BYTES, BYTES)
    assert trips(made, of, 0, [0, 1, 2], 0.0, fleet, [5, 5, 5]).seconds.tolist() == [9, 4.1, 9]
    by_example = Fleet(capacity(file({"ms_per_example": [250]})))
    found = trips(made, of, 0, [0, 1], 0.0, by_example, [10, 40])  # two steps on a sample of 0.4
    assert found.seconds.tolist() == pytest.approx([2 * 0.25 * 4, 2 * 0.25 * 16]) and found.taken.tolist() == [2, 2]
    short = plan(**FIELDS, local={"steps": 6, "rate": 0.4, "lr": 0.3, "within_s": 5.0})
    assert trips(short, of, 0, [0, 1], 0.0, fleet, [5, 5]).taken.tolist() == [2, 4], "lines do not count as work"


def test_who_goes_before_it_is_done_is_lost(plan, file):
    made, of = plan(**FIELDS), people(step_s=4.0, availability="x")
    fleet = Fleet(None, presence(file({"period_s": [100, 100, 100], "active": [[[0, 18]], [[0, 17.5]], [[90, 100]]]})))
    assert trips(made, of, 0, [0, 1, 2, 3], 10.0, fleet).lost.tolist() == [False, True, True, False]


def test_devices_are_dealt_in_turn_and_equally_often(plan, sources, file):
    made = plan(**FIELDS | {"deadline_s": 1e6})
    study = ready(made, sources, people(devices=file({"step_s": [1, 10, 100]}), clients=12, cohort=12))
    order = shuffled(0, "devices", 3, 12)
    assert sorted(order.tolist()) == [0, 1, 2] and shuffled(1, "devices", 50, 7).tolist() != order.tolist()
    assert shuffled(1, "devices", 50, 7).tolist() == shuffled(1, "devices", 50, 50)[:7].tolist()
    assert study.clients.lasts(0) == 200
    slow = [k for k in range(12) if 10 ** order[k % 3] == 100]
    quick = ready(
        made.model_copy(update={"deadline_s": 20}), sources, people(devices=file({"step_s": [1, 10, 100]}), cohort=12)
    )
    assert quick.clients.asked(0) == [k for k in range(12) if k not in slow] and quick.clients.lasts(0) == 20


def test_a_line_carries_what_is_sent_and_what_comes_back(plan, sources, file):
    made = plan(**FIELDS | {"deadline_s": 1e6})
    devices = file({"step_s": [1], "down_kbps": [8], "up_kbps": [0.8]})
    study = ready(made, sources, people(devices=devices))
    cast = study.strategy.broadcast(study.strategy.init(study.start))
    down = len(b"".join(store.safetensors(tree.flatten(cast))))
    one = study.way.many(cast, {}, *study.clients.fed(0, [0]))[0]
    up = len(b"".join(store.safetensors(tree.flatten(tree.at(one, 0)))))
    assert up > down > 100 and study.clients.lasts(0) == pytest.approx(2 + down / 1000 + up / 100)
    packed = {"_target_": "fedtailor.strategies.topk", "fraction": 0.5, "of": {"name": "fedavg"}}
    with pytest.raises(ConfigError, match="population.devices: the file has up_kbps, and how long .* packed answers"):
        ready(plan(strategy=packed), sources, people(devices=devices))
    assert ready(plan(strategy=packed), sources, people(devices=file({"step_s": [1], "down_kbps": [8]}))).clients.asked(
        0
    )


def test_a_round_asks_those_who_are_there_and_waits_for_the_first(plan, sources, file):
    """Devices of the first half of ten seconds, of the second, and of none: the first round begins at 3."""
    active = {"period_s": [10, 10, 10], "active": [[[3, 5.5]], [[5, 10]], []]}
    of = people(step_s=1.0, clients=12, cohort=12, availability=file(active))
    study = ready(plan(**FIELDS), sources, of)
    order = shuffled(0, "availability", 3, 12).tolist()
    early, late = ([k for k in range(12) if order[k % 3] == device] for device in (0, 1))
    assert len(early) == len(late) == 4
    asked, lasts = study.clients.asked, study.clients.lasts
    assert asked(0, 0.0) == early and lasts(0, 0.0) == 5, "three to wait, two to train"
    assert asked(0, 3.5) == early and lasts(0, 3.5) == 2
    assert asked(0, 5.0) == late and lasts(0, 5.0) == 60, (
        "the early ones go after half a second: the round ends at its deadline"
    )
    assert asked(0, 17.0) == late and lasts(0, 17.0) == 2
    some = ready(plan(**FIELDS), sources, of.model_copy(update={"cohort": 3}))
    counts = np.bincount(np.concatenate([some.clients.asked(r, 17.0) for r in range(100)]), minlength=12)
    assert counts.sum() == 300 and (counts[late] > 50).all(), "drawn among them"
    result, _ = simulate(plan(**FIELDS | {"deadline_s": 62}), sources, population=of, path="loop")
    assert result.timing.virtual_s == [5, 62, 2], "at 5 the early ones go too early, at 67 there are only late ones"


def test_nobody_begins_who_is_not_there_where_rounds_do_not_wait(plan, sources, file):
    rng = np.random.default_rng(3)
    active = [np.sort(rng.choice(60, 4, replace=False)).reshape(-1, 2).tolist() for _ in range(9)]
    of = people(
        clients=30, cohort=5, step_s=1.0, step_spread=0.5, availability=file({"period_s": [60] * 9, "active": active})
    )
    made = plan(**FIELDS, buffer={"answers": 3})
    study, clock, lost, order = ready(made, sources, of), Clock(0.0), 0, shuffled(0, "availability", 9, 30)
    for round in range(12):
        going = study.clients.flow(round, clock)
        lost += sum(one.lost for one in going.clock.coming)
        for one in going.came:
            whole = [(low, high) for low, high in active[order[one.client % 9]] if low <= one.due % 60 <= high]
            assert whole, "it is there still when its answer comes"
        assert len(going.clock.coming) <= 5 and going.clock.now > clock.now
        clock = going.clock
    assert lost, "the test needs some who go too early"


def test_a_run_goes_on_from_its_checkpoint(plan, sources, file, tmp_path):
    traces = {"devices": file({"step_s": [1, 2, 3], "up_kbps": [9, 90, 900]}, "d"), "availability": file(ACTIVE, "a")}
    made = plan(**FIELDS, rounds=4, buffer={"answers": 3})
    of = people(clients=20, cohort=6, **traces)
    whole, params = simulate(made, sources, population=of)
    at = {"checkpoint": tmp_path / "checkpoint", "every_s": 0.0, "population": of}
    with pytest.raises(KeyboardInterrupt):
        simulate(made, sources, **at, on_event=interrupted_after(2))
    again, same = simulate(made, sources, **at, resume=True)
    assert model_bytes(same) == model_bytes(params) and again.timing.virtual_s == whole.timing.virtual_s
    with pytest.raises(KeyboardInterrupt):
        simulate(made, sources, **at, on_event=interrupted_after(2))
    file({"step_s": [1, 2, 4], "up_kbps": [9, 90, 900]}, "d")
    with pytest.raises(ConfigError, match="other settings or other data"):
        simulate(made, sources, **at, resume=True)


def test_what_a_result_says_of_its_traces(file):
    path = file({"step_s": [1]})
    made = load(["study=heart", "privacy=none", "population=iid", f"population.devices={path}"])
    first = told(made)
    assert first["traces"].keys() == {"devices"} and len(first["traces"]["devices"]) == 64
    file({"step_s": [2]})
    assert told(made) != first and "traces" not in told(load(["study=heart", "population=iid"]))


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100000, "is not JSON"),
        ("[1]", "is not a mapping with lists under down_kbps, ms_per_example, step_s, up_kbps, and nothing else"),
        ({"step_s": [1], "speed": [2]}, "and nothing else"),
        ({"up_kbps": [1]}, "one of step_s and ms_per_example, and has neither"),
        ({"step_s": [1], "ms_per_example": [1]}, "and has ..step_s., .ms_per_example.."),
        ({"step_s": [1, 2], "up_kbps": [1]}, "not of one length: step_s 2, up_kbps 1"),
        ({"step_s": []}, "step_s: not a list of numbers"),
        ({"step_s": 3}, "step_s: not a list of numbers"),
        ({"step_s": [1, 0]}, r"step_s\[1\]: 0 is not a number from 1e-09 to 1e15"),
        ({"step_s": ["1"]}, r"step_s\[0\]: '1' is not a number"),
        ({"step_s": [True]}, r"step_s\[0\]: True is not a number"),
        ('{"step_s": [NaN]}', r"step_s\[0\]: nan is not a number"),
        ({"step_s": [1], "up_kbps": [-1]}, r"up_kbps\[0\]: -1 is not a number"),
    ],
)  # fmt: skip
def test_devices_that_are_not_right_are_named(file, devices, words):
    with pytest.raises(ConfigError, match=f"population.devices: .*trace.json: .*{words}.*; docs/researchers.md"):
        capacity(file(devices))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"period_s": [1]}, "active: not a list of 1 lists"),
        ({"period_s": [1], "active": [[], []]}, "active: not a list of 1 lists"),
        ({"period_s": [0], "active": [[]]}, r"period_s\[0\]: 0 is not a number from 1e-06"),
        ({"period_s": [1], "active": [[]]}, "active: no device is ever there"),
        *[
            ({"period_s": [9, 9], "active": [[[0, 1]], bad]}, r"active\[1\]: not intervals .* period_s\[1\]=9")
            for bad in (3, [3], [[1, 2, 3]], [[2, 1]], [[1, 1]], [[1, 10]], [[-1, 2]], [[0, 3], [2, 4]], [["0", 1]], [[0, math.nan]])
        ],
    ],
)  # fmt: skip
def test_availability_that_is_not_right_is_named(file, document, words):
    with pytest.raises(ConfigError, match=f"population.availability: .*trace.json: {words}"):
        presence(file(document))


def test_settings_that_do_not_go_together_are_refused(plan, sources, file):
    path, when = file({"step_s": [1]}), file(ACTIVE, "a")
    for words, match in (
        ({"devices": path, "step_s": 1.0}, "devices, step_s, step_spread: the file has every device's own speed"),
        ({"devices": path, "step_spread": 1.0}, "devices, step_s, step_spread"),
        ({"availability": when}, "availability: there is no clock to go by; give step_s or devices"),
    ):
        with pytest.raises(ValueError, match=match):
            people(**words)
    site = {"unit": "site", "epsilon": 8.0, "delta": 1e-4, "clip": 1.0, "noise_multiplier": 1.0}
    with pytest.raises(
        ConfigError, match="population.availability: with privacy.unit=site rounds must be secret Poisson"
    ):
        ready(plan(privacy=site), sources, people(step_s=1.0, availability=when))
    assert ready(plan(privacy=site), sources, people(devices=path)).clients.many == 4
    with pytest.raises(ConfigError, match="population.devices: .*nowhere.json: cannot be read: No such file"):
        ready(plan(), sources, people(devices=file("x").replace("trace", "nowhere")))
