"""The local control plane: gRPC over a Unix socket that only its owner can open, and the standard health service.

Requests and replies are JSON documents in protobuf's StringValue, so that no generated code has to be kept in step.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import grpc
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedtailor import errors
from fedtailor.errors import ConnectionFailed, FedtailorError

Json = dict[str, Any]
Method = Callable[[Json], Json]
Stream = Callable[[Json], Iterator[Json]]
PREFIX = "fedtailor.control.v1."
LONGEST_ERROR = 6000  # bytes; it travels in a header, and gRPC may refuse those of more than 8 KiB


def socket_of(home: Path) -> Path:
    """Where the daemon of ``home`` listens: in its home, or in a private folder where that path is too long for Unix."""
    near = home.resolve() / "control.sock"
    if len(os.fsencode(near)) <= 100:
        return near
    private = Path(tempfile.gettempdir()) / f"fedtailor-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    if private.stat().st_uid != os.getuid() or private.stat().st_mode & 0o077:
        raise ConnectionFailed(f"{private} belongs to somebody else; choose a shorter --home")
    return private / f"{hashlib.sha256(os.fsencode(near)).hexdigest()[:24]}.sock"


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Hold the home's lock, so that two daemons never share one.

    Raises:
        ConnectionFailed: if another process holds it.
    """
    with (home / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConnectionFailed(f"another fedtailor daemon is running in {home}; stop it first") from error
        yield


def serve(socket: Path, service: str, methods: Mapping[str, Method], streams: Mapping[str, Stream]) -> grpc.Server:
    """Listen on ``socket`` (mode 0600) until the returned server is stopped."""
    socket.unlink(missing_ok=True)  # the caller holds the home's lock: what is there is stale
    handlers = {
        **{name: grpc.unary_unary_rpc_method_handler(_unary(fn), **_codec()) for name, fn in methods.items()},
        **{name: grpc.unary_stream_rpc_method_handler(_stream(fn), **_codec()) for name, fn in streams.items()},
    }
    server = grpc.server(ThreadPoolExecutor(max_workers=8, thread_name_prefix="control"))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(PREFIX + service, handlers),))
    checks = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    mask = os.umask(0o177)  # the socket is born with mode 0600
    try:
        server.add_insecure_port(_address(socket))
        server.start()
    finally:
        os.umask(mask)
    for name in ("", PREFIX + service):
        checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    return server


def call(socket: Path, service: str, method: str, request: Json | None = None, timeout: float = 60.0) -> Json:
    """Ask a daemon; its errors are raised here as they were there.

    Raises:
        ConnectionFailed: if no daemon listens on ``socket``.
        FedtailorError: what the daemon answered.
    """
    with _channel(socket) as channel:
        ask = channel.unary_unary(f"/{PREFIX}{service}/{method}", StringValue.SerializeToString, StringValue.FromString)
        try:
            answer = ask(StringValue(value=json.dumps(request or {})), timeout=timeout)
        except grpc.RpcError as error:
            raise _reraised(error, socket) from error
    return _read(answer)


def watch(socket: Path, service: str, method: str, request: Json | None = None) -> Iterator[Json]:
    """Follow a daemon's stream of documents."""
    with _channel(socket) as channel:
        ask = channel.unary_stream(
            f"/{PREFIX}{service}/{method}", StringValue.SerializeToString, StringValue.FromString
        )
        try:
            for answer in ask(StringValue(value=json.dumps(request or {}))):
                yield _read(answer)
        except grpc.RpcError as error:
            raise _reraised(error, socket) from error


def alive(socket: Path) -> bool:
    """Whether a daemon's health service answers SERVING."""
    with _channel(socket) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2.0)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _channel(socket: Path) -> grpc.Channel:
    options = [("grpc.enable_http_proxy", 0), ("grpc.default_authority", "localhost")]
    return grpc.insecure_channel(_address(socket), options=options)


def _address(socket: Path) -> str:
    """gRPC reads it as a URI: ``#``, ``?`` and ``%`` in a path would otherwise lead elsewhere."""
    return f"unix:{quote(os.fsencode(socket))}"


def _codec() -> dict[str, Any]:
    return {"request_deserializer": StringValue.FromString, "response_serializer": StringValue.SerializeToString}


def _read(answer: StringValue) -> Json:
    document: Json = json.loads(answer.value)
    return document


def _unary(fn: Method) -> Callable[[StringValue, grpc.ServicerContext], StringValue]:
    def handle(request: StringValue, context: grpc.ServicerContext) -> StringValue:
        try:
            return StringValue(value=json.dumps(fn(_read(request))))
        except FedtailorError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, _said(error))
            raise

    return handle


def _stream(fn: Stream) -> Callable[[StringValue, grpc.ServicerContext], Iterator[StringValue]]:
    def handle(request: StringValue, context: grpc.ServicerContext) -> Iterator[StringValue]:
        try:
            for document in fn(_read(request)):
                if not context.is_active():
                    return
                yield StringValue(value=json.dumps(document))
        except FedtailorError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, _said(error))

    return handle


def _said(error: FedtailorError) -> str:
    kind = type(error).__name__ if hasattr(errors, type(error).__name__) else "FedtailorError"
    text = str(error)
    if len(json.dumps(text)) > LONGEST_ERROR:
        text = f"{text[: LONGEST_ERROR // 12]}…"  # an escaped character takes up to 12
    return json.dumps({"kind": kind, "code": error.code, "text": text})


def _reraised(error: grpc.RpcError, socket: Path) -> FedtailorError:
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.FAILED_PRECONDITION:
        known = json.loads(details)
        kind = getattr(errors, known["kind"], FedtailorError)
        return cast(FedtailorError, kind(known["text"], code=known["code"]))
    if code == grpc.StatusCode.UNAVAILABLE:
        return ConnectionFailed(f"no fedtailor daemon listens on {socket}; start it with `fedtailor … up`")
    return FedtailorError(f"the daemon at {socket} answered {code.name}: {details.splitlines()[0] if details else ''}")
