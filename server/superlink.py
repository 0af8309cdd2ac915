"""The one door to Flower's SuperLink: its app, its LinkState, and messages pushed and pulled straight on it.

Nothing of Flower's Control or Runtime API, no SuperExec and no FAB takes part. Every name imported from flwr here is
internal to it; tests/server/test_superlink.py fails when a new flwr moves one.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from flwr.app import RecordDict
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware

from fedtailor.errors import WireError
from fedtailor.server.spill import SpillStore

LOST = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)


class Node(NamedTuple):
    """A site as Flower knows it."""

    node_id: int
    online: bool
    activated_at: str  # changes when the site's daemon joins anew


class Reply(NamedTuple):
    """The head of an answer; its objects may still be on their way."""

    message_id: str
    reply_to: str
    error: str | None  # a code from the site; None: it answers with content
    lost: bool = False  # Flower's own word that the site or the message is gone: ask again


class SuperLink:
    """Flower's SuperLink as a library: ``app`` to serve, and the LinkState to drive."""

    def __init__(self, database: Path, spool: Path) -> None:
        config = SuperLinkLifespanConfig(
            control_address="",
            health_server_address=None,
            host="127.0.0.1",
            port=0,  # we serve the app ourselves
            insecure=True,  # TLS is the listener's
            certificates=None,
            superexec_auth_secret=None,
            authn_plugin=cast(Any, None),
            event_log_plugin=None,
            fleet_event_log_plugin=None,
            enable_event_log=False,
            artifact_provider=None,
            enable_supernode_auth=True,
            fleet_api_type="grpc-rere",
            fleet_api_address=None,
            simulation=False,
            ssl_ca_certfile=None,
            ssl_certfile=None,
            ssl_keyfile=None,
            database=str(database),
            isolation="process",
            runtime_dependency_install=False,
        )
        self.app = create_app(config, SuperLinkLifespan)
        # Nine layers of middleware cost more than the work of a small round; these three are what a fleet route needs.
        # The others serve the Control and Runtime API, which the listener does not let through, and event logs.
        self.app.user_middleware = [layer for layer in self.app.user_middleware if _needed(layer)]
        if NodeAuthMiddleware not in [cast(Any, layer.cls) for layer in self.app.user_middleware]:
            raise RuntimeError("Flower's node authentication is not where it was; see tests/server/test_superlink.py")
        self.state = self.app.state.linkstate_factory.state()
        self.store = self.state._object_store = SpillStore(spool)
        # Both run in every request of every site, and together take half of a small round's time: looking for expired
        # tasks, of which we have one, and counting traffic, which we count ourselves.
        self.state._cleanup_expired_task_tokens = seldom(self.state._cleanup_expired_task_tokens, 1.0)
        self.state.store_traffic = lambda *args, **kwargs: None

    def register(self, name: str, public_key: bytes) -> int:
        """Admit a site's key; the node id it has or gets."""
        known = self.state.get_node_id_by_public_key(public_key)
        return int(known or self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key, 30, name=name))

    def unregister(self, public_key: bytes) -> None:
        """Forget a site's key: its next request is refused."""
        if node_id := self.state.get_node_id_by_public_key(public_key):
            self.state.delete_node(NOOP_FLWR_AID, node_id)

    def admit(self, keys: dict[str, str], revoked: Iterable[str]) -> None:
        """Know these keys (PEM) by their sites' names, and those no more."""
        for key in revoked:
            self.unregister(key.encode())
        for name, key in keys.items():
            self.register(name, key.encode())

    def nodes(self) -> dict[str, Node]:
        """Every registered site by name."""
        return {
            info.name: Node(info.node_id, info.status == "online", info.last_activated_at)
            for info in self.state.get_node_info(statuses=["registered", "online", "offline"])
        }

    def open_run(self) -> tuple[int, int]:
        """Start a Flower run that only this process drives; returns (run id, task id)."""
        run = self.state.create_run(
            "fedtailor/app", "0", "none", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = self.state.get_tasks(run_ids=[run])[0].task_id
        if not (run and self.state.claim_task(task) and self.state.activate_task(task)):
            raise RuntimeError("Flower's LinkState would not start a run")
        return int(run), int(task)

    def keep_alive(self, task: int) -> None:
        """Flower fails a run whose task has no heartbeat."""
        self.state.acknowledge_task_heartbeat(task)

    def close_run(self, run: int, task: int) -> None:
        """End a run and delete what is left of its messages and objects."""
        self.state.finish_task(task, SubStatus.COMPLETED, "")
        self.state.cleanup_run(run)

    def close_stale_runs(self) -> None:
        """End runs that an earlier process left open; their studies resume in runs of their own."""
        for info in self.state.get_run_info(statuses=["pending", "starting", "running"]):
            self.state.stop_run(info.run_id)

    def push(self, run: int, contents: Mapping[int, RecordDict], ttl: float) -> dict[int, str]:
        """Send each node its content; returns node id -> message id, without nodes that are no longer registered.

        Equal parts of two contents are stored once. Every message is registered before the first object is stored: a
        push session ends when nothing is pending.
        """
        session = self.state.start_session(run)
        sent: dict[int, str] = {}
        todo: dict[str, Any] = {}
        with no_object_id_recompute():
            for node, content in contents.items():
                meta = Metadata(run, "", SUPERLINK_NODE_ID, node, "", "", time.time(), ttl, "train")
                message = make_message(meta, content)
                message.metadata.__dict__["_message_id"] = message.object_id
                objects = get_all_nested_objects(message)
                header, objects_tree = remove_content_from_message(message), get_object_tree(message)
                stored, missing = self.state.store_message_and_object_tree(header, objects_tree, session)
                if not stored and node not in {known.node_id for known in self.nodes().values()}:
                    continue  # it was unregistered this moment
                if not stored:
                    raise WireError(f"Flower refused a message to node {node}", code="push")
                todo |= {object_id: objects[object_id] for object_id in missing}
                sent[node] = message.metadata.message_id
            for object_id, item in todo.items():
                self.state.store_object(run, session, object_id, item.deflate())
        return sent

    def replies(self, run: int, waiting: set[str]) -> list[Reply]:
        """Answers that have come to any of ``waiting``; each is returned once."""
        found = []
        for message in self.state.get_message_res(message_ids=set(waiting), run_id=run):
            lost = message.has_error() and message.error.code in LOST
            error = (message.error.reason or "unknown") if message.has_error() else None
            found.append(Reply(message.metadata.message_id, message.metadata.reply_to_message_id, error, lost))
        return found

    def objects(self, message_id: str, most: int) -> list[str] | None:
        """The ids of a reply's objects, here or on their way; None when the reply is gone.

        Raises:
            WireError: when the reply has more objects than any agreed reply can have.
        """
        try:
            ids = [node.object_id for node in iterate_object_tree(self.store.get_object_tree(message_id))]
        except NoObjectInStoreError:
            return None
        if len(ids) > most:
            raise WireError(f"a reply of {len(ids)} objects; at most {most}", code="oversized")
        return ids

    def missing(self, ids: list[str]) -> list[str] | None:
        """Which of ``ids`` are still on their way, or None when one never will be here."""
        return self.store.missing(ids)

    def fetch(self, run: int) -> Callable[[str], bytes]:
        """How to read an object of a run."""

        def read(object_id: str) -> bytes:
            content = self.state.get_object(run, object_id)
            if not content:
                raise WireError("a part of the message is missing", code="format")
            return cast(bytes, content)

        return read

    def forget(self, asked: Iterable[str], answers: Iterable[str] = ()) -> None:
        """Delete messages, their replies and the replies' objects."""
        self.state.delete_messages(message_ins_ids=set(asked))
        for message_id in [*answers, *asked]:
            self.store.delete(message_id)


def _needed(layer: Any) -> bool:
    return (
        layer.cls in (ProtobufTranslationMiddleware, NodeAuthMiddleware)
        or layer.kwargs.get("dispatch") is http_error_translator
    )


def seldom(fn: Callable[[], None], seconds: float) -> Callable[[], None]:
    """``fn``, but not again before ``seconds`` have passed."""
    last = -seconds

    def call() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            fn()

    return call
