"""The one door to Flower's fleet connection, against Flower's own SuperLink in this process: no network."""

import ast
import asyncio
import datetime as dt
import importlib
import io
import threading
from pathlib import Path

import httpx
import pytest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode import node_auth_http_interceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from pydantic import BaseModel

import fedtailor.client
from fedtailor import pki, wire
from fedtailor.client import fleet as fleets
from fedtailor.client.fleet import Closed, Envelope, Fleet, keep_beating
from fedtailor.errors import ConfigError, ConnectionFailed, WireError
from fedtailor.server.listener import FLEET, Bell, public
from fedtailor.server.superlink import SuperLink


class Head(BaseModel):
    """A head."""

    text: str


class Loopback(httpx.BaseTransport):
    """Requests go straight to the app. ``failing`` answers a path with a status or an exception instead."""

    def __init__(self, app):
        self.app, self.paths, self.failing = app, [], {}

    def handle_request(self, request):
        path = request.url.path
        self.paths.append(path)
        if path in self.failing:
            failure = self.failing[path]
            if isinstance(failure, int):
                return httpx.Response(failure)
            raise failure

        async def ask():
            answer = await httpx.ASGITransport(self.app).handle_async_request(request)
            return httpx.Response(answer.status_code, headers=answer.headers, content=await answer.aread())

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The keys of a site, and of a site of another consortium."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("a", "stranger"):
        pki.make_ca(folder / f"ca of {name}", "CA")
        pki.issue(folder / f"ca of {name}", folder / name, "site", name, server=False, hosts=[])
    return folder


@pytest.fixture
def link(tmp_path, keys):
    it = SuperLink(tmp_path / "flower.db", tmp_path / "transit")
    it.register("a", public_key_to_bytes(pki.public_key(keys / "a" / "site.pem")))
    return it


@pytest.fixture
def connect(link, keys):
    made = []

    def connected(name="a"):
        fleet = Fleet("hub.example:8443", keys / name)
        fleet.wire = Loopback(public(link.app, Bell(), patience=0.0))
        fleet.client._client.close()
        fleet.client._client = httpx.Client(transport=fleet.wire)
        made.append(fleet)
        return fleet

    yield connected
    for fleet in made:
        fleet.client.close()


@pytest.fixture
def fleet(connect):
    it = connect()
    it.join(None)
    return it


def test_every_name_of_flower_that_is_used_exists():
    found = 0
    for node in ast.walk(ast.parse((Path(fedtailor.client.__file__).parent / "fleet.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("flwr"):
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module), alias.name), f"{node.module}.{alias.name}"
                found += 1
    assert found > 20
    client = FleetHttpClient("https://127.0.0.1:1")
    assert client._client.timeout and client._interceptors == ()
    client.close()


def test_a_message_is_received_confirmed_and_answered(fleet, link):
    assert link.nodes()["a"].online and fleet.receive() is None
    run, task = link.open_run()
    (question,) = link.push(run, {fleet.node.node_id: wire.record(Head(text="visit"), b"cast" * 50_000)}, 60.0).values()
    envelope, root = fleet.receive()
    assert root == envelope.message_id == question and envelope.flower_run == run and envelope.ttl == 60.0
    assert envelope.expires == envelope.received_at + 60.0
    sink = io.BytesIO()
    head, size = wire.pour(root, fleet.fetch(envelope), sink, 10**6)
    assert (head, size, sink.getvalue()) == ('{"text":"visit"}', 200_000, b"cast" * 50_000)
    fleet.confirm(envelope)
    fleet.beat()
    sent = fleet.answer(envelope, wire.record(Head(text="report"), b"mine" * 50_000), 0.5)
    (reply,) = link.replies(run, {question})
    assert (reply.reply_to, reply.error, reply.lost) == (question, None, False)
    back = io.BytesIO()
    assert wire.pour(reply.message_id, link.fetch(run), back, 10**6)[0] == '{"text":"report"}'
    assert back.getvalue() == b"mine" * 50_000 and 200_000 < sent < 202_000
    fleet.leave()
    assert not link.nodes()["a"].online and fleet.node is None
    link.close_run(run, task)
    assert set(fleet.wire.paths) <= FLEET and not [p for p in fleet.wire.paths if "fab" in p or "run" in p]


def test_a_refusal_carries_its_code_word_only(fleet, link):
    run, _ = link.open_run()
    (question,) = link.push(run, {fleet.node.node_id: wire.record(Head(text="visit"), b"")}, 60.0).values()
    envelope, _ = fleet.receive()
    assert fleet.answer(envelope, "budget", 0.0) > 0
    (reply,) = link.replies(run, {question})
    assert reply.error == "budget" and not reply.lost


def test_an_answer_that_nobody_waits_for_is_closed(fleet, link):
    run, task = link.open_run()
    link.push(run, {fleet.node.node_id: wire.record(Head(text="visit"), b"")}, 60.0)
    envelope, root = fleet.receive()
    link.close_run(run, task)
    with pytest.raises(Closed):
        fleet.answer(envelope, "budget", 0.0)
    fleet.confirm(envelope)  # nothing to be done about it either
    with pytest.raises((WireError, ConnectionFailed)):
        fleet.fetch(envelope)(root)


def test_an_answer_may_be_sent_again_after_the_connection_failed_in_it(fleet, link):
    run, _ = link.open_run()
    (question,) = link.push(run, {fleet.node.node_id: wire.record(Head(text="visit"), b"")}, 60.0).values()
    envelope, _ = fleet.receive()
    content = wire.record(Head(text="report"), b"x" * 100_000)
    for failure in (503, httpx.ReadTimeout("slow")):
        fleet.wire.failing = {"/v1/fleet/push-object": failure}
        with pytest.raises(ConnectionFailed):
            fleet.answer(envelope, content, 0.5)
    fleet.wire.failing = {}
    fleet.answer(envelope, content, 0.5)
    (reply,) = link.replies(run, {question})
    sink = io.BytesIO()
    wire.pour(reply.message_id, link.fetch(run), sink, 10**6)
    assert sink.getvalue() == b"x" * 100_000


def test_a_daemon_that_was_killed_ends_its_old_session_when_it_joins(fleet, connect, link):
    before = link.nodes()["a"]
    again = connect()  # the same key, while the first session is open
    with pytest.raises(ConnectionFailed, match="earlier session"):
        again.join(None)
    assert again.join(fleet.node.node_id) == before.node_id
    assert link.nodes()["a"].online and link.nodes()["a"].activated_at != before.activated_at


def test_a_key_that_was_not_admitted_is_refused(connect):
    with pytest.raises(ConnectionFailed, match="does not (know|accept) this site's"):
        connect("stranger").join(None)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_an_hour_off_is_explained(connect, monkeypatch, hours):
    real = node_auth_http_interceptor.now
    fleet = connect()
    with monkeypatch.context() as patch:
        patch.setattr(node_auth_http_interceptor, "now", lambda: real() + dt.timedelta(hours=hours))
        with pytest.raises(ConnectionFailed, match="is the clock right"):
            fleet.join(None)
    assert fleet.join(None)


@pytest.mark.parametrize("damage", ["missing", "garbage", "another key", "readable"])
def test_keys_that_cannot_be_used_are_named(keys, tmp_path, damage):
    for name in ("ca.pem", "site.pem", "site.key"):
        (tmp_path / name).write_bytes((keys / "a" / name).read_bytes())
        (tmp_path / name).chmod(0o600)
    if damage == "missing":
        (tmp_path / "ca.pem").unlink()
    elif damage == "garbage":
        (tmp_path / "site.pem").write_text("no certificate")
    elif damage == "another key":
        (tmp_path / "site.key").write_bytes((keys / "stranger" / "site.key").read_bytes())
    else:
        (tmp_path / "site.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600" if damage == "readable" else f"keys in {tmp_path}"):
        Fleet("hub.example:8443", tmp_path)


def test_a_session_that_is_gone_is_told_by_the_heartbeat(fleet, link, monkeypatch):
    monkeypatch.setattr(fleets, "HEARTBEAT_S", 0.001)
    lost, stop = threading.Event(), threading.Event()
    fleet.wire.failing = {"/v1/fleet/send-node-heartbeat": 412}
    monkeypatch.setattr(lost, "set", stop.set)
    keep_beating(fleet, lost, stop)  # returns, because the first beat fails
    assert stop.is_set() and Envelope(1, "m", 1.0, 2.0, 3.0).expires == 5.0
