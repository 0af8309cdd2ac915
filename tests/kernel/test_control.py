"""The local control plane: its owner's alone, errors travel as they are, streams end."""

import itertools
import os
import shutil
import stat
import tempfile
import threading
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedtailor import control, errors
from fedtailor.errors import ConnectionFailed, FedtailorError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FedtailorError)]
EXITED = threading.Event()


class Unlisted(errors.RefusedError):
    """An error of a plug-in, of which the other side knows nothing."""


def fail(request):
    kind = {one.__name__: one for one in [*KINDS, Unlisted]}[request["kind"]]
    raise kind(request["text"], code=request.get("code"))


def crash(request):
    raise KeyError("a bug")


def count(request):
    yield from ({"n": n} for n in range(request["to"]))
    if "kind" in request:
        fail(request)


def forever(request):
    try:
        yield from ({"n": n} for n in itertools.count())
    finally:
        EXITED.set()


def listen(home):
    home.mkdir(parents=True, exist_ok=True)
    socket = control.socket_of(home)
    methods = {"Echo": lambda request: {"got": request}, "Fail": fail, "Crash": crash}
    return socket, control.serve(socket, "Site", methods, {"Count": count, "Forever": forever})


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where sockets of homes with long paths go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def socket(tmp_path):
    path, server = listen(tmp_path / "home")
    yield path
    server.stop(None).wait()


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_document_goes_there_and_back(socket):
    document = {"text": "é\n\0€", "deep": [{"a": None, "b": [1, 2.5, True]}], "": {}}
    assert control.call(socket, "Site", "Echo", document) == {"got": document}
    assert control.call(socket, "Site", "Echo") == {"got": {}}


def test_the_socket_is_its_owners_alone_and_the_umask_is_as_before(socket):
    assert stat.S_ISSOCK(socket.stat().st_mode) and mode(socket) == 0o600
    now = os.umask(0o022)
    os.umask(now)
    assert now != 0o177


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_travels_by_kind_code_and_text(socket, kind):
    for code, expected in (("budget", "budget"), (None, kind.code)):
        with pytest.raises(FedtailorError) as caught:
            control.call(socket, "Site", "Fail", {"kind": kind.__name__, "text": "zu viel: é €\n100 %", "code": code})
        assert type(caught.value) is kind
        assert (caught.value.code, str(caught.value)) == (expected, "zu viel: é €\n100 %")


def test_an_error_that_the_other_side_does_not_know_keeps_its_code(socket):
    with pytest.raises(FedtailorError, match="why") as caught:
        control.call(socket, "Site", "Fail", {"kind": "Unlisted", "text": "why"})
    assert type(caught.value) is FedtailorError and caught.value.code == "refused"


@pytest.mark.parametrize("letter", ["x", "é", "😀", '"', "%"])
def test_a_long_error_is_cut_and_keeps_its_kind(socket, letter):
    for length in (450, 40_000):
        with pytest.raises(errors.ContractError) as caught:
            control.call(socket, "Site", "Fail", {"kind": "ContractError", "text": letter * length, "code": "rows"})
        assert caught.value.code == "rows" and str(caught.value)[:450] == letter * 450
        assert str(caught.value).endswith("…") == (length > 450) and len(str(caught.value)) <= 6000


def test_a_bug_in_the_daemon_is_told_as_one(socket):
    with pytest.raises(FedtailorError, match=f"the daemon at {socket} answered UNKNOWN: .*a bug") as caught:
        control.call(socket, "Site", "Crash")
    assert caught.value.code == "failed"
    assert control.call(socket, "Site", "Echo") == {"got": {}}, "and the daemon goes on"


@pytest.mark.parametrize(("service", "method"), [("Site", "Destroy"), ("Server", "Echo"), ("Site", "Count/x")])
def test_an_unknown_method_is_told(socket, service, method):
    with pytest.raises(FedtailorError, match="answered UNIMPLEMENTED"):
        control.call(socket, service, method)


def test_without_a_daemon_the_way_out_is_told(tmp_path):
    socket = control.socket_of(tmp_path)
    for ask in (lambda: control.call(socket, "Site", "Echo"), lambda: list(control.watch(socket, "Site", "Count"))):
        with pytest.raises(ConnectionFailed, match=f"no fedtailor daemon listens on {socket}; start it with") as caught:
            ask()
        assert caught.value.code == "connection"
    assert not control.alive(socket)


def test_a_stream_ends_when_there_is_no_more(socket):
    assert list(control.watch(socket, "Site", "Count", {"to": 500})) == [{"n": n} for n in range(500)]
    assert list(control.watch(socket, "Site", "Count", {"to": 0})) == []


def test_a_stream_ends_with_its_error(socket):
    stream = control.watch(socket, "Site", "Count", {"to": 2, "kind": "RefusedError", "text": "no", "code": "policy"})
    assert [next(stream), next(stream)] == [{"n": 0}, {"n": 1}]
    with pytest.raises(errors.RefusedError, match="no") as caught:
        next(stream)
    assert caught.value.code == "policy"


def test_a_stream_ends_at_the_daemon_when_nobody_watches_any_more(socket):
    EXITED.clear()
    stream = control.watch(socket, "Site", "Forever")
    assert [next(stream)["n"] for _ in range(3)] == [0, 1, 2] and not EXITED.is_set()
    stream.close()
    assert EXITED.wait(60)


def test_the_health_service_says_serving_until_the_end(tmp_path):
    socket, server = listen(tmp_path / "home")
    try:
        assert control.alive(socket)
        with grpc.insecure_channel(f"unix:{socket}", [("grpc.default_authority", "localhost")]) as channel:
            for service in ("", "fedtailor.control.v1.Site"):
                request = health_pb2.HealthCheckRequest(service=service)
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=30)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
    finally:
        server.stop(None).wait()
    assert not control.alive(socket)


@pytest.mark.parametrize("name", ["with space", "ha#sh", "wh?t", "100%41", "é"])
def test_any_folder_may_be_a_home(tmp_path, name):
    socket, server = listen(tmp_path / name)
    try:
        assert socket == (tmp_path / name / "control.sock").resolve() and mode(socket) == 0o600
        assert control.call(socket, "Site", "Echo") == {"got": {}}
    finally:
        server.stop(None).wait()


def test_a_home_of_a_long_path_listens_in_a_private_folder(tmp_path, monkeypatch):
    short = Path(tempfile.mkdtemp(dir="/tmp"))  # as a host's own is; the tests' may be long itself
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    homes = [tmp_path / ("x" * 100) / name for name in ("a", "b")]
    (one, server), (two, other) = map(listen, homes)
    try:
        assert one.parent == two.parent == short / f"fedtailor-{os.getuid()}" and one != two
        assert mode(one.parent) == 0o700 and mode(one) == 0o600
        assert control.call(one, "Site", "Echo") == control.call(control.socket_of(homes[1]), "Site", "Echo")
    finally:
        server.stop(None).wait()
        other.stop(None).wait()
        shutil.rmtree(short)


def test_a_private_folder_that_others_can_open_is_not_used(tmp_path):
    (tmp_path / f"fedtailor-{os.getuid()}").mkdir()
    (tmp_path / f"fedtailor-{os.getuid()}").chmod(0o755)
    with pytest.raises(ConnectionFailed, match="belongs to somebody else; choose a shorter --home"):
        control.socket_of(tmp_path / ("x" * 100))


def test_the_socket_of_a_daemon_that_was_killed_is_replaced(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "control.sock").write_text("stale")
    socket, server = listen(home)
    try:
        assert control.call(socket, "Site", "Echo") == {"got": {}} and mode(socket) == 0o600
    finally:
        server.stop(None).wait()


def test_a_home_has_one_daemon_at_a_time(tmp_path):
    with control.only_one(tmp_path):
        with pytest.raises(ConnectionFailed, match=f"another fedtailor daemon is running in {tmp_path}; stop it first"):
            with control.only_one(tmp_path):
                pytest.fail("two daemons share a home")
    with control.only_one(tmp_path):
        pass
