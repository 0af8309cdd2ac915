"""What an attacker on the network, at another site, or with Flower's own tools can reach: nothing."""

import base64
import contextlib
import hashlib
import json
import secrets
import socket
import ssl
import threading
import time

import httpx
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from safetensors.torch import load, save

from fedtailor import pki, seals, wire
from fedtailor.client.fleet import Closed, Fleet
from fedtailor.errors import ConnectionFailed
from fedtailor.invitation import ENROL, RENEW
from fedtailor.server import roster
from fedtailor.server.home import Home
from fedtailor.server.listener import FLEET
from fedtailor.server.superlink import SuperLink
from fedtailor.wire import Report, Visit

pytestmark = pytest.mark.deployment


@pytest.fixture
def site(deployment):
    """An HTTPS client with a valid certificate of the consortium."""
    keys = deployment.site_home("va") / "keys"
    context = ssl.create_default_context(cafile=str(keys / "ca.pem"))
    context.load_cert_chain(keys / "site.pem", keys / "site.key")
    with httpx.Client(base_url=f"https://127.0.0.1:{deployment.port}", verify=context, trust_env=False) as client:
        yield client


@pytest.fixture
def invited(deployment, tmp_path):
    """An HTTPS client with an invitation."""
    home = Home(deployment.server_home)
    made = roster.invite(home, "mallory")
    (tmp_path / "ca.pem").write_text(made.ca)
    (tmp_path / "both.pem").write_text(made.key + made.certificate)
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    context.load_cert_chain(tmp_path / "both.pem")
    with httpx.Client(base_url=f"https://127.0.0.1:{deployment.port}", verify=context, trust_env=False) as client:
        yield client
    roster.deny(home, "mallory")


def test_only_the_fleet_routes_renewal_and_health_answer(deployment, site, invited, tmp_path):
    """The whole route table of Flower's app, and every method of it: for a site, and for who has an invitation."""
    app = SuperLink(tmp_path / "flower.db", tmp_path / "transit").app
    paths = set(app.openapi()["paths"]) | {getattr(route, "path", "/") for route in app.routes}
    assert {"/v1/fleet/get-fab", "/v1/fleet/register-node"} <= paths and any("/control/" in path for path in paths)
    for path in sorted(paths | {"/docs", "/openapi.json", "/", ENROL, RENEW}):
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"):
            plain = path.replace("{", "").replace("}", "")
            status = invited.request(method, plain).status_code
            assert status == (400 if (method, path) == ("POST", ENROL) else 404), (method, path, status)
            status = site.request(method, plain).status_code
            if path == "/health" and method in ("GET", "HEAD"):
                assert status == 200
            elif path in FLEET | {RENEW} and method == "POST":
                assert status in (400, 401, 413, 415, 422), (path, status)
            else:
                assert status == 404, (method, path, status)


def test_a_request_of_unknown_or_great_length_is_refused(deployment, site):
    path = "/v1/fleet/push-object"
    key = base64.b64encode(pki.key_text(pki.public_key(deployment.site_home("va") / "keys" / "site.pem")).encode())
    headers = {"flwr-public-key": key.decode()}
    assert site.post(path, content=b"x" * (9 * 2**20), headers=headers).status_code == 413
    assert site.post(path, content=iter([b"x"]), headers=headers).status_code == 413


def test_a_peer_without_a_certificate_of_the_ca_gets_no_connection(deployment, tmp_path):
    pki.make_ca(tmp_path, "another CA")
    pki.issue(tmp_path, tmp_path, "site", "va", server=False, hosts=[])
    for certificate in (None, tmp_path):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if certificate:
            context.load_cert_chain(tmp_path / "site.pem", tmp_path / "site.key")
        with pytest.raises((httpx.TransportError, ssl.SSLError)):
            with httpx.Client(verify=context, trust_env=False) as client:
                client.get(f"https://127.0.0.1:{deployment.port}/health")


def test_plain_text_gets_no_answer(deployment):
    with socket.create_connection(("127.0.0.1", deployment.port), timeout=5) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP")


def test_a_node_key_that_was_not_registered_is_refused(deployment):
    """With a valid certificate, but another key in Flower's own authentication."""
    fleet = Fleet(f"127.0.0.1:{deployment.port}", deployment.site_home("va") / "keys")
    key = ec.generate_private_key(ec.SECP384R1())
    fleet.public = public_key_to_bytes(key.public_key())
    fleet.client._interceptors = (NodeAuthHttpInterceptor(key, key.public_key()),)
    with pytest.raises(ConnectionFailed):
        fleet.join(None)


def test_a_session_stolen_from_another_site_is_of_no_use(deployment):
    """With VA's certificate, and all of Cleveland's key and session."""
    fleet = Fleet(f"127.0.0.1:{deployment.port}", deployment.site_home("va") / "keys")
    key = pki.load_key(deployment.site_home("cleveland") / "keys" / "site.key")
    fleet.public = public_key_to_bytes(key.public_key())
    fleet.client._interceptors = (NodeAuthHttpInterceptor(key, key.public_key()),)
    state = json.loads((deployment.site_home("cleveland") / "state" / "node.json").read_text())
    fleet.node = Node(node_id=state["node_id"])
    for act in (fleet.receive, fleet.beat):
        with pytest.raises(ConnectionFailed, match="does not accept this site's signature"):
            act()


def test_a_server_of_another_consortium_is_not_trusted(deployment, tmp_path):
    keys = tmp_path / "keys"
    pki.make_ca(tmp_path, "another CA")
    pki.issue(tmp_path, keys, "site", "va", server=False, hosts=[])
    with pytest.raises(ConnectionFailed, match="certificate"):
        Fleet(f"127.0.0.1:{deployment.port}", keys).join(None)


def test_a_wrong_port_is_explained(deployment):
    with pytest.raises(ConnectionFailed, match="port"):
        Fleet("127.0.0.1:9", deployment.site_home("va") / "keys").join(None)


def test_flowers_own_tools_start_no_run_and_ship_no_app(deployment, site):
    """What `flwr run` and `flwr ls` send."""
    for path, request in (("start-run", StartRunRequest()), ("list-runs", ListRunsRequest())):
        headers = {"content-type": "application/protobuf"}
        assert site.post(f"/v1/control/{path}", content=request.SerializeToString(), headers=headers).status_code == 404
    assert site.post("/v1/runtime/acquire-task", content=b"").status_code == 404


def test_a_run_injected_into_the_database_reaches_no_site(deployment, tmp_path):
    """Even somebody who can write to Flower's state cannot make a site run an app: it asks for none, and refuses."""
    from flwr.app import ConfigRecord, RecordDict

    link = SuperLink(deployment.server_home / "flower.db", tmp_path / "transit")
    before = deployment.ask_site("va", "Status")
    run, task = link.open_run()
    node = link.nodes()["va"].node_id
    link.push(run, {node: RecordDict({"fab": ConfigRecord({"code": "import os"})})}, 60)
    time.sleep(3)
    after = deployment.ask_site("va", "Status")
    assert after["worker_pid"] == before["worker_pid"] and after["bytes_sent"] == before["bytes_sent"]
    link.close_run(run, task)


# --- a site that cheats: the test plays VA's daemon ---


class Cheat(threading.Thread):
    """Answers every visit with what ``make`` makes of the honest answer's shape."""

    def __init__(self, deployment, make):
        super().__init__(daemon=True)
        self.fleet = Fleet(f"127.0.0.1:{deployment.port}", deployment.site_home("va") / "keys")
        self.make, self.ending = make, threading.Event()
        self.key = pki.load_key(deployment.site_home("va") / "keys" / "site.key")
        self.fleet.join(self.node(deployment))

    @staticmethod
    def node(deployment):
        return int(json.loads((deployment.site_home("va") / "state" / "node.json").read_text())["node_id"])

    def run(self):
        while not self.ending.is_set():
            got = self.fleet.receive()
            if got is None:
                continue
            import io

            sink = io.BytesIO()
            head, _ = wire.pour(got[1], self.fleet.fetch(got[0]), sink, 2**24)
            visit = Visit.model_validate_json(head)
            witness = seals.sign(self.key, "witness", visit.witnessed())
            if not (visit.train or visit.evaluate):  # it agrees to the proposal like any other site
                payload = save({})
                honest = report(visit, witness=witness, summand_sha256=hashlib.sha256(payload).hexdigest())
                self.fleet.answer(got[0], wire.record(honest, wire.salted(honest.salt)(payload)), 0.1)
                continue
            cast = load(sink.getvalue())
            delta = {name.replace("params/", "delta/"): torch.zeros_like(x) for name, x in cast.items()}
            honest = {**delta, "weight": torch.tensor(134.0)} if visit.train else {}
            payload, said = self.make(honest, visit)
            if said is not None:
                named = hashlib.sha256(payload).hexdigest()
                said = said.model_copy(update={"witness": witness} | ({"summand_sha256": named} if said.rows else {}))
                with contextlib.suppress(Closed):  # what is announced as too large is refused before it is here
                    self.fleet.answer(got[0], wire.record(said, wire.salted(said.salt)(payload)), 0.1)

    def close(self):
        self.ending.set()
        self.join(timeout=10)
        self.fleet.leave()


def report(visit, **changed):
    salt, digest = secrets.token_hex(32), "0" * 64
    fields = {
        "run": visit.run,
        "round": visit.round,
        "rows": 200,
        "train_rows": 134,
        "summand_sha256": digest,
        "salt": salt,
    }
    return Report(**(fields | changed))


CHEATS = {
    "nonfinite": lambda flat, visit: (
        save({k: torch.full_like(x, float("nan")) for k, x in flat.items()}),
        report(visit),
    ),
    "shape": lambda flat, visit: (save({k: x.reshape(1, *x.shape) for k, x in flat.items()}), report(visit)),
    "dtype": lambda flat, visit: (save({k: x.double() for k, x in flat.items()}), report(visit)),
    "keys": lambda flat, visit: (save(flat | {"delta/extra": torch.zeros(2)}), report(visit)),
    "format": lambda flat, visit: (b"\x80\x04pickle", report(visit)),
    "oversized": lambda flat, visit: (  # in the first round it arrives; in the second its announcement is too long
        save({k: torch.zeros(2 ** (20 + 2 * visit.round)) for k in flat} or {"x": torch.zeros(2**21)}),
        report(visit),
    ),
    "round": lambda flat, visit: (save(flat), report(visit, round=visit.round + 1)),
    "digest": lambda flat, visit: (save(flat), report(visit, rows=0)),  # its report keeps naming another payload
    "late": lambda flat, visit: (b"", None),
}


OFTEN = ("nonfinite", "keys", "oversized")


@pytest.mark.parametrize("code", [c if c in OFTEN else pytest.param(c, marks=pytest.mark.slow) for c in CHEATS])
def test_a_bad_reply_is_dropped_and_named_and_the_round_goes_on(deployment, code):
    deployment.processes["va"].terminate()
    deployment.processes["va"].wait()
    cheat = Cheat(deployment, CHEATS[code])
    cheat.start()
    try:
        soon = 4 if code == "late" else 15  # the honest site's training process may have to start first
        run = deployment.submit(deployment.plan("privacy=none", "rounds=2", "quorum=1", f"deadline_s={soon}"))
        result = deployment.finish(run)
    finally:
        cheat.close()
        deployment.start("va")
    named = {(d["site"], d["round"]): d["code"] for d in result["dropped"]}
    assert named["va", 0] == named["va", 1] == code
    assert "va" not in result["sites"] or not result["sites"]["va"]["metrics"]["federated"]
    assert result["sites"]["cleveland"]["metrics"]["federated"]["auroc"] is not None


def test_a_run_whose_every_site_failed_ends_as_failed(deployment):
    plan = deployment.plan("rounds=1", "privacy.epsilon=0.5", "privacy.noise_multiplier=0.5")  # promises too much
    run = deployment.submit(plan)
    deployment.until(lambda: deployment.status(run)["status"] == "failed", 60, "the run fails")
    assert "epsilon" in deployment.status(run)["detail"]
