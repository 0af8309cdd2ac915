"""The event file: whole lines of JSON at all times, and nothing that goes wrong with it stops the caller."""

import errno
import json
import math
import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtailor.events import Events


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


def kinds(path):
    return [json.loads(line)["kind"] for line in path.read_text().splitlines()]


def test_an_event_is_one_line_with_its_time_in_utc(path):
    told = []
    Events(path, [told.append]).emit("round", round=3, seconds=0.5, sites=("va", "ch"), done=True, code=None)
    text = path.read_text()
    assert text.endswith("\n") and text.count("\n") == 1 and json.loads(text) == told[0]
    time = datetime.fromisoformat(told[0].pop("time"))
    assert time.utcoffset() == timedelta(0) and abs(datetime.now(UTC) - time) < timedelta(hours=1)
    assert told == [{"kind": "round", "round": 3, "seconds": 0.5, "sites": ["va", "ch"], "done": True, "code": None}]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_number_that_is_not_finite_is_null_however_deep(path):
    told = []
    Events(path, [told.append]).emit("round", loss=math.nan, sites={"va": [math.inf, -math.inf, 1.5], 2: {math.nan}})
    line = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert line["loss"] is None and line["sites"] == {"va": [None, None, 1.5], "2": [None]}
    assert told == [line]


def test_what_json_has_no_word_for_becomes_text(path):
    Events(path).emit("made", where=Path("/a/é"), line="one\ntwo")
    line = json.loads(path.read_text())
    assert (line["where"], line["line"]) == ("/a/é", "one\ntwo")


@pytest.mark.parametrize("torn", ['{"kind": "b', "x" * 4095, "x" * 4096, "x" * 4097, "x" * 100_000])
@pytest.mark.parametrize("before", ["", '{"kind": "a"}\n'])
def test_a_torn_last_line_is_cut_off(path, before, torn):
    path.write_text(before + torn)
    Events(path).emit("c")
    assert path.read_text().startswith(before) and kinds(path) == (["a", "c"] if before else ["c"])


def test_whole_lines_of_an_earlier_run_are_kept(path):
    for kind in ("a", "b"):
        Events(path).emit(kind, text="x" * 5000)
    assert kinds(path) == ["a", "b"]


def disk(monkeypatch, written):
    """Let the disk take only ``written`` bytes of each line; None: as many as there are; an error: none."""
    real = os.write

    def write(handle, data):
        if isinstance(written[0], OSError):
            raise written[0]
        return real(handle, data[: written[0]])

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("short", [OSError(errno.ENOSPC, "No space left on device"), 0, 5])
def test_a_full_disk_is_told_once_and_stops_nobody(path, monkeypatch, capsys, short):
    told, room = [], [None]
    disk(monkeypatch, room)
    events = Events(path, [told.append])
    events.emit("a")
    room[0] = short
    events.emit("b")
    events.emit("c")
    room[0] = None
    events.emit("d")
    assert [event["kind"] for event in told] == ["a", "b", "c", "d"]
    assert kinds(path) == ["a", "d"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{path} cannot be written" in said and "going on" in said


def test_a_folder_that_is_not_there_stops_nobody(tmp_path, capsys):
    told = []
    Events(tmp_path / "nowhere" / "events.jsonl", [told.append]).emit("a")
    assert len(told) == 1 and "No such file" in capsys.readouterr().err


def test_a_sink_that_fails_is_told_once_and_stops_neither_the_caller_nor_the_others(path, capsys):
    told = []

    def failing(event):
        raise RuntimeError("the browser is gone")

    events = Events(path, [failing, told.append])
    events.emit("a")
    events.emit("b")
    assert [event["kind"] for event in told] == kinds(path) == ["a", "b"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "RuntimeError: the browser is gone" in said


def test_without_a_file_the_sinks_are_told(capsys):
    told = []
    Events(None, [told.append]).emit("a")
    assert [event["kind"] for event in told] == ["a"] and capsys.readouterr().err == ""


def test_threads_do_not_mix_their_lines(path):
    events = Events(path)

    def emit(name):
        for i in range(50):
            events.emit("e", name=name, i=i, text=name * 300)

    threads = [threading.Thread(target=emit, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {name: [e["i"] for e in lines if e["name"] == name] for name in "abcd"} == dict.fromkeys(
        "abcd", list(range(50))
    )
