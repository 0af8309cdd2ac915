"""The one door to Flower's SuperLink, on a real one: the names it uses exist, and messages go there and back."""

import ast
import importlib
import io
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.object_store.object_store import NoObjectInStoreError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from pydantic import BaseModel

import fedtailor.server
from fedtailor import wire
from fedtailor.errors import WireError
from fedtailor.server import superlink
from fedtailor.server.spill import SMALL, SpillStore
from fedtailor.server.superlink import SuperLink, seldom

KEYS = [public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key()) for _ in range(2)]
BIG = 3 * SMALL  # bytes of a payload that goes to disk


class Head(BaseModel):
    """A head."""

    text: str = "x"


@pytest.fixture
def link(tmp_path):
    return SuperLink(tmp_path / "flower.db", tmp_path / "transit")


@pytest.fixture
def nodes(link):
    """Two sites, registered and online."""
    ids = [link.register(name, key) for name, key in zip(("a", "b"), KEYS, strict=True)]
    assert all(link.state.activate_node(node, 30) for node in ids)
    return ids


def spilled(link):
    return len(list(link.store.folder.iterdir()))


def read(link, run, message_id):
    sink = io.BytesIO()
    head, _ = wire.pour(message_id, link.fetch(run), sink, 2**24)
    return head, sink.getvalue()


def reply(link, run, node, question, content, upload=True):
    """What a site's daemon does through the fleet routes: announce a reply, then store its objects."""
    metadata = Metadata(run, "", node, SUPERLINK_NODE_ID, question, "", link.asked_at, 60.0, "train")
    made = make_message(metadata, error=content) if isinstance(content, Error) else make_message(metadata, content)
    made.metadata.__dict__["_message_id"] = made.object_id
    objects = get_all_nested_objects(made)
    session = link.state.start_session(run)
    header = remove_content_from_message(made)
    stored, missing = link.state.store_message_and_object_tree(header, get_object_tree(made), session)
    assert stored
    if upload:
        assert all(link.state.store_object(run, session, one, objects[one].deflate()) for one in missing)
    return made.object_id


def push(link, run, nodes, payload=b"cast" * SMALL):
    sent = link.push(run, dict.fromkeys(nodes, wire.record(Head(text="visit"), payload)), 60.0)
    link.asked_at = link.state.get_message_ins(nodes[0], 1)[0].metadata.created_at  # nodes[0] has pulled its message
    return sent


@pytest.mark.parametrize("module", ["superlink", "spill"])
def test_every_name_of_flower_that_is_used_exists(module):
    found = 0
    text = (Path(fedtailor.server.__file__).parent / f"{module}.py").read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("flwr"):
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module), alias.name), f"{node.module}.{alias.name}"
                found += 1
    assert found >= 4


def test_a_key_has_one_node_id_for_ever(link, tmp_path):
    first = link.register("a", KEYS[0])
    assert link.register("a", KEYS[0]) == first != link.register("b", KEYS[1])
    assert SuperLink(tmp_path / "flower.db", tmp_path / "transit").register("a", KEYS[0]) == first
    assert {name: (n.node_id, n.online) for name, n in link.nodes().items()}["a"] == (first, False)


def test_a_key_that_was_unregistered_is_unknown(link, nodes):
    link.unregister(KEYS[0])
    assert link.state.get_node_id_by_public_key(KEYS[0]) is None and set(link.nodes()) == {"b"}
    link.unregister(KEYS[0])  # and again


def test_a_site_that_joins_anew_shows(link, nodes):
    before = link.nodes()["a"]
    assert before.online
    assert link.state.deactivate_node(nodes[0]) and not link.nodes()["a"].online
    assert link.state.activate_node(nodes[0], 30)
    after = link.nodes()["a"]
    assert after.online and after.activated_at != before.activated_at and after.node_id == before.node_id


def test_a_message_reaches_both_sites_and_its_replies_come_back(link, nodes):
    run, task = link.open_run()
    sent = push(link, run, nodes)
    assert set(sent) == set(nodes) and len(set(sent.values())) == 2
    assert spilled(link) == 1  # one chunk, which the two messages share
    assert link.missing(list(sent.values())) == []
    for message_id in sent.values():
        assert read(link, run, message_id) == ('{"text":"visit"}', b"cast" * SMALL)
    assert link.replies(run, set(sent.values())) == []
    content = wire.record(Head(text="report"), b"mine" * SMALL)
    answer = reply(link, run, nodes[0], sent[nodes[0]], content)
    refusal = reply(link, run, nodes[1], sent[nodes[1]], Error(100, "budget"))
    found = {r.reply_to: r for r in link.replies(run, set(sent.values()))}
    assert found[sent[nodes[0]]] == (answer, sent[nodes[0]], None, False)
    assert found[sent[nodes[1]]] == (refusal, sent[nodes[1]], "budget", False)
    assert link.replies(run, set(sent.values())) == []  # each is returned once
    ids = link.objects(answer, 100)
    assert ids[-1] == answer and len(ids) == 6 and link.missing(ids) == []
    assert read(link, run, answer) == ('{"text":"report"}', b"mine" * SMALL)
    link.forget(list(sent.values()), [answer, refusal])
    assert len(link.store) == spilled(link) == 0
    assert link.state.num_message_ins() == link.state.num_message_res() == 0
    assert link.objects(answer, 100) is None and link.missing(ids) is None
    link.close_run(run, task)


def test_forgetting_one_sites_message_leaves_the_others(link, nodes):
    run, _ = link.open_run()
    sent = push(link, run, nodes)
    link.forget([sent[nodes[0]]])
    assert spilled(link) == 1 and read(link, run, sent[nodes[1]])[1] == b"cast" * SMALL
    link.forget([sent[nodes[1]]])
    assert len(link.store) == spilled(link) == 0


def test_what_is_on_its_way_is_missing_and_cannot_be_read(link, nodes):
    run, _ = link.open_run()
    sent = push(link, run, nodes)
    answer = reply(link, run, nodes[0], sent[nodes[0]], wire.record(Head(), b"x" * BIG), upload=False)
    ids = link.objects(answer, 100)
    assert link.missing(ids) == ids
    with pytest.raises(WireError, match="missing") as error:
        read(link, run, answer)
    assert error.value.code == "format"


def test_a_reply_of_too_many_objects_is_refused_before_any_is_read(link, nodes):
    run, _ = link.open_run()
    sent = push(link, run, nodes)
    answer = reply(link, run, nodes[0], sent[nodes[0]], wire.record(Head(), b""))
    assert len(link.objects(answer, 3)) == 3
    with pytest.raises(WireError, match="3 objects") as error:
        link.objects(answer, 2)
    assert error.value.code == "oversized"


def test_flowers_own_word_that_a_site_is_gone_is_lost_and_no_answer(link, nodes):
    run, _ = link.open_run()
    sent = push(link, run, nodes)
    link.state.deactivate_node(nodes[1])
    (gone,) = link.replies(run, set(sent.values()))
    assert (gone.reply_to, gone.lost) == (sent[nodes[1]], True)
    link.forget([sent[nodes[0]]])
    (unknown,) = link.replies(run, {sent[nodes[0]]})
    assert unknown.lost and unknown.reply_to == sent[nodes[0]]


def test_closing_a_run_deletes_everything_of_it(link, nodes):
    run, task = link.open_run()
    link.keep_alive(task)
    push(link, run, nodes)
    link.close_run(run, task)
    assert len(link.store) == spilled(link) == link.state.num_message_ins() == 0
    assert [info.run_id for info in link.state.get_run_info(statuses=["running"])] == []
    with pytest.raises(WireError) as error:
        link.push(run, dict.fromkeys(nodes, wire.record(Head(), b"")), 60.0)
    assert error.value.code == "push"


def test_a_site_that_is_unregistered_is_not_sent_anything_and_the_others_are(link, nodes):
    run, _ = link.open_run()
    link.unregister(KEYS[1])
    sent = push(link, run, nodes)
    assert list(sent) == nodes[:1] and link.state.num_message_ins() == 1


def test_a_restart_closes_the_runs_that_were_open_and_empties_the_spool(link, nodes, tmp_path):
    run, _ = link.open_run()
    sent = push(link, run, nodes)
    again = SuperLink(tmp_path / "flower.db", tmp_path / "transit")
    assert spilled(again) == 0
    again.close_stale_runs()
    assert not again.state.get_run_info(statuses=["pending", "starting", "running"])
    assert again.state.num_message_ins() == 0 and sent
    fresh, task = again.open_run()
    assert fresh != run
    assert set(push(again, fresh, nodes)) == set(nodes)
    again.close_run(fresh, task)


def test_seldom_calls_at_once_and_then_not_for_a_while():
    calls = []
    often, hourly = seldom(lambda: calls.append(1), 0.0), seldom(lambda: calls.append(2), 3600.0)
    for call in (often, often, hourly, hourly):
        call()
    assert calls == [1, 1, 2]


# --- the store ---


def test_large_objects_lie_in_files_of_their_owner_alone(link, nodes):
    run, _ = link.open_run()
    push(link, run, nodes, b"x" * (SMALL - 100))
    assert spilled(link) == 0
    push(link, run, nodes, b"x" * SMALL)  # with its head it is larger
    (file,) = link.store.folder.iterdir()
    assert link.store.get(file.name) == file.read_bytes()
    assert stat.S_IMODE(link.store.folder.stat().st_mode) == 0o700
    link.store.clear()
    assert spilled(link) == len(link.store) == 0


def test_an_object_that_was_not_announced_or_is_another_is_not_stored(tmp_path):
    store = SpillStore(tmp_path / "transit")
    content = f"ArrayChunk  {BIG}".encode() + b"\0" + b"x" * BIG
    with pytest.raises(NoObjectInStoreError):
        store.put(get_object_id(content), content)
    name = "0" * 64
    store.preregister(1, ObjectTree(object_id=name))
    with pytest.raises(ValueError, match="content hash"):
        store.put(name, content)
    assert store.get(name) == b"" and store.missing([name]) == [name] and not list(store.folder.iterdir())


def test_a_store_that_starts_empties_its_folder(tmp_path):
    (tmp_path / "transit").mkdir()
    (tmp_path / "transit" / "left").write_bytes(b"an update of an earlier process")
    store = SpillStore(tmp_path / "transit")
    assert not list(store.folder.iterdir())


def test_of_flowers_middleware_only_what_a_fleet_route_needs_is_left(tmp_path, monkeypatch):
    """Node authentication must be among it; a layer that a new flwr adds must be looked at before it is left out."""
    made = []

    def kept(*arguments):
        app = create_app(*arguments)
        made.extend(layer.cls.__name__ for layer in app.user_middleware)
        return app

    create_app = superlink.create_app
    monkeypatch.setattr(superlink, "create_app", kept)
    link = SuperLink(tmp_path / "flower.db", tmp_path / "transit")
    assert made == ["ControlSensitiveResponseMiddleware", "BaseHTTPMiddleware", "ControlAuthenticationMiddleware",
                     "ControlLicenseMiddleware", "ProtobufTranslationMiddleware", "RuntimeTracingMiddleware",
                     "ControlEventLogMiddleware", "NodeAuthMiddleware", "FleetEventLogMiddleware"]  # fmt: skip
    left = [layer.cls.__name__ for layer in link.app.user_middleware]
    assert left == ["BaseHTTPMiddleware", "ProtobufTranslationMiddleware", "NodeAuthMiddleware"]
