"""The wire: Flower's object format is what we take it for, and nothing malformed, oversized or not agreed passes."""

import hashlib
import io
import json
import secrets
from types import SimpleNamespace

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, validate_object_content
from pydantic import BaseModel
from safetensors.torch import save

from fedtailor import leaving, tree, wire
from fedtailor import recipe as recipes
from fedtailor.client.work import perform
from fedtailor.config import build, choices, load
from fedtailor.datasets import heart_disease
from fedtailor.errors import ConfigError, WireError
from fedtailor.recipe import Recipe
from fedtailor.strategy import Strategy
from fedtailor.wire import Report, Visit

MB = 2**20
DIGEST = "0" * 64


class Note(BaseModel):
    """A head."""

    text: str


def shelved(content):
    """A message as Flower stores it: its id, and every object's deflated bytes by id."""
    message = make_message(Metadata(1, "", 1, 2, "", "", 1000.0, 60.0, "train"), content)
    return message.object_id, {name: item.deflate() for name, item in get_all_nested_objects(message).items()}


def poured(root, shelf, limit=64 * MB):
    sink = io.BytesIO()
    head, size = wire.pour(root, shelf.__getitem__, sink, limit)
    assert size == len(sink.getvalue())
    return head, sink.getvalue()


def refused(code, match, root, shelf, limit=64 * MB):
    with pytest.raises(WireError, match=match) as error:
        poured(root, shelf, limit)
    assert error.value.code == code


def put(shelf, kind, body=b"", children=()):
    """An object written by hand, as somebody hostile would."""
    content = f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body
    name = hashlib.sha256(content).hexdigest()
    shelf[name] = content
    return name


def head_in(shelf):
    return put(shelf, "ConfigRecord", ConfigRecord({"json": "{}"}).deflate().partition(b"\0")[2])


# --- the contract with flwr ---


@pytest.mark.parametrize(
    "size",
    [0, 1, wire.INLINE, wire.INLINE + 1, wire.CHUNK, FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE * 2 + 3],
)
def test_what_is_poured_is_what_flowers_own_functions_inflate(size):
    payload = secrets.token_bytes(size)
    root, shelf = shelved(wire.record(Note(text="ein Kopf"), payload))
    for content in shelf.values():
        validate_object_content(content)
    content = inflate_object_from_contents(root, dict(shelf)).content
    theirs = wire.unpacked(content)
    assert poured(root, shelf) == theirs == ('{"text":"ein Kopf"}', payload)


def test_a_large_payload_comes_in_chunks_and_is_read_in_the_order_of_its_data():
    parts = [bytes([n]) * wire.CHUNK for n in (3, 1, 2)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0, 1]):
        payload = b"".join(parts[i] for i in order) + b"tail"
        root, shelf = shelved(wire.record(Note(text="x"), payload))
        chunks = [c for c in shelf.values() if c.startswith(b"ArrayChunk ")]
        assert len(chunks) == len(set(order)) + 1  # equal chunks travel once
        assert poured(root, shelf)[1] == payload


def test_one_chunk_is_in_memory_at_a_time():
    root, shelf = shelved(wire.record(Note(text="x"), secrets.token_bytes(12 * MB)))
    pieces = []
    wire.pour(root, shelf.__getitem__, SimpleNamespace(write=lambda piece: pieces.append(len(piece))), 12 * MB)
    assert pieces == [wire.CHUNK, wire.CHUNK, 12 * MB - 2 * wire.CHUNK]


# --- limits ---


def test_a_payload_of_the_agreed_size_passes_and_one_byte_more_does_not():
    root, shelf = shelved(wire.record(Note(text="x"), b"y" * 1000))
    assert poured(root, shelf, 1000)[1] == b"y" * 1000
    refused("oversized", "more than 999 bytes", root, shelf, 999)


def test_an_oversized_payload_is_never_written_beyond_the_limit():
    root, shelf = shelved(wire.record(Note(text="x"), secrets.token_bytes(12 * MB)))
    with pytest.raises(WireError):
        wire.pour(root, shelf.__getitem__, sink := io.BytesIO(), 6 * MB)
    assert len(sink.getvalue()) == wire.CHUNK <= 6 * MB


def test_an_oversized_head_is_refused():
    root, shelf = shelved(wire.record(Note(text="x" * (wire.HEAD_LIMIT + wire.INLINE)), b""))
    refused("oversized", "a head of", root, shelf)


def test_an_inlined_payload_has_the_same_limit():
    root, shelf = shelved(wire.record(Note(text="x"), b"y" * 1000))
    assert poured(root, shelf, limit=1000)[1] == b"y" * 1000
    refused("oversized", "more than 999 bytes", root, shelf, limit=999)


def test_a_small_payload_costs_three_objects_and_a_large_one_six():
    for size, objects in ((wire.INLINE, 3), (wire.INLINE + 1, 6)):
        assert len(shelved(wire.record(Note(text="x"), bytes(size)))[1]) == objects


def test_a_message_without_a_head_is_refused():
    array = Array(dtype="uint8", shape=(1,), stype=wire.STYPE, data=b"x")
    root, shelf = shelved(RecordDict({"payload": ArrayRecord({"a": array})}))
    refused("format", "without a head", root, shelf)


def test_a_pickled_or_numpy_payload_is_refused():
    record = wire.record(Note(text="x"), b"")
    record["payload"] = ArrayRecord([torch.zeros(3).numpy()])
    refused("format", "numpy.ndarray", *shelved(record))


def test_a_message_nested_deeper_than_flower_makes_them_is_refused():
    shelf = {}
    name = head_in(shelf)
    for _ in range(10):
        name = put(shelf, "RecordDict", b"", [name])
    refused("format", "deeper", name, shelf)


def test_a_message_that_repeats_its_parts_without_end_is_refused():
    """Each object is small; following all their references would take for ever."""
    shelf = {}
    name = head_in(shelf)
    for _ in range(4):
        name = put(shelf, "RecordDict", b"", [name] * 1000)
    calls = []

    def fetch(one):
        calls.append(one)
        assert len(calls) < 10_000, "it follows them all"
        return shelf[one]

    with pytest.raises(WireError) as error:
        wire.pour(name, fetch, io.BytesIO(), MB)
    assert error.value.code == "format"


GARBAGE = {
    "no divider": b"ArrayChunk  55",
    "nothing": b"",
    "no parts": b"Array\0{}",
    "length not a number": b"Array  x\0{}",
    "not text": b"\xff\xfe \xff 2\0{}",
    "no json": b"Array  1\0{",
    "no stype": b"Array  2\0{}",
    "json of another kind": b"Array  2\0[]",
    "json without bottom": b"Array  100000\0" + b"[" * 100_000,
    "a chunk that is not listed": b"Array  1\0" + json.dumps({"stype": wire.STYPE, "arraychunk_ids": [7]}).encode(),
    "no protobuf": b"ConfigRecord  4\0\xff\xff\xff\xff",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_an_object_that_is_malformed_is_a_wire_error(what):
    shelf = {"bad": GARBAGE[what]}
    root = put(shelf, "RecordDict", b"", [head_in(shelf), "bad"])
    refused("format", "not in Flower's format", root, shelf)


# --- salt, check, heads, summands ---


def test_salting_twice_gives_back_what_was_and_every_salt_looks_different():
    text = secrets.token_bytes(100) + bytes(100)
    one, two = secrets.token_hex(32), secrets.token_hex(32)
    assert wire.salted(one)(wire.salted(one)(text)) == text
    assert len({text, wire.salted(one)(text), wire.salted(two)(text)}) == 3
    stream = wire.salted(one)
    assert b"".join(stream(text[i : i + 7]) for i in range(0, 200, 7)) == wire.salted(one)(text)  # piece by piece


SPEC = {"a/w": (torch.float32, (2, 3)), "a/n": (torch.int64, ())}
GOOD = {"a/w": torch.ones(2, 3), "a/n": torch.tensor(1)}
BAD = {
    "keys": [GOOD | {"b": torch.ones(1)}, {"a/w": GOOD["a/w"]}, {}],
    "dtype": [GOOD | {"a/w": torch.ones(2, 3).double()}, GOOD | {"a/n": torch.tensor(1.0)}],
    "shape": [GOOD | {"a/w": torch.ones(3, 2)}, GOOD | {"a/w": torch.ones(1, 2, 3)}, GOOD | {"a/n": torch.ones(1).long()}],
    "nonfinite": [GOOD | {"a/w": GOOD["a/w"] * torch.tensor(bad)} for bad in (float("nan"), float("inf"), -float("inf"))],
}  # fmt: skip


def test_what_was_agreed_passes():
    leaving.check(GOOD, SPEC)
    assert leaving.spec_of(tree.unflatten(GOOD)) == SPEC
    assert len(save(GOOD)) <= leaving.size_limit(SPEC) < 32 + 4096 + 512 * 2 + 1


@pytest.mark.parametrize("code,flat", [(code, flat) for code, flats in BAD.items() for flat in flats])
def test_what_was_not_agreed_is_named_by_its_code(code, flat):
    with pytest.raises(WireError, match="missing" if code == "keys" else "^a/[wn] ") as error:
        leaving.check(flat, SPEC)
    assert error.value.code == code


@pytest.mark.parametrize("field,value", [("rows", "Jane Doe, 12.3.1960"), ("salt", "Jane Doe"), ("epsilon", "Jane Doe")])  # fmt: skip
def test_a_malformed_head_is_refused_without_repeating_its_values(field, value):
    good = {"run": "r", "round": 1, "rows": 2, "train_rows": 1, "summand_sha256": DIGEST, "salt": DIGEST}
    assert wire.parse_head(Report, json.dumps(good)).rows == 2
    with pytest.raises(WireError, match=field) as error:
        wire.parse_head(Report, json.dumps(good | {field: value}))
    assert error.value.code == "head" and "Doe" not in str(error.value)
    with pytest.raises(WireError, match="head"):
        wire.parse_head(Report, "Jane Doe")
    with pytest.raises(WireError, match="metrics.loss"):
        wire.parse_head(Report, json.dumps(good)[:-1] + ', "metrics": {"loss": NaN}}')


@pytest.fixture(scope="module")
def va():
    plan = load(["study=heart"]).plan
    return build(plan.recipe, Recipe).prepare(heart_disease()["va"].table())


@pytest.mark.parametrize("privacy", ["none", "record"])
@pytest.mark.parametrize("name", choices("strategy"))
def test_a_summand_is_what_local_training_really_reports(va, name, privacy):
    noise = ["privacy.noise_multiplier=2.0"] if privacy == "record" else []
    plan = load(
        ["study=heart", "local.steps=1", "recipe.model=mlp", f"strategy={name}", f"privacy={privacy}", *noise]
    ).plan
    strategy, start = build(plan.strategy, Strategy), recipes.initial(build(plan.recipe, Recipe), plan.seed)
    visit = Visit(run="r", round=0, train=True, evaluate=False, baseline=False, plan=plan.canonical(), cast_sha256=DIGEST)  # fmt: skip
    cast = strategy.broadcast(strategy.init(start))
    if strategy.needs_loss and plan.privacy is not None:
        with pytest.raises(ConfigError, match="does not cover"):
            perform(visit, cast, va, {}, site="va", key=bytes(32))
        return
    work = perform(visit, cast, va, {}, site="va", key=bytes(32))
    like = leaving.summand(plan, strategy, start)
    assert leaving.spec_of(like) == leaving.spec_of(work.summand)
    assert len(save({k: v.contiguous() for k, v in tree.flatten(work.summand).items()})) <= leaving.size_limit(leaving.spec_of(like))  # fmt: skip
    assert all(x.untyped_storage().nbytes() <= 8 for x in tree.leaves(like))  # shapes only


def test_chunks_of_another_size_are_read_too(monkeypatch):
    payload = secrets.token_bytes(11 * MB)
    monkeypatch.setattr(wire, "CHUNK", 3 * MB)
    root, shelf = shelved(wire.record(Note(text="x"), payload))
    monkeypatch.undo()
    assert sum(content.startswith(b"ArrayChunk ") for content in shelf.values()) == 4
    assert poured(root, shelf, len(payload))[1] == payload
