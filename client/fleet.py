"""The one door to Flower's fleet connection: this daemon is a Flower node, and sends what it chooses to send.

It never asks for a run's FAB, so no code can arrive. Every name imported from flwr here is internal to it;
tests/client/test_fleet.py fails when a new flwr moves one.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import httpx
from flwr.app import Error, RecordDict
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedtailor import pki
from fedtailor.client.connection import SAID, TIMEOUT_S, by_proxy, failed, tls
from fedtailor.errors import ConnectionFailed, WireError

LONGEST_S = 7200.0  # for a message to arrive: 2 GB at 300 kB/s
HEARTBEAT_S = 10  # Flower's least; a site is taken for gone after twice that
REFUSED = 100  # the code of every error we send; its reason is a code word


class Envelope(NamedTuple):
    """Where a message came from and where its answer goes."""

    flower_run: int
    message_id: str
    created_at: float  # by the coordinator's clock, which may differ from ours
    ttl: float
    received_at: float  # by our clock

    @property
    def expires(self) -> float:
        """Seconds since the epoch, by our clock, after which nobody waits for an answer."""
        return self.received_at + self.ttl


class Closed(Exception):
    """The coordinator no longer takes an answer to this message."""


class Fleet:
    """A connection to the coordinator as a Flower node, over mutual TLS."""

    def __init__(self, server: str, keys: Path) -> None:
        self.server, self.keys = server, keys
        self.context = tls(keys / "ca.pem", keys / "site.pem", keys / "site.key")
        self.load()
        private = pki.load_key(keys / "site.key")
        self.public = public_key_to_bytes(private.public_key())
        interceptors: list[ProtobufClientInterceptor] = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(private, private.public_key()),
        ]
        with by_proxy():
            self.client = FleetHttpClient(
                f"https://{server}", interceptors=interceptors, verify=self.context, timeout=TIMEOUT_S
            )
        self.node: Node | None = None

    def load(self) -> None:
        """Take up the certificate that lies in the folder of keys: for connections that are opened from now on."""
        self.context.load_cert_chain(self.keys / "site.pem", self.keys / "site.key")
        self.certificate = pki.read_certificate((self.keys / "site.pem").read_text())

    def _failed(self, error: httpx.HTTPError) -> ConnectionFailed:
        """What to say of a failed request. A site that is shut out has no session left to keep alive."""
        made = failed(error, self.server)
        if time.time() > pki.ends(self.certificate):
            made = ConnectionFailed(SAID["expired"].format(server=self.server), code="expired")
        if made.code in SAID:
            self.node = None
        return made

    def join(self, last_node_id: int | None) -> int:
        """Become online. A session that an earlier process of this site left open is ended first.

        Raises:
            ConnectionFailed: with what to check.
        """
        try:
            if last_node_id is not None:
                try:
                    self.client.DeactivateNode(DeactivateNodeRequest(node_id=last_node_id))
                except httpx.HTTPStatusError:
                    pass  # it was offline already
            request = ActivateNodeRequest(public_key=self.public, heartbeat_interval=HEARTBEAT_S)
            self.node = Node(node_id=self.client.ActivateNode(request).node_id)
        except httpx.HTTPError as error:
            raise self._failed(error) from error
        return int(self.node.node_id)

    def leave(self) -> None:
        """Become offline, as far as that can still be said."""
        if self.node is not None:
            try:
                self.client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))
            except (httpx.HTTPError, RuntimeError):
                pass
            self.node = None

    def beat(self) -> None:
        """Tell the coordinator that this site is here."""
        request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_S)
        try:
            if not self.client.SendNodeHeartbeat(request).success:
                raise ConnectionFailed("the coordinator no longer knows this site's session; joining again")
        except httpx.HTTPError as error:
            raise self._failed(error) from error

    def receive(self) -> tuple[Envelope, str] | None:
        """The next message's envelope and root object, or None. The coordinator may hold the question for seconds."""
        try:
            answer = self.client.PullMessages(PullMessagesRequest(node=self.node))
        except httpx.HTTPError as error:
            raise self._failed(error) from error
        if not answer.messages_list:
            return None
        meta = message_from_proto(answer.messages_list[0]).metadata
        return Envelope(meta.run_id, meta.message_id, meta.created_at, meta.ttl, time.time()), meta.message_id

    def fetch(self, envelope: Envelope) -> Callable[[str], bytes]:
        """How to read an object of a message."""

        def read(object_id: str) -> bytes:
            # A coordinator could drip a message for ever, and says itself how long it lives.
            if time.time() > min(envelope.expires, envelope.received_at + LONGEST_S):
                raise WireError("the coordinator's message did not arrive in its time", code="time")
            request = PullObjectRequest(node=self.node, run_id=envelope.flower_run, object_id=object_id)
            for _ in range(600):
                try:
                    answer = self.client.PullObject(request)
                except httpx.HTTPError as error:
                    raise self._failed(error) from error
                if answer.object_available:
                    return answer.object_content
                if not answer.object_found:
                    break
                time.sleep(0.1)
            raise WireError("a part of the coordinator's message is missing", code="format")

        return read

    def confirm(self, envelope: Envelope) -> None:
        """Tell the coordinator that the message is safe on this site's disk."""
        request = ConfirmMessageReceivedRequest(
            node=self.node, run_id=envelope.flower_run, message_object_id=envelope.message_id
        )
        try:
            self.client.ConfirmMessageReceived(request)
        except httpx.HTTPStatusError:
            pass  # the run is over; the answer will be refused and forgotten
        except httpx.HTTPError as error:
            raise self._failed(error) from error

    def answer(self, envelope: Envelope, content: RecordDict | str, seconds: float) -> int:
        """Send a reply: content, or an error's code word. Only the airlock calls this. Returns the bytes sent.

        Raises:
            Closed: if the coordinator no longer takes it.
            ConnectionFailed: if it cannot be reached; the reply may be sent again.
        """
        assert self.node is not None
        # The times are the question's own: it is by the coordinator's clock that the answer is late or not.
        meta = Metadata(envelope.flower_run, "", self.node.node_id, SUPERLINK_NODE_ID, envelope.message_id, "",
                        envelope.created_at, envelope.ttl, "train")  # fmt: skip
        if isinstance(content, str):
            message = make_message(meta, error=Error(REFUSED, content))
        else:
            message = make_message(meta, content)
        sent = 0
        try:
            with no_object_id_recompute():
                message.metadata.__dict__["_message_id"] = message.object_id
                objects, tree = get_all_nested_objects(message), get_object_tree(message)
                header = message_to_proto(remove_content_from_message(message))
                pushed = self.client.PushMessages(
                    PushMessagesRequest(
                        node=self.node,
                        messages_list=[header],
                        message_object_trees=[tree],
                        clientapp_runtime_list=[seconds],
                    )
                )
                for object_id in pushed.objects_to_push:
                    body = objects[object_id].deflate()
                    sent += len(body)
                    stored = self.client.PushObject(
                        PushObjectRequest(
                            node=self.node,
                            run_id=envelope.flower_run,
                            session_id=pushed.session_id,
                            object_id=object_id,
                            object_content=body,
                        )
                    )
                    if not stored.stored:
                        raise Closed
        except httpx.HTTPStatusError as error:
            if error.response.status_code >= 500:  # its disk is full, or a proxy lost it: it may be sent again
                raise self._failed(error) from error
            raise Closed from error
        except httpx.HTTPError as error:
            raise self._failed(error) from error
        return sent


def keep_beating(fleet: Fleet, lost: threading.Event, stop: threading.Event) -> None:
    """Send heartbeats until ``stop``; set ``lost`` when the session is gone. Runs in a thread of its own."""
    while not stop.wait(HEARTBEAT_S * 0.7):
        try:
            if fleet.node is not None:
                fleet.beat()
        except Exception:  # a coordinator's answer that is none, too: joining again says what is wrong
            lost.set()
