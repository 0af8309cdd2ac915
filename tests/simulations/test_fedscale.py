"""FedScale's pickles: their plain values are read, and nothing else of them is ever done."""

import json
import os
import pickle
import pickletools

import pytest

from fedtailor.errors import ConfigError
from fedtailor.simulations.fedscale import converted, main, plain
from fedtailor.simulations.traces import capacity, presence

CAPACITY = {1: {"computation": 10.0, "communication": 4000.0}, 2: {"computation": 25, "communication": 800}}
BEHAVIOUR = {
    7: {"duration": 9, "active": [0, 50], "inactive": [20, 90.5], "finish_time": 100, "model": "CPH1801"},
    8: {"duration": 9, "active": [30, 99], "inactive": [40], "finish_time": 100, "model": None},
}


class Hostile:
    """What runs a command where a pickle is loaded."""

    def __init__(self, there):
        self.there = there

    def __reduce__(self):
        return os.system, (f"touch {self.there}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_those_that_were_pickled(protocol):
    shared = ["twice", 1 << 70]
    value = {
        1: [1, -2, 300, 70000, 1 << 40, 0.5, -1e300, True, False, None, "ä\n", ""],
        "deep": {"er": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, (4,)), [], {}, [shared, shared]]},
    }
    assert plain(pickle.dumps(value, protocol)) == value
    assert plain(pickletools.optimize(pickle.dumps([list(range(3000))], protocol))) == [list(range(3000))]


def test_what_would_run_something_is_not_carried_out(tmp_path):
    there = tmp_path / "there"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for value in (Hostile(there), [1, {"a": Hostile(there)}]):
            name = "STACK_GLOBAL" if protocol >= 4 else "GLOBAL"
            with pytest.raises(ConfigError, match=f"opcode {name}, which plain values do not need"):
                plain(pickle.dumps(value, protocol))
    for raw, name in (
        (b"(S'touch x'\nios\nsystem\n.", "INST"),
        (b"\x82\x01.", "EXT1"),
        (b"Pos.system\n.", "PERSID"),
        (b"\x80\x02]}b.", "BUILD"),
        (b"]]R.", "REDUCE"),
        (b"]]\x81.", "NEWOBJ"),
        (b"\x95\x00\x00\x00\x00\x00\x00\x00\x00\x97.", "NEXT_BUFFER"),
    ):
        with pytest.raises(ConfigError, match=f"opcode {name}, "):
            plain(raw)
    assert not there.exists()


@pytest.mark.parametrize(
    "raw",
    [b"", b"]", b".", b"(.", b"a.", b"]a.", b"\x85.", b"(\x85.", b"e.", b"(e.", b"](a.", b"}(K\x01u.", b"}]]s.", b"K\x01K\x02a.",
     b"]K\x01K\x02s.", b"h\x00.", b"\xff.", b"Inan\n.", b"U\xff.", b"\x8d" + b"\xff" * 8 + b".", b"t.", b"d."],
)  # fmt: skip
def test_a_broken_pickle_is_an_error_of_ours(raw):
    with pytest.raises(ConfigError, match="it is no pickle of plain values"):
        plain(raw)


def test_its_files_are_converted_to_ours(tmp_path, capsys):
    for name, value in (("capacity", CAPACITY), ("behaviour", BEHAVIOUR)):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(value, 2))
        assert main([str(tmp_path / f"{name}.pkl"), str(tmp_path / f"{name}.json")]) == 0
    assert "2 devices" in capsys.readouterr().out
    can = capacity(str(tmp_path / "capacity.json"))
    assert (
        can.by_examples
        and can.pace.tolist() == [30, 75]
        and can.up_kbps.tolist() == can.down_kbps.tolist() == [4000, 800]
    )
    assert json.loads((tmp_path / "behaviour.json").read_text())["active"] == [
        [[0, 20], [50, 90.5]],
        [[30, 40], [99, 100]],
    ]
    assert presence(str(tmp_path / "behaviour.json")).period.tolist() == [100, 100]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1], "it holds no devices"),
        ({}, "it holds no devices"),
        ({4: {"computation": 1.0}}, "device 4: KeyError: 'communication'"),
        ({4: {"computation": "1", "communication": 1}}, "device 4: ValueError: '1' is not a number"),
        ({4: {"computation": 0, "communication": 1}}, "device 4: .* 0 is not a number"),
        ({4: {"computation": 1, "communication": float("nan")}}, "device 4: .* nan is not a number"),
        ({4: {"active": [5, 3], "inactive": [9, 4], "finish_time": 10}}, "device 4: .* intervals that follow each other"),
        ({4: {"active": [5, 6, 7], "inactive": [9], "finish_time": 10}}, "device 4: ValueError: zip"),
        ({4: {"active": (5,), "inactive": [9], "finish_time": 10}}, "device 4: .* a tuple where a list has to be"),
        ({4: 5}, "device 4: TypeError"),
    ],
)  # fmt: skip
def test_an_entry_of_neither_kind_is_named(value, words):
    with pytest.raises(ConfigError, match=words):
        converted(value)


def test_what_is_wrong_is_said_and_nothing_written(tmp_path, capsys):
    (tmp_path / "in.pkl").write_bytes(pickle.dumps(Hostile(tmp_path / "there"), 2))
    assert main([str(tmp_path / "in.pkl"), str(tmp_path / "out.json")]) == 1
    assert main([str(tmp_path / "none.pkl"), str(tmp_path / "out.json")]) == 1
    said = capsys.readouterr().err
    assert "in.pkl: it has the opcode GLOBAL" in said and "No such file" in said
    assert [path.name for path in tmp_path.iterdir()] == ["in.pkl"]
